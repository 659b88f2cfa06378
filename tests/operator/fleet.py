"""Nodes without kubelets: a thread does at a real API server what kubelets, the DaemonSet controller and agents would."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import urllib3

from hack.controlplane import ControlPlane
from hack.controlplane.access import ApiError, Json
from nodeproxy.operator.probe import Result, message

MERGE = "application/merge-patch+json"
SYSTEM = "/api/v1/namespaces/kube-system"
DAEMON_SETS = "/apis/apps/v1/namespaces/kube-system/daemonsets"
PROXY_NODES = "/apis/nodeproxy.io/v1alpha1/proxynodes"
LABEL = "nodeproxy.io/proxy"
_SECONDS = 0.1


def daemon_set(name: str, image: str, *, by_label: bool) -> Json:
    """The DaemonSets of the agent and of kube-proxy, as far as it matters here."""
    pod: Json = {"containers": [{"name": name, "image": image}]}
    if by_label:
        pod["nodeSelector"] = {LABEL: "nodeproxy"}
    labels = {"k8s-app": name}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": name}, "spec": spec}


@dataclass
class Faults:
    """What is wrong with a node. `lies`: in sync and audited, but connections fail once its mode is ipvs. `dead`: its pods
    are not Ready, and its agent says nothing new."""

    no_ipvs: bool = False
    lies: bool = False
    deaf: bool = False
    dead: bool = False


class KeptAlive:
    """Requests as administrator through connections that stay open: the fleet makes thousands."""

    def __init__(self, cluster: ControlPlane) -> None:
        self._access = cluster.access
        self._pool = urllib3.PoolManager(ca_certs=str(self._access.ca), retries=False)

    def request(self, method: str, path: str, body: Json | None = None, *, content_type: str = "application/json") -> Json:
        """As that of `ControlPlane`."""
        headers = {**self._access.headers, "Content-Type": content_type}
        payload = None if body is None else json.dumps(body).encode()
        response = self._pool.request(method, self._access.url + path, body=payload, headers=headers)
        if response.status >= 400:
            raise ApiError(method, path, response.status, response.data.decode())
        answer: Json = json.loads(response.data)
        return answer


@dataclass
class Fleet:
    """The nodes of a cluster, until `stop`."""

    cluster: ControlPlane
    names: list[str]
    faults: dict[str, Faults] = field(default_factory=dict)
    broken_images: set[str] = field(default_factory=set)
    mirror: str = ""
    """A webhook puts this before the image of each pod that comes, and a sidecar before its container."""
    modes: dict[str, str] = field(default_factory=dict)
    trail: list[str] = field(default_factory=list)
    """What happened to nodes, in order: `n1 mode ipvs`, `n1 image x`, `n1 label kube-proxy`."""
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._api = KeptAlive(self.cluster)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._pods = 0

    def start(self, *, by_label: bool = False, labelled: bool = True) -> None:
        """Make Nodes and DaemonSets, and wait until the agents run."""
        for name in self.names:
            self.add_node(name, labelled=labelled)
        for one in (
            daemon_set("nodeproxy", "nodeproxy:1", by_label=by_label),
            daemon_set("kube-proxy", "kube-proxy:1", by_label=False),
        ):
            self._api.request("POST", DAEMON_SETS, one)
        self._thread.start()

    def add_node(self, name: str, *, labelled: bool = True) -> None:
        """Make a Node, Ready."""
        labels = {LABEL: "nodeproxy"} if labelled else {}
        self._api.request("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": labels}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "192.0.2.7"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        self._api.request("PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, content_type=MERGE)

    def set_ready(self, name: str, ready: bool) -> None:
        """As the node controller does where a kubelet is not heard of."""
        status = {"conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}]}
        body = {"status": status}
        strategic = "application/strategic-merge-patch+json"
        self._api.request("PATCH", f"/api/v1/nodes/{name}/status", body, content_type=strategic)

    def stop(self) -> None:
        """End the thread, and remove everything."""
        self._stop.set()
        self._thread.join()
        for path in (DAEMON_SETS, f"{SYSTEM}/pods", "/api/v1/nodes", PROXY_NODES):
            for item in self._api.request("GET", path)["items"]:
                with contextlib.suppress(ApiError):
                    self._api.request("DELETE", f"{path}/{item['metadata']['name']}", {"gracePeriodSeconds": 0})
        assert not self.errors, self.errors

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._once()
            except ApiError as error:
                if error.status not in (404, 409, 429):  # 429: the watch cache is being filled
                    self.errors.append(error)
            except (OSError, urllib3.exceptions.HTTPError):
                pass  # the API server is being restarted
            time.sleep(_SECONDS)

    def _once(self) -> None:
        pods = self._api.request("GET", f"{SYSTEM}/pods")["items"]
        nodes = {node["metadata"]["name"]: node for node in self._api.request("GET", "/api/v1/nodes")["items"]}
        sets = {one["metadata"]["name"]: one for one in self._api.request("GET", DAEMON_SETS)["items"]}
        for pod in pods:
            self._kubelet(pod, nodes)
        by_label = "nodeSelector" in sets.get("nodeproxy", {"spec": {"template": {"spec": {}}}})["spec"]["template"]["spec"]
        for name, one in sets.items():
            self._control(name, one, pods, nodes, by_label)
        for item in self._api.request("GET", PROXY_NODES)["items"]:
            self._agent(item, pods, nodes)

    def _kubelet(self, pod: Json, nodes: dict[str, Json]) -> None:
        name, labels = pod["metadata"]["name"], pod["metadata"].get("labels", {})
        if "deletionTimestamp" in pod["metadata"]:
            self._pod("DELETE", name, {"gracePeriodSeconds": 0})
            return
        node = pod["spec"].get("nodeName")
        if node not in nodes or not _ready(nodes[node]):
            return
        status = pod.get("status", {})
        if labels.get("k8s-app") == "nodeproxy-probe-client":
            if status.get("phase") != "Succeeded":
                self._ended(pod, self._probe(pod, labels["nodeproxy.io/verification"]))
        elif labels.get("app.kubernetes.io/name") == "nodeproxy-cleanup":
            if status.get("phase") != "Succeeded":
                self._ended(pod, "")
        elif not status.get("conditions") or (self._faults(node).dead == _ready(pod)):
            good = _image(pod["spec"]) not in self.broken_images and not self._faults(node).dead
            if bool(status.get("conditions")) and good == _ready(pod):
                return
            waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
            state = {"running": {}} if good else waiting
            self._set(
                name,
                {
                    "phase": "Running" if good else "Pending",
                    "conditions": [{"type": "Ready", "status": "True" if good else "False"}],
                    "containerStatuses": [_container(pod, state, good)],
                },
            )

    def _probe(self, pod: Json, verification: str) -> str:
        """What its connections come to."""
        arguments = pod["spec"]["containers"][0]["args"]
        count = next(int(one.partition("=")[2]) for one in arguments if one.startswith("--count="))
        # The node under test is that of the pod whose name ends so.
        node = self._api.request("GET", f"{SYSTEM}/pods/nodeproxy-probe-{verification}-from")["spec"]["nodeName"]
        bad = self._faults(node).lies and self.modes.get(node) == "ipvs"
        destinations = [one for one in arguments if one.startswith(("--named=", "--target="))]
        result = Result(count, count if bad else 0, None if bad else 0.4, "no answer within 2 s" if bad else None)
        return message([result] * len(destinations)).decode()

    def _ended(self, pod: Json, text: str) -> None:
        state = {"terminated": {"exitCode": 0, "reason": "Completed", "message": text}}
        self._set(pod["metadata"]["name"], {"phase": "Succeeded", "containerStatuses": [_container(pod, state, False)]})

    def _control(self, name: str, one: Json, pods: list[Json], nodes: dict[str, Json], by_label: bool) -> None:
        """One DaemonSet."""
        generation = one["metadata"]["annotations"]["deprecated.daemonset.template.generation"]
        mine = [pod for pod in pods if pod["metadata"].get("labels", {}).get("k8s-app") == name]
        rolling = one["spec"]["updateStrategy"]["type"] == "RollingUpdate"
        desired = updated = 0
        for node in nodes.values():
            labelled = node["metadata"].get("labels", {}).get(LABEL) == "nodeproxy"
            wanted = (labelled or not by_label) if name == "nodeproxy" else by_label and not labelled
            here = [pod for pod in mine if pod["spec"].get("nodeName") == node["metadata"]["name"]]
            desired += wanted
            for pod in here:
                current = pod["metadata"]["labels"]["pod-template-generation"] == generation
                updated += current
                if "deletionTimestamp" not in pod["metadata"] and (not wanted or (rolling and not current)):
                    self._pod("DELETE", pod["metadata"]["name"], None)
            if wanted and not here:
                self._make(name, node["metadata"]["name"], one["spec"]["template"], generation)
        status = {
            "observedGeneration": one["metadata"]["generation"],
            "currentNumberScheduled": desired,
            "desiredNumberScheduled": desired,
            "updatedNumberScheduled": updated,
            "numberMisscheduled": 0,
            "numberReady": desired,
        }
        if any(one.get("status", {}).get(key, 0) != value for key, value in status.items()):
            self._api.request("PATCH", f"{DAEMON_SETS}/{name}/status", {"status": status}, content_type=MERGE)

    def _make(self, name: str, node: str, template: Json, generation: str) -> None:
        self._pods += 1
        spec = {**template["spec"], "nodeName": node, "automountServiceAccountToken": False}
        if self.mirror:
            rewritten = [{**one, "image": self.mirror + one["image"]} for one in spec["containers"]]
            spec["containers"] = [{"name": "sidecar", "image": "mesh:1"}, *rewritten]
        labels = {**template["metadata"]["labels"], "pod-template-generation": generation}
        meta = {"name": f"{name}-{self._pods}", "labels": labels}
        self._pod("POST", "", {"metadata": meta, "spec": spec})
        self.trail.append(f"{node} image {template['spec']['containers'][0]['image']}")

    def _agent(self, item: Json, pods: list[Json], nodes: dict[str, Json]) -> None:
        node = item["metadata"]["name"]
        faults = self._faults(node)
        runs = any(
            pod["spec"].get("nodeName") == node
            and pod["metadata"].get("labels", {}).get("k8s-app") == "nodeproxy"
            and _image(pod["spec"]) not in self.broken_images
            for pod in pods
        )
        if faults.deaf or faults.dead or not runs or node not in nodes or not _ready(nodes[node]):
            return
        spec = item.get("spec", {})
        mode = spec.get("mode", "iptables")
        present = self.modes.get(node, "iptables")
        said = None
        if mode == "ipvs" and faults.no_ipvs:
            mode, said = present, "mode ipvs: the kernel has no ip_vs"
        if mode != present:
            self.modes[node] = mode
            self.trail.append(f"{node} mode {mode}")
        status: Json = {
            "observedGeneration": item["metadata"]["generation"],
            "mode": mode,
            "version": "0.1.0",
            "inSync": True,
            "audit": {"clean": True},
            "message": said,
        }
        if "verification" in spec:
            status["verification"] = {"id": spec["verification"], "syncErrors": 0, "syncP99Seconds": 0.01}
        old = item.get("status", {})
        if any(old.get(key) != value for key, value in status.items()):
            self._api.request("PATCH", f"{PROXY_NODES}/{node}/status", {"status": status}, content_type=MERGE)

    def _faults(self, node: str) -> Faults:
        return self.faults.get(node, Faults())

    def _pod(self, method: str, name: str, body: Json | None) -> None:
        with contextlib.suppress(ApiError):
            self._api.request(method, f"{SYSTEM}/pods/{name}".rstrip("/"), body)

    def _set(self, name: str, status: Json) -> None:
        self._api.request("PATCH", f"{SYSTEM}/pods/{name}/status", {"status": status}, content_type=MERGE)


def _image(spec: Json) -> str:
    image: str = next(one["image"] for one in spec["containers"] if one["name"] != "sidecar")
    return image


def _container(pod: Json, state: Json, ready: bool) -> Json:
    one = pod["spec"]["containers"][0]
    return {"name": one["name"], "image": one["image"], "imageID": "", "ready": ready, "restartCount": 0, "state": state}


def _ready(node: Json) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in node["status"].get("conditions", []))


def eventually(look: Callable[[], Any], what: str, seconds: float) -> Any:
    """Look until it is so; what is found then."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return found
