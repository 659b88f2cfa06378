"""The legacy tables in the kernel's own binary form: for changes that are small next to the table they are made in."""
