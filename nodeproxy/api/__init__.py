"""The part of the Kubernetes API that a node needs, as immutable typed structs. Imports nothing of ours."""
