"""How to reach and authenticate to an API server, and a small blocking HTTP client for tests."""

import base64
import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from hack.controlplane.processes import connect_in

Json = dict[str, Any]


class ApiError(Exception):
    """The API server refused a request."""

    def __init__(self, method: str, path: str, status: int, body: str) -> None:
        try:
            message = json.loads(body)["message"]
        except (ValueError, KeyError, TypeError):
            message = body[:500]
        super().__init__(f"{method} {path}: {status} {message}")
        self.status = status
        self.body = body


@dataclass(frozen=True, kw_only=True)
class Access:
    """Address and credentials of an API server.

    Attributes:
        url: as `https://127.0.0.1:6443`.
        ca: file with the certificates to trust; None trusts those of the system.
        token: bearer token, if that is how to authenticate.
        certificate, key: files of the client certificate, if that is how.
        insecure: whether to take any certificate.
        netns: network namespace to connect from; None means the caller's.
    """

    url: str
    ca: Path | None = None
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    insecure: bool = False
    netns: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers that authenticate a request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def ssl_context(self) -> ssl.SSLContext:
        """Trust and client certificate, for any HTTP client."""
        context = ssl.create_default_context(cafile=self.ca)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate:
            context.load_cert_chain(self.certificate, self.key)
        return context

    def kubeconfig(self) -> str:
        """A kubeconfig that needs no other file."""
        cluster: Json = {"server": self.url}
        if self.insecure:
            cluster["insecure-skip-tls-verify"] = True
        elif self.ca:
            cluster["certificate-authority-data"] = _base64(self.ca)
        user: Json = {}
        if self.token:
            user["token"] = self.token
        if self.certificate and self.key:
            user |= {"client-certificate-data": _base64(self.certificate), "client-key-data": _base64(self.key)}
        name = "test"
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": name,
                "clusters": [{"name": name, "cluster": cluster}],
                "users": [{"name": name, "user": user}],
                "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            }
        )

    def write_kubeconfig(self, path: Path) -> None:
        """Writes that kubeconfig, readable by the owner only."""
        path.touch(mode=0o600)
        path.write_text(self.kubeconfig())

    def request(self, method: str, path: str, body: Json | None = None, *, content_type: str = "application/json") -> Json:
        """Sends one request and returns the decoded answer; raises ApiError for a status from 400 on."""
        with self.open(method, path, body, content_type=content_type) as response:
            text = response.read().decode()
            if response.status >= 400:
                raise ApiError(method, path, response.status, text)
        decoded = json.loads(text) if text.startswith("{") else {"text": text}
        assert isinstance(decoded, dict)
        return decoded

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        content_type: str = "application/json",
        timeout: float = 30.0,
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends one request and gives the response, whatever its status, to be read in pieces: for watches."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        sock = connect_in(self.netns, host, port, timeout)
        try:
            if parts.scheme == "https":
                sock = self.ssl_context().wrap_socket(sock, server_hostname=host)
            connection.sock = sock
            payload = None if body is None else json.dumps(body)
            connection.request(method, parts.path + path, payload, {**self.headers, "Content-Type": content_type})
            yield connection.getresponse()
        finally:
            connection.close()
            sock.close()


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
