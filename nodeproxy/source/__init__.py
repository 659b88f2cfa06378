"""Where cluster state comes from: the API server or a directory of manifests. Both deliver the same events."""
