"""Owns the objects that tests put into the cluster, as plain data: made, changed, read and removed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from kubernetes import config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import ConflictError, NotFoundError

from e2e.harness.objects import Object
from e2e.harness.settings import NAMESPACE

_MERGE: Final = "application/merge-patch+json"
_VERSIONS: Final = {
    "EndpointSlice": "discovery.k8s.io/v1",
    "DaemonSet": "apps/v1",
    "Deployment": "apps/v1",
    "Event": "v1",
    "ProxyRollout": "nodeproxy.io/v1alpha1",
    "ProxyNode": "nodeproxy.io/v1alpha1",
}


class Api:
    """The API server, as an administrator. Namespaced objects are of the tests' namespace unless told otherwise."""

    def __init__(self, kubeconfig: Path) -> None:
        cache = Path(tempfile.gettempdir()) / f"e2e-discovery-{os.getpid()}.json"
        cache.unlink(missing_ok=True)  # else kept for the next cluster at the same address
        connect: Any = config.new_client_from_config
        discover: Any = DynamicClient
        self._client = discover(connect(str(kubeconfig)), cache_file=str(cache))
        cache.unlink(missing_ok=True)

    def create(self, body: Object, namespace: str | None = NAMESPACE) -> Object:
        """Make an object; one of that name that exists already is an error."""
        made: Object = self._of(body["kind"]).create(body=body, namespace=namespace).to_dict()
        return made

    def ensure(self, body: Object, namespace: str | None = NAMESPACE) -> None:
        """Make an object unless there is one of that name."""
        with contextlib.suppress(ConflictError):
            self.create(body, namespace)

    def get(self, kind: str, name: str, namespace: str | None = NAMESPACE) -> Object:
        """One object. Raises NotFoundError."""
        found: Object = self._of(kind).get(name=name, namespace=namespace).to_dict()
        return found

    def list(self, kind: str, selector: str | None = None, namespace: str | None = NAMESPACE) -> list[Object]:
        """The objects that a label selector matches, or all; without a namespace those of all namespaces."""
        found: list[Object] = self._of(kind).get(namespace=namespace, label_selector=selector).to_dict()["items"]
        return found

    def patch(
        self, kind: str, name: str, body: Object, namespace: str | None = NAMESPACE, *, status: bool = False
    ) -> Object:
        """Merge `body` into an object or its status: what is None goes, lists are replaced."""
        resource = self._of(kind)
        target = resource.status if status else resource
        changed: Object = target.patch(name=name, namespace=namespace, body=body, content_type=_MERGE).to_dict()
        return changed

    def delete(self, kind: str, name: str, namespace: str | None = NAMESPACE, *, at_once: bool = False) -> None:
        """Remove an object that may be gone already. `at_once`: a pod without asking it to end."""
        body = {"gracePeriodSeconds": 0} if at_once else None
        with contextlib.suppress(NotFoundError):
            self._of(kind).delete(name=name, namespace=namespace, body=body)

    def _of(self, kind: str) -> Any:
        return self._client.resources.get(api_version=_VERSIONS.get(kind, "v1"), kind=kind)
