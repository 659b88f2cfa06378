"""What runs inside the VM: its init script and the agent that executes commands. Standard library only."""
