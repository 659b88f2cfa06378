"""nodeproxy: a kube-proxy replacement for Linux nodes."""
