"""The agent: wires source, cluster state, forwarding and a programmer together, and keeps them going."""
