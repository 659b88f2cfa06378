"""A directory of YAML and JSON manifests as a source of cluster state."""

from nodeproxy.source.manifests.source import ManifestSource

__all__ = ["ManifestSource"]
