"""The API server of the benchmark that has no etcd: what agents ask for, it answers."""

from __future__ import annotations

import json
from typing import Any

from aiohttp.test_utils import TestClient, TestServer

from hack.bench.static_api import StaticApi

SERVICES_PATH = "/api/v1/services"


def made_service(name: str, **labels: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "load", "labels": labels}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": f"10.96.0.{len(name)}"}}


def names_in(answer: dict[str, Any]) -> list[str]:
    return [item["metadata"]["name"] for item in answer["items"]]


async def test_the_static_api_server_lists_what_selectors_accept() -> None:
    app = StaticApi([made_service("a"), made_service("bb", proxy="other"), made_service("ccc", proxy="mine")]).application()
    async with TestClient(TestServer(app)) as client:
        for query, names in (
            ({}, ["a", "bb", "ccc"]),
            ({"labelSelector": "!proxy"}, ["a"]),
            ({"labelSelector": "proxy,proxy!=mine"}, ["bb"]),
            ({"labelSelector": "proxy=mine", "limit": "1"}, ["ccc"]),
            ({"fieldSelector": "spec.clusterIP!=10.96.0.1"}, ["bb", "ccc"]),
            ({"fieldSelector": "metadata.name=bb"}, ["bb"]),
        ):
            answer = await (await client.get(SERVICES_PATH, params=query)).json()
            assert names_in(answer) == names, query
            assert answer["metadata"] == {"resourceVersion": "3"}
        empty = await (await client.get("/apis/networking.k8s.io/v1/servicecidrs")).json()
        assert (empty["kind"], empty["apiVersion"], empty["items"]) == ("ServiceCIDRList", "networking.k8s.io/v1", [])


async def test_the_static_api_server_tells_watchers_of_changes() -> None:
    app = StaticApi([made_service("a"), made_service("bb")]).application()
    async with TestClient(TestServer(app)) as client:
        listing = {"watch": "true", "sendInitialEvents": "true", "labelSelector": "!other", "timeoutSeconds": "60"}
        resuming = {"watch": "1", "resourceVersion": "1", "timeoutSeconds": "60"}
        async with (
            client.get(SERVICES_PATH, params=listing) as listed,
            client.get(SERVICES_PATH, params=resuming) as resumed,
        ):
            events = [json.loads(await listed.content.readline()) for _ in range(3)]
            assert [event["type"] for event in events] == ["ADDED", "ADDED", "BOOKMARK"]
            assert events[2]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
            assert json.loads(await resumed.content.readline())["object"]["metadata"]["name"] == "bb"
            for item in (made_service("a", other="yes"), made_service("a", changed="yes")):
                path = "/api/v1/namespaces/load/services/a"
                assert (await client.put(path, json=item)).status == 200
            event = json.loads(await listed.content.readline())
            assert (event["type"], event["object"]["metadata"]["labels"]) == ("MODIFIED", {"changed": "yes"})
            assert json.loads(await resumed.content.readline())["object"]["metadata"]["resourceVersion"] == "3"
        ended = await client.get(SERVICES_PATH, params={"watch": "true", "timeoutSeconds": "0.1"})
        assert await ended.read() == b""
