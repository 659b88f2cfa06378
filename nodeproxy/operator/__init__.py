"""The roll-out operator: changes how the nodes of a cluster are proxied, node by node, and turns back by itself."""
