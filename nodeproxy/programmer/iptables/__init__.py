"""iptables mode: chains that a kube-proxy user recognises, dispatched by a prefix tree, changed in proportion."""
