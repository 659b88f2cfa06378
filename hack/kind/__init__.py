"""A real Kubernetes cluster for tests: Docker's engine, images made without a registry where there is none, and kind."""
