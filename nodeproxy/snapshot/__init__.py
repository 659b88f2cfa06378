"""Cluster state at one moment, in a file or fresh from its source, and a node to look at it from."""
