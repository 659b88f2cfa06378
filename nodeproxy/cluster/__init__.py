"""Cluster state: validated objects, merged EndpointSlices, and which Services changed."""
