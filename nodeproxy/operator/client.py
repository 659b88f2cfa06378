"""Owns what people do with ProxyRollouts from a terminal: make, read, change. Blocking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec

from nodeproxy.api.proxy_node import API_VERSION
from nodeproxy.operator.api import PROXY_ROLLOUTS, ProxyRollout
from nodeproxy.operator.cluster import MERGE_PATCH, decode, name_of
from nodeproxy.source.apiserver.connection import Cancel, Connection, RequestError, StatusError
from nodeproxy.source.apiserver.credentials import Credentials

_READ_SECONDS: Final = 30.0
_PASSES: Final = (401, 403, 429)
"""Statuses that a read may have for a while: a token ran out; a server that starts does not know all rights yet."""


class _Items(msgspec.Struct):
    items: list[msgspec.Raw]


class RolloutError(Exception):
    """It cannot be done; one line says why."""


class Unanswered(RolloutError):
    """As `RolloutError`, but for now only: the API server does not answer, starts, or wants other credentials."""


def kubeconfig_path(given: Path | None) -> Path | None:
    """The kubeconfig to take: the one given, else as kubectl does. None: there is none, we may be in a pod."""
    if given is not None:
        return given
    named = [Path(part) for part in os.environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    for path in named or [Path.home() / ".kube" / "config"]:
        if path.exists():
            return path
    return named[0] if named else None


class RolloutClient:
    """ProxyRollouts of one cluster. All methods raise `RolloutError`."""

    def __init__(self, kubeconfig: Path | None, master: str | None = None) -> None:
        self._connection = Connection(Credentials(kubeconfig_path(kubeconfig), master))
        self._connect()

    def _connect(self) -> None:
        try:
            self._connection.connect()
        except Exception as error:  # CredentialsError, and whatever plugins do
            raise RolloutError(str(error)) from error

    def create(self, name: str, spec: dict[str, Any], *, dry_run: bool = False) -> ProxyRollout:
        """Make one. With `dry_run` the API server only says what it would be."""
        body = {"apiVersion": API_VERSION, "kind": "ProxyRollout", "metadata": {"name": name}, "spec": spec}
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return decode(self._send("POST", PROXY_ROLLOUTS, body, query=query), ProxyRollout)

    def get(self, name: str) -> ProxyRollout:
        """One of them."""
        return decode(self._read(f"{PROXY_ROLLOUTS}/{name_of(name)}", f"there is no ProxyRollout {name}"), ProxyRollout)

    def all(self) -> list[ProxyRollout]:
        """All of them, the oldest first."""
        raw = self._read(PROXY_ROLLOUTS, "the cluster has no ProxyRollouts: apply deploy/operator")
        found = [decode(item, ProxyRollout) for item in msgspec.json.decode(raw, type=_Items).items]
        return sorted(found, key=lambda one: (one.metadata.creation_timestamp or "", one.metadata.name))

    def change(self, name: str, spec: dict[str, Any]) -> ProxyRollout:
        """Change fields of its spec."""
        return decode(self._send("PATCH", f"{PROXY_ROLLOUTS}/{name_of(name)}", {"spec": spec}, name=name), ProxyRollout)

    def _read(self, path: str, missing: str) -> bytes:
        try:
            return b"".join(self._connection.read(path, {}, Cancel(), _READ_SECONDS))
        except StatusError as error:
            if error.status == 401:
                self._connect()
            if error.status in _PASSES or error.status >= 500:
                raise Unanswered(str(error)) from error
            raise RolloutError(missing if error.status == 404 else str(error)) from error
        except RequestError as error:
            raise Unanswered(f"the API server does not answer: {error}") from error

    def _send(
        self, method: str, path: str, body: dict[str, Any], *, query: dict[str, str] | None = None, name: str = ""
    ) -> bytes:
        kind = MERGE_PATCH if method == "PATCH" else "application/json"
        encoded = msgspec.json.encode(body)
        try:
            return self._connection.send(method, path, Cancel(), query=query, body=encoded, content_type=kind)
        except StatusError as error:
            if error.status == 404:
                missing = (
                    f"there is no ProxyRollout {name}" if name else "the cluster has no ProxyRollouts: apply deploy/operator"
                )
                raise RolloutError(missing) from error
            raise RolloutError(str(error).partition(": ")[2] or str(error)) from error
        except RequestError as error:
            raise RolloutError(f"the API server does not answer: {error}") from error
