"""Owns the shape of `ProxyNode` (nodeproxy.io/v1alpha1): what the operator tells the agent of one node, and what it answers.

The object has the node's name. Its spec is the operator's, its status is the agent's. `deploy/operator/crds/proxynodes.yaml`
is its schema; a test keeps the two alike.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct, field

GROUP: Final = "nodeproxy.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
PROXY_NODES: Final = f"/apis/{API_VERSION}/proxynodes"
"""The path of the collection; an object is at PATH/NODE, its status at PATH/NODE/status."""
PROXY_LABEL: Final = "nodeproxy.io/proxy"
"""The label of a Node that says that nodeproxy, and not kube-proxy, serves it (deploy/components/by-label)."""


class ApiObjectBase(Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """Base: immutable, camelCase on the wire, unknown fields ignored, nothing written that is as by default."""


class OwnerReference(ApiObjectBase, frozen=True):
    """What an object belongs to, as far as it is read: it goes with it."""

    kind: str = ""
    name: str = ""
    uid: str = ""


class ObjectMeta(ApiObjectBase, frozen=True):
    """metadata, as far as it is read."""

    name: str
    namespace: str | None = None
    uid: str | None = None
    generation: int = 0
    resource_version: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    finalizers: list[str] | None = None
    owner_references: list[OwnerReference] | None = None


class ProxyNodeSpec(ApiObjectBase, frozen=True):
    """What the agent is told, on top of its own configuration; what is absent is as its own configuration says.

    `configuration`: a part of a KubeProxyConfiguration. `verification`: an opaque id that the agent answers in its status
    once it has looked.
    """

    mode: str | None = None
    configuration: dict[str, Any] | None = None
    verification: str | None = None


class Audit(ApiObjectBase, frozen=True):
    """What comparing the whole kernel with what is wanted found. `differs`: in words, a few at most; `at`: RFC 3339."""

    clean: bool = False
    differs: list[str] | None = None
    at: str | None = None


class Verification(ApiObjectBase, frozen=True):
    """The agent's answer to `spec.verification`. Counts since the agent started; durations in seconds over recent syncs."""

    id: str
    sync_errors: int = 0
    refused_service_ports: int = 0
    drift_repairs: int = 0
    sync_p50_seconds: float | None = field(default=None, name="syncP50Seconds")
    sync_p99_seconds: float | None = field(default=None, name="syncP99Seconds")
    at: str | None = None


class ProxyNodeStatus(ApiObjectBase, frozen=True):
    """What the agent says. `message`: why the spec of `observed_generation` is not in force; absent where it is."""

    observed_generation: int = 0
    mode: str | None = None
    version: str | None = None
    image: str | None = None
    in_sync: bool = False
    audit: Audit | None = None
    message: str | None = None
    verification: Verification | None = None
    last_updated: str | None = None


class ProxyNode(ApiObjectBase, frozen=True):
    """A ProxyNode."""

    metadata: ObjectMeta
    spec: ProxyNodeSpec = ProxyNodeSpec()
    status: ProxyNodeStatus = ProxyNodeStatus()

    @property
    def node_uid(self) -> str | None:
        """The UID of the Node that it belongs to, and goes with; None where nobody wrote that down."""
        return next((one.uid for one in self.metadata.owner_references or [] if one.kind == "Node"), None)
