"""Owns `make compare`: `nodeproxy compare`, on 2,000 made-up Services where no cluster state is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from hack.controlplane.load import Shape, node

SERVICES: Final = 2000
NODE: Final = "this-node"
_STATES: Final = ("--snapshot", "--manifests", "--kubeconfig", "--master", "--config", "--help", "-h")
_FLAGS: Final = ("--hostname-override", NODE, "--cluster-cidr", "10.128.0.0/9")
_NODE_PORTS: Final = range(30000, 32700)


def objects(services: int) -> Iterator[dict[str, Any]]:
    """A node, and Services with 10 endpoints each: every tenth has a node port, every twentieth session affinity."""
    shape = Shape(services=services, endpoints=10, node_ports=0.1, nodes=(NODE, "node-1", "node-2", "node-3"))
    yield node(NODE, ["192.168.0.2"])
    for number in shape.numbers:
        service = shape.service(number)
        if service["spec"]["type"] == "NodePort":
            service["spec"]["ports"][0]["nodePort"] = _NODE_PORTS[number // 10 % len(_NODE_PORTS)]
        if number % 20 == 3:
            service["spec"]["sessionAffinity"] = "ClientIP"
        yield service
        yield from shape.slices(number)


def main() -> int:
    """Exit status of `nodeproxy compare`."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        print(f"Takes {SERVICES:,} made-up Services unless ARGS name a cluster state. ARGS are those of:\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="nodeproxy-compare-") as directory:
        if not any(word.partition("=")[0] in _STATES for word in arguments):
            items = {"apiVersion": "v1", "kind": "List", "items": list(objects(SERVICES))}
            Path(directory, "objects.json").write_text(json.dumps(items))
            arguments = ["--manifests", directory, *_FLAGS, *arguments]
        program = Path(sys.executable).with_name("nodeproxy")
        search = {"PATH": f"{program.parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        return subprocess.run([program, "compare", *arguments], check=False, env=os.environ | search).returncode


if __name__ == "__main__":
    sys.exit(main())
