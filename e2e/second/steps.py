"""Owns the commands of deploy/docs/migrating.md: found in the document, and run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

from kubernetes.dynamic.exceptions import NotFoundError

from e2e.harness.agents import SYSTEM
from e2e.harness.api import Api
from e2e.harness.pace import scaled
from e2e.harness.waiting import eventually
from hack.kind import parts
from hack.kind.cluster import Cluster

_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_DOCUMENT: Final = _REPOSITORY / "deploy" / "docs" / "migrating.md"
_BLOCK: Final = re.compile(r"^( *)```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_LIMIT: Final = 600.0
LABEL: Final = "nodeproxy.io/proxy"


def blocks(title: str) -> list[str]:
    """The shell commands below a heading of the document, block by block. Raises ValueError where there are none."""
    _, _, rest = _DOCUMENT.read_text().partition(f"\n## {title}\n")
    section = rest.partition("\n## ")[0]
    found = [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in _BLOCK.findall(section)]
    if not found:
        raise ValueError(f"no commands below {title!r} in {_DOCUMENT}")
    return found


class Migration:
    """The way from kube-proxy to nodeproxy and back, as it is documented. Nodes are named."""

    def __init__(self, cluster: Cluster, api: Api) -> None:
        self._cluster = cluster
        self._api = api

    def prepare(self) -> None:
        """Step 1."""
        self._run(self._there()[0])

    def first_node(self, node: str) -> None:
        """Step 2."""
        self._run(self._there()[1], node)

    def all_nodes(self) -> None:
        """Step 3."""
        self._run(self._there()[2])

    def back(self, node: str) -> None:
        """The steps back, of a node."""
        (block,) = blocks("Steps: back to kube-proxy, a node")
        self._run(block, node)

    def make_kube_proxy_again(self) -> None:
        """What goes before the steps back where kube-proxy's DaemonSet is gone."""
        command = ["kubeadm", "init", "phase", "addon", "kube-proxy", "--kubeconfig", "/etc/kubernetes/admin.conf"]
        self._cluster.exec(self._cluster.control_plane, *command, "--config", "/kind/kubeadm.conf")
        self._run(self._there()[0])
        # The pods that kubeadm made before the patch are leaving; `kubectl wait` must not take one for a new one.
        nodes = {node["metadata"]["name"] for node in self._api.list("Node", LABEL, None)}
        eventually(lambda: not nodes & self._nodes_with_kube_proxy(), "kubeadm's pods have left", within=120)

    def _nodes_with_kube_proxy(self) -> set[str]:
        pods = self._api.list("Pod", "k8s-app=kube-proxy", SYSTEM)
        return {pod["spec"].get("nodeName", "") for pod in pods}

    def proxy_of(self, node: str) -> str:
        """The names of the proxies that run on a node."""
        pods = self._api.list("Pod", "k8s-app in (kube-proxy, nodeproxy)", SYSTEM)
        return ", ".join(sorted(pod["metadata"]["labels"]["k8s-app"] for pod in pods if pod["spec"].get("nodeName") == node))

    def wait_for(self, proxy: str, node: str) -> None:
        """Wait until a node has this proxy and no other."""
        eventually(lambda: self.proxy_of(node) == proxy, f"{node} has {proxy} and nothing else", within=120)

    def has(self, name: str) -> bool:
        """Whether a DaemonSet is there."""
        try:
            self._api.get("DaemonSet", name, SYSTEM)
        except NotFoundError:
            return False
        return True

    def kube_proxy_everywhere(self) -> None:
        """Go back from wherever an earlier run ended."""
        if not self.has("kube-proxy"):
            self.make_kube_proxy_again()
        nodes = self._api.list("Node", LABEL, None)
        for node in nodes:
            self.back(node["metadata"]["name"])
        for node in self._api.list("Node", None, None):
            self.wait_for("kube-proxy", node["metadata"]["name"])

    def nodeproxy_everywhere(self) -> None:
        """Go on from wherever an earlier run ended."""
        if self.has("kube-proxy"):
            self.prepare()
            self.all_nodes()

    @staticmethod
    def _there() -> list[str]:
        found = blocks("Steps: kubeadm, and kind")
        assert len(found) == 3, "the document has other steps than this test knows"
        return found

    def _run(self, script: str, node: str = "") -> None:
        """Commands as they stand, with a shell that stops at the first that fails, and says what it does."""
        path = ":".join([*map(str, parts.tools()), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "KUBECONFIG": str(self._cluster.kubeconfig), "NODE": node}
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            cwd=_REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=scaled(_LIMIT),
            check=False,
        )
        print(done.stdout)
        assert done.returncode == 0, f"a command of {_DOCUMENT.name} failed\n{done.stdout}"
