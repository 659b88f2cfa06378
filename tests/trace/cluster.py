"""Cluster state for traces, as API objects in JSON, and the node's view of it. No kernel."""

from __future__ import annotations

from typing import Any

import msgspec

from nodeproxy.api.objects import EndpointSlice, Service
from nodeproxy.cluster.names import IPProtocol
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.snapshot.model import Snapshot
from nodeproxy.snapshot.view import NodeView
from nodeproxy.trace.ends import Several, read_sender, read_targets
from nodeproxy.trace.results import Trace
from nodeproxy.trace.tracer import Tracer

ZONE = "a"
NODE = {
    "metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": ZONE}},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.2"}]},
}


def service(name: str = "web", **spec: Any) -> Service:
    given = {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}], **spec}
    return msgspec.convert({"metadata": {"name": name, "namespace": "shop"}, "spec": given}, Service)


def slice_of(
    *endpoints: dict[str, Any], name: str = "web-1", family: str = "IPv4", ports: Any = None, owner: str = "web"
) -> EndpointSlice:
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": owner}},
            "addressType": family,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}] if ports is None else ports,
            "endpoints": list(endpoints),
        },
        EndpointSlice,
    )


def endpoint(address: str, node: str = "there", *, ready: bool = True, **more: Any) -> dict[str, Any]:
    conditions = {"ready": ready, **{key: more.pop(key) for key in ("serving", "terminating") if key in more}}
    return {"addresses": [address], "nodeName": node, "conditions": conditions, **more}


def view(*objects: Any, **config: Any) -> NodeView:
    from nodeproxy.api.objects import Node

    settings = {"node_name": "here", "cluster_cidrs": ("10.0.0.0/16",), **config}
    return NodeView(
        Snapshot(
            objects=(*objects, msgspec.convert(NODE, Node)),
            refused=(),
            config=AgentConfig(**settings),
            node_addresses=("192.168.0.2",),
            taken="2026-01-01T00:00:00Z",
            origin="test",
        )
    )


def trace_one(of: NodeView, source: str, destination: str, protocol: IPProtocol | None = None) -> Trace:
    """The one trace that a source and destination come to, offline."""
    sender = read_sender(source)
    targets = read_targets(destination, protocol, of, sender.address.family if sender.address else None)
    assert not isinstance(targets, Several), targets
    [target] = targets
    return Tracer(of, None, "offline").trace(source, target)
