"""IPVS mode: virtual servers in the kernel, addresses on a dummy interface, ipsets, and a small fixed set of rules."""
