"""Kubernetes' own end-to-end tests, built from their Go module and run against a cluster: `python -m hack.conformance`."""
