"""The pure heart: from cluster state and node to a backend-neutral forwarding table. No I/O."""
