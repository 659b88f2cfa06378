"""What the project's developers run beside the program itself: test control planes, benchmarks, images."""
