"""Owns how the API server is found and how we prove who we are: kubeconfig, in-cluster, or a plain URL.

All of it is read by the official `kubernetes` client (exec plugins, token files, certificates, proxies). That package
imports pydantic, requests and oauthlib whatever part of it one needs (about 25 MB and 0.5 s of CPU), so it is imported only
once credentials are loaded.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nodeproxy.source.events import SourceError

if TYPE_CHECKING:
    from kubernetes.client import Configuration


class CredentialsError(SourceError):
    """The address of the API server, or credentials for it, cannot be had. The text says from where and why not."""


class Credentials:
    """Where to find the API server and as whom to speak to it.

    `kubeconfig` is a file with a current context; `master` a URL that replaces the server in it, or stands alone for a
    server that asks for no credentials. With neither, the service account of the pod we run in is used.
    """

    def __init__(self, kubeconfig: Path | None = None, master: str | None = None) -> None:
        self._kubeconfig = kubeconfig
        self._master = master.rstrip("/") if master else None

    def __str__(self) -> str:
        parts = [f"kubeconfig {self._kubeconfig}"] if self._kubeconfig else []
        parts += [f"master {self._master}"] if self._master else []
        return ", ".join(parts) or "in-cluster service account"

    def load(self) -> LoadedCredentials:
        """Read everything anew. Blocking (exec plugins are run). Raises CredentialsError."""
        from kubernetes.client import Configuration  # noqa: PLC0415 - see the module's docstring

        configuration = Configuration(host="")  # by default it would be localhost, which nobody asked for
        if self._kubeconfig is not None:
            self._load_kubeconfig(self._kubeconfig, configuration)
        elif self._master is None:
            self._load_in_cluster(configuration)
        if self._master is not None:
            configuration.host = self._master
        host = configuration.host
        if not host:
            raise CredentialsError(f"{self}: the cluster of the current context names no server")
        if not _is_http_url(host):
            raise CredentialsError(f"{self}: {host!r} is not an http:// or https:// URL")
        return LoadedCredentials(configuration, host.rstrip("/"))

    def _load_kubeconfig(self, path: Path, configuration: Any) -> None:
        from kubernetes import config  # noqa: PLC0415

        load: Any = config.load_kube_config
        try:
            path.read_bytes()  # the client says of a file that is missing or unreadable only that it is invalid
            load(str(path), client_configuration=configuration, persist_config=False)
        except OSError as error:
            raise CredentialsError(f"{self}: {error.strerror or error}") from error
        except config.ConfigException as error:
            raise CredentialsError(f"{self}: {error}") from error
        except Exception as error:  # the client reads YAML and base64 without any checks of its own
            raise CredentialsError(f"{self}: not a kubeconfig: {type(error).__name__}: {error}") from error

    def _load_in_cluster(self, configuration: Any) -> None:
        from kubernetes import config  # noqa: PLC0415

        load: Any = config.load_incluster_config
        try:
            load(client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise CredentialsError(f"{self}: {error} (outside of a pod, give a kubeconfig or a master URL)") from error


def _is_http_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


class LoadedCredentials:
    """Credentials as read at one time. Safe to use from several threads."""

    def __init__(self, configuration: Configuration, host: str) -> None:
        self.configuration = configuration
        # Kept apart from the configuration, as the client's refresh of a token sets the kubeconfig's server there again.
        self.host = host
        """Base URL of the API server, without a slash at its end."""
        self._lock = threading.Lock()

    def headers(self) -> dict[str, str]:
        """Headers that authenticate a request. Blocking: an expired token is renewed here. Raises CredentialsError."""
        with self._lock:
            try:
                token = self.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
            except Exception as error:  # plugins, files and token servers fail in every way
                raise CredentialsError(f"cannot renew the token: {error}") from error
        return {"authorization": token.strip()} if token else {}
