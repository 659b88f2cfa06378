"""What would happen to a packet on this node and why, and what the kernel says to it."""
