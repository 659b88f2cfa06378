"""Owns the agents of a cluster, from outside: the DaemonSet, its pods, the rules that they keep on their nodes."""

from __future__ import annotations

import time
from typing import Final

import yaml

from e2e.harness.api import Api
from e2e.harness.objects import Object
from e2e.harness.settings import MODE
from e2e.harness.stage import is_ready
from e2e.harness.waiting import eventually
from hack.kind.cluster import Cluster

SYSTEM: Final = "kube-system"
NAME: Final = "nodeproxy"
ROLL_OUT: Final = 240.0
_TABLES: Final = ("nat", "filter", "mangle")
_OTHERS: Final = ("KUBE-KUBELET-CANARY", "KUBE-FIREWALL", "KUBE-IPTABLES-HINT", "KUBE-PROXY-CANARY")


class Agents:
    """The agents of the cluster that tests run against."""

    def __init__(self, cluster: Cluster, api: Api) -> None:
        self._cluster = cluster
        self._api = api

    def pod(self, node: str) -> Object:
        """The agent's pod on a node; where one is being replaced, the new one."""
        pods = self._api.list("Pod", f"k8s-app={NAME}", SYSTEM)
        here = [pod for pod in pods if pod["spec"].get("nodeName") == node]
        here.sort(key=lambda pod: (bool(pod["metadata"].get("deletionTimestamp")), pod["metadata"]["creationTimestamp"]))
        assert here, f"no pod of the agent on {node}"
        return here[0]

    def restarts(self, node: str) -> int:
        """How often its container was started again."""
        statuses = self.pod(node)["status"].get("containerStatuses") or [{"restartCount": 0}]
        return int(statuses[0]["restartCount"])

    def kill(self, node: str) -> None:
        """SIGKILL to the agent's process on a node."""
        container = self._cluster.exec(node, "crictl", "ps", "--quiet", "--name", f"^{NAME}$").split()[0]
        pid = self._cluster.exec(
            node, "crictl", "inspect", "--output", "go-template", "--template", "{{.info.pid}}", container
        )
        self._cluster.exec(node, "kill", "-KILL", pid.strip())

    def wait_ready(self, node: str, *, restarts: int = 0, within: float = 90.0) -> None:
        """Wait until the agent on a node is ready, and was started again at least so many times."""
        eventually(
            lambda: is_ready(self.pod(node)) and self.restarts(node) >= restarts, f"agent on {node} is ready", within=within
        )

    def roll_out(self, image: str) -> None:
        """Give all agents another image, one after the other, and wait until all of them run it."""
        self._cluster.kubectl("-n", SYSTEM, "set", "image", f"daemonset/{NAME}", f"{NAME}={image}")
        self.wait_rolled_out()
        images = {
            pod["spec"]["containers"][0]["image"]
            for pod in self._api.list("Pod", f"k8s-app={NAME}", SYSTEM)
            if not pod["metadata"].get("deletionTimestamp")
        }
        assert images == {image}

    def wait_rolled_out(self, within: float = ROLL_OUT) -> None:
        """Wait until the DaemonSet says that all its pods are new and available."""

        def done() -> bool:
            found = self._api.get("DaemonSet", NAME, SYSTEM)
            status, wanted = found["status"], found["metadata"]["generation"]
            number = status["desiredNumberScheduled"]
            counts = (status.get("updatedNumberScheduled", 0), status.get("numberAvailable", 0))
            assert status["observedGeneration"] == wanted and counts == (number, number), status
            return bool(number > 0)

        eventually(done, "all agents are new and available", within=within, poll=0.5)

    def configure(self, **fields: object) -> None:
        """Change fields of the configuration in the ConfigMap, and have kubelet bring it to the nodes at once.

        Kubelet looks at a pod's volumes about once a minute, and whenever the pod object changes.
        """
        found = self._api.get("ConfigMap", NAME, SYSTEM)
        (file,) = found["data"]
        document = {**yaml.safe_load(found["data"][file]), **fields}
        document = {name: value for name, value in document.items() if value is not None}
        self._api.patch("ConfigMap", NAME, {"data": {file: yaml.safe_dump(document)}}, SYSTEM)
        for pod in self._api.list("Pod", f"k8s-app={NAME}", SYSTEM):
            annotations = {"nodeproxy.e2e/look-again": f"{time.time():.3f}"}
            self._api.patch("Pod", pod["metadata"]["name"], {"metadata": {"annotations": annotations}}, SYSTEM)

    def configuration(self) -> dict[str, object]:
        """What the ConfigMap says."""
        (text,) = self._api.get("ConfigMap", NAME, SYSTEM)["data"].values()
        found: dict[str, object] = yaml.safe_load(text)
        return found

    def variant(self, node: str) -> str:
        """Which iptables the agent of a node writes to: `iptables-nft` or `iptables-legacy`."""
        found = [tool for tool in ("iptables-nft", "iptables-legacy") if ":KUBE-SERVICES " in self._save(node, tool, "nat")]
        if MODE == "ipvs" and not found:
            found = [tool for tool in ("iptables-nft", "iptables-legacy") if "KUBE-" in self._save(node, tool, "nat")]
        assert len(found) == 1, f"rules of Services in {found} on {node}"
        return found[0]

    def rules(self, node: str) -> list[str]:
        """The lines of iptables-save about the agent's chains on a node, without counters, in an order of their own."""
        tool = self.variant(node)
        lines = [line.split(" [")[0] for table in _TABLES for line in self._save(node, tool, table).splitlines()]
        return sorted(line for line in lines if "KUBE-" in line and not any(other in line for other in _OTHERS))

    def flush(self, node: str) -> None:
        """Take away every rule and chain named KUBE-… of a node, each table at once; all others stay as they are."""
        tool = self.variant(node)
        for table in _TABLES:
            kept = [line for line in self._save(node, tool, table).splitlines() if "KUBE-" not in line]
            self._cluster.exec(node, "sh", "-c", f"{tool}-restore --table={table} <<'END'\n" + "\n".join(kept) + "\nEND")

    def _save(self, node: str, tool: str, table: str) -> str:
        return self._cluster.exec(node, f"{tool}-save", "-t", table)
