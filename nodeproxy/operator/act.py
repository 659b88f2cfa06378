"""Owns the carrying out of what a plan asks for: one request, or a few, for each action."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from nodeproxy.api.proxy_node import API_VERSION, PROXY_LABEL, PROXY_NODES
from nodeproxy.operator.api import FINALIZER, NODEPROXY, PROXY_ROLLOUTS, ProxyRollout
from nodeproxy.operator.cluster import MERGE_PATCH, Cluster, name_of
from nodeproxy.operator.objects import Pod
from nodeproxy.operator.pods import NODE_ANNOTATION, cleanup_name, cleanup_pod
from nodeproxy.operator.probing import Prober
from nodeproxy.operator.world import (
    Action,
    AddFinalizer,
    DeletePod,
    EndCleanup,
    EndProbes,
    ForgetNode,
    LabelNode,
    ReleaseFinalizer,
    SetImage,
    StartCleanup,
    StartProbes,
    Tell,
    TellNode,
)
from nodeproxy.source.apiserver.connection import StatusError
from nodeproxy.source.apiserver.event_writer import MAX_NOTE_BYTES, Event, EventMetadata, ObjectReference

_log = structlog.get_logger(__name__)
_JSON_PATCH: Final = "application/json-patch+json"
_STRATEGIC: Final = "application/strategic-merge-patch+json"
CONTROLLER: Final = "nodeproxy.io/operator"


class Actor:
    """Carries out actions. `image`: that of pods that clean up."""

    def __init__(self, cluster: Cluster, prober: Prober, namespace: str, identity: str, image: Any) -> None:
        self._cluster = cluster
        self._prober = prober
        self._namespace = namespace
        self._identity = identity
        self._image = image
        self._pods = f"/api/v1/namespaces/{namespace}/pods"

    async def carry_out(self, action: Action, rollout: ProxyRollout) -> None:
        """Do it. Raises `RequestError` or `CredentialsError`; it is asked for again then."""
        match action:
            case TellNode():
                await self._tell_node(action)
            case ForgetNode(node=node, uid=uid):
                await self._cluster.delete(f"{PROXY_NODES}/{name_of(node)}", uid=uid)
            case LabelNode(node=node, value=value):
                await self._patch(f"/api/v1/nodes/{name_of(node)}", {"metadata": {"labels": {PROXY_LABEL: value}}})
            case SetImage():
                await self._set_image(action)
            case DeletePod(name=name, uid=uid):
                await self._cluster.delete(f"{self._pods}/{name_of(name)}", uid=uid)
            case StartProbes():
                await self._prober.start(action, rollout)
            case EndProbes(verification=verification):
                await self._prober.end(verification)
            case StartCleanup(node=node, drain_seconds=drain):
                await self._start_cleanup(node, cleanup_pod(node, self._image(), drain, rollout))
            case EndCleanup(node=node):
                await self._cluster.delete(f"{self._pods}/{cleanup_name(node)}")
            case AddFinalizer():
                await self._finalizers(rollout, [*(rollout.metadata.finalizers or []), FINALIZER])
            case ReleaseFinalizer():
                await self._finalizers(rollout, [one for one in rollout.metadata.finalizers or [] if one != FINALIZER])
            case Tell():
                await self._record(action, rollout)
            case _:
                raise TypeError(f"unknown action {action}")

    async def _tell_node(self, action: TellNode) -> None:
        spec = {"mode": action.mode, "configuration": action.configuration, "verification": action.verification}
        said = {key: value for key, value in spec.items() if value is not None}
        # It goes with its Node: another one of the same name must not get what this one was told.
        owners = [{"apiVersion": "v1", "kind": "Node", "name": action.node, "uid": action.uid}] if action.uid else []
        try:
            # Replaced and not merged: what is no longer said in the configuration has to go.
            patch = [
                {"op": "add", "path": "/spec", "value": said},
                {"op": "add", "path": "/metadata/ownerReferences", "value": owners},
            ]
            await self._cluster.send("PATCH", f"{PROXY_NODES}/{name_of(action.node)}", patch, _JSON_PATCH)
        except StatusError as error:
            if error.status != 404:
                raise
            meta = {"name": action.node, "ownerReferences": owners}
            made = {"apiVersion": API_VERSION, "kind": "ProxyNode", "metadata": meta, "spec": said}
            await self._create(PROXY_NODES, made)

    async def _set_image(self, action: SetImage) -> None:
        strategy = {"type": action.update_strategy.get("type"), "rollingUpdate": action.update_strategy.get("rollingUpdate")}
        containers = [{"name": NODEPROXY, "image": action.image}]
        body = {"spec": {"updateStrategy": strategy, "template": {"spec": {"containers": containers}}}}
        path = f"/apis/apps/v1/namespaces/{self._namespace}/daemonsets/{NODEPROXY}"
        await self._cluster.send("PATCH", path, body, _STRATEGIC)

    async def _finalizers(self, rollout: ProxyRollout, finalizers: list[str]) -> None:
        meta = {"finalizers": finalizers, "resourceVersion": rollout.metadata.resource_version}
        try:
            await self._patch(f"{PROXY_ROLLOUTS}/{name_of(rollout.metadata.name)}", {"metadata": meta})
        except StatusError as error:
            if error.status not in (404, 409):  # gone, or changed meanwhile: the next pass sees
                raise

    async def _record(self, action: Tell, rollout: ProxyRollout) -> None:
        """An Event on the roll-out, and on the Node. Losing one loses nothing else."""
        text = f"node {action.node}: {action.message}" if action.node else action.message
        meta = rollout.metadata
        regarding = [(ObjectReference(API_VERSION, "ProxyRollout", meta.name, uid=meta.uid or ""), text)]
        if action.node is not None:
            # kubectl describe finds a Node's Events by its name in the place of the UID, as the kubelet writes them.
            about = ObjectReference("v1", "Node", action.node, uid=action.node)
            regarding.append((about, f"roll-out {meta.name}: {action.message}"))
        for reference, note in regarding:
            event = Event(
                metadata=EventMetadata(name=f"{reference.name[:200]}.{secrets.token_hex(8)}", namespace="default"),
                event_time=datetime.fromtimestamp(time.time(), UTC)
                .isoformat(timespec="microseconds")
                .replace("+00:00", "Z"),
                reporting_controller=CONTROLLER,
                reporting_instance=self._identity[:128],
                action="Rollout",
                reason=action.reason,
                regarding=reference,
                note=note.encode()[:MAX_NOTE_BYTES].decode(errors="ignore"),
                type="Warning" if action.warning else "Normal",
            )
            await self._cluster.send("POST", "/apis/events.k8s.io/v1/namespaces/default/events", event)

    async def _start_cleanup(self, node: str, pod: dict[str, Any]) -> None:
        """Make the pod. One of its name that people made, as the guide to migrating says, goes first: nobody looks at it."""
        try:
            await self._cluster.send("POST", self._pods, pod)
        except StatusError as error:
            if error.status != 409:
                raise
            path = f"{self._pods}/{cleanup_name(node)}"
            found = await self._cluster.get_as(path, Pod)
            if found is None or (found.metadata.annotations or {}).get(NODE_ANNOTATION) == node:
                return
            if found.metadata.deletion_timestamp is None:
                _log.info("a cleanup that people began goes first", pod=found.metadata.name, node=node)
                await self._cluster.delete(path, uid=found.metadata.uid)

    async def _create(self, path: str, body: dict[str, Any]) -> None:
        try:
            await self._cluster.send("POST", path, body)
        except StatusError as error:
            if error.status != 409:
                raise

    async def _patch(self, path: str, body: dict[str, Any]) -> None:
        await self._cluster.send("PATCH", path, body, MERGE_PATCH)
