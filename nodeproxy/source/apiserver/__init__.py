"""The API server as a source of cluster state: credentials, connections, and one reflector for each kind."""

from nodeproxy.source.apiserver.credentials import Credentials, CredentialsError
from nodeproxy.source.apiserver.observer import Observer
from nodeproxy.source.apiserver.source import ApiServerSource

__all__ = ["ApiServerSource", "Credentials", "CredentialsError", "Observer"]
