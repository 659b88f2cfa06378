"""Owns the thin drivers of the kernel: packet filter, ipsets, conntrack, addresses, sysctls. No policy; each usable alone.

Objects and calls act on the network namespace of the thread that makes or calls them.
"""
