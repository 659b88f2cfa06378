"""Health-check node ports of a whole agent, asked from outside as a load balancer does."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from nodeproxy.sandbox.client import NoListener, Rejected
from nodeproxy.sandbox.namespace import Namespace

from .conftest import POD_A
from .world import NODE_ADDRESS, World, ask, endpoint_slice, names, service

pytestmark = pytest.mark.kernel

PORT = 32123
GONE = {str(NoListener()), str(Rejected())}


def balanced(**spec: Any) -> dict[str, Any]:
    made = service(nodePort=30080, externalTrafficPolicy="Local", healthCheckNodePort=PORT, **spec)
    made["spec"]["type"] = "LoadBalancer"
    made["status"] = {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}}
    return made


def get(where: Namespace, port: int = PORT) -> tuple[int, dict[str, str], Any]:
    """GET any path: status, headers, decoded body."""

    def request() -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection(NODE_ADDRESS, port, timeout=5)
        try:
            connection.request("GET", "/anything")
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), json.loads(answer.read())
        finally:
            connection.close()

    return where.run(request)


def test_a_load_balancer_learns_where_endpoints_are(world: World) -> None:
    world.put("web", balanced(), endpoint_slice([POD_A]))
    outside = world.box.outside
    with world.agent:
        world.settle(lambda: names(ask(outside, NODE_ADDRESS, PORT)) - GONE != set(), "the port is served")
        status, headers, body = get(outside)
        assert (status, headers["X-Load-Balancing-Endpoint-Weight"]) == (200, "1")
        assert headers["Content-Type"] == "application/json"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert body == {"service": {"namespace": "test", "name": "web"}, "localEndpoints": 1, "serviceProxyHealthy": True}
        world.put("web", balanced(), endpoint_slice([]))
        world.settle(lambda: get(outside)[0] == 503, "no endpoint, not healthy")
        assert get(outside)[2]["localEndpoints"] == 0
        moved = balanced()
        moved["spec"]["healthCheckNodePort"] = PORT + 1
        world.put("web", moved, endpoint_slice([POD_A]))
        world.settle(lambda: names(ask(outside, NODE_ADDRESS, PORT)) <= GONE, "the old port is closed")
        world.settle(lambda: get(outside, PORT + 1)[0] == 200, "the new one is served")
        world.remove("web")
        world.settle(lambda: names(ask(outside, NODE_ADDRESS, PORT + 1)) <= GONE, "closed with the Service")
