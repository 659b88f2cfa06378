"""The modes side by side: what the kernel makes of every frontend in each, and what each costs."""
