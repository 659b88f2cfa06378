"""`nodeproxy operator` against a real API server, with the rights of deploy/operator; nodes are played (`Fleet`)."""

from __future__ import annotations

import urllib.request

import pytest

from hack.controlplane import ControlPlane
from nodeproxy.sandbox.pace import scaled
from tests.operator.conftest import MakeFleet, OperatorProcess, Rollouts, probe_pods
from tests.operator.fleet import DAEMON_SETS, PROXY_NODES, Faults, eventually

pytestmark = pytest.mark.controlplane


def test_a_mode_comes_to_every_node_and_the_story_is_told(
    cluster: ControlPlane, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    fleet = make_fleet(3)
    rollouts.create("spring", {"mode": "ipvs"}, steps=[1, "100%"], soakSeconds=1)
    status = rollouts.ended("spring", "Completed")
    assert fleet.trail[-3:] == ["n0 mode ipvs", "n1 mode ipvs", "n2 mode ipvs"]
    assert (status["message"], status["progress"], status["stepText"]) == ("3 nodes have mode ipvs", "3/3", "2/2 (100%)")
    assert {line["phase"] for line in status["nodes"]} == {"Updated"}
    assert all(line["before"]["mode"] == "iptables" and line["after"]["mode"] == "ipvs" for line in status["nodes"])
    assert all(line["startedAt"] and line["finishedAt"] for line in status["nodes"])
    conditions = {one["type"]: (one["status"], one["reason"]) for one in status["conditions"]}
    assert conditions == {
        "Accepted": ("True", "Accepted"),
        "Progressing": ("False", "Completed"),
        "Succeeded": ("True", "Completed"),
    }
    eventually(lambda: not rollouts.get("spring")["metadata"].get("finalizers"), "no finalizer is left", scaled(10))
    assert not probe_pods(cluster)
    events = cluster.request("GET", "/apis/events.k8s.io/v1/namespaces/default/events")["items"]
    events = [
        one for one in events if one.get("reportingController") == "nodeproxy.io/operator"
    ]  # the API server has some, too
    told = {(one["regarding"]["kind"], one["regarding"]["name"], one["reason"]) for one in events}
    assert {
        ("Node", "n1", "NodeUpdated"),
        ("ProxyRollout", "spring", "Started"),
        ("ProxyRollout", "spring", "Completed"),
    } <= told
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{operator.port}/metrics").read().decode()
    assert 'nodeproxy_rollout_nodes_total{phase="Updated"} 3.0' in metrics
    assert "nodeproxy_rollout_node_duration_seconds_count 3.0" in metrics
    assert "nodeproxy_operator_leader 1.0" in metrics
    assert 'nodeproxy_rollouts{phase="Completed"} 1.0' in metrics
    assert "[warning" not in operator.log() and "[error" not in operator.log(), operator.log()


@pytest.mark.parametrize("fault", ["no_ipvs", "lies"])
def test_a_bad_first_node_is_caught_and_taken_back(
    rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess, fault: str
) -> None:
    fleet = make_fleet(2)
    fleet.faults["n0"] = Faults(**{fault: True})
    rollouts.create("spring", {"mode": "ipvs"})
    status = rollouts.ended("spring", "Failed")
    said = {
        "no_ipvs": "node n0: the agent says: mode ipvs: the kernel has no ip_vs",
        "lies": "node n0: 20 of 20 probes through nodeproxy-probe failed: no answer within 2 s",
    }
    assert status["message"].startswith(said[fault])
    assert rollouts.phases("spring") == {"n0": "RolledBack", "n1": "Waiting"}
    assert fleet.modes.get("n0", "iptables") == "iptables"


def test_an_image_goes_pod_by_pod_and_a_broken_one_is_caught(
    cluster: ControlPlane, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    fleet = make_fleet(3)
    fleet.broken_images.add("nodeproxy:broken")
    rollouts.create("bad", {"image": "nodeproxy:broken"}, timeouts={"nodeReadySeconds": 5})
    status = rollouts.ended("bad", "Failed")
    assert status["message"] == (
        "node n0: not ready within 5 s: the agent's pod is not ready: ImagePullBackOff (no such image)"
    )
    assert [one for one in fleet.trail if "nodeproxy:broken" in one] == ["n0 image nodeproxy:broken"]

    rollouts.create("good", {"image": "nodeproxy:2"}, steps=["100%"], maxParallel=2)
    rollouts.ended("good", "Completed")
    found = cluster.request("GET", f"{DAEMON_SETS}/nodeproxy")["spec"]
    assert found["template"]["spec"]["containers"][0]["image"] == "nodeproxy:2"
    assert found["updateStrategy"]["type"] == "RollingUpdate"
    assert sorted(one for one in fleet.trail if "nodeproxy:2" in one) == [f"n{i} image nodeproxy:2" for i in range(3)]


def test_pods_whose_images_a_webhook_rewrites_are_told_by_their_template(
    cluster: ControlPlane, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    fleet = make_fleet(2, mirror="mirror.example/")
    rollouts.create("good", {"image": "nodeproxy:2"}, steps=["100%"])
    status = rollouts.ended("good", "Completed")
    assert sorted(one for one in fleet.trail if "nodeproxy:2" in one) == [f"n{i} image nodeproxy:2" for i in range(2)]
    images = {(line["before"]["image"], line["after"]["image"]) for line in status["nodes"]}
    assert images == {("nodeproxy:1", "nodeproxy:2")}


def test_an_agent_that_dies_in_the_soak_time_holds_it_up(
    rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    fleet = make_fleet(2)
    rollouts.create("spring", {"mode": "ipvs"}, steps=["100%"], soakSeconds=2)
    rollouts.until("spring", "it soaks", lambda status: status.get("phase") == "Soaking")
    fleet.faults["n0"] = Faults(dead=True)
    said = "node n0: nodeproxy's pod is not ready: ImagePullBackOff (no such image); looking again"
    rollouts.until("spring", "it is seen", lambda status: status.get("message") == said)
    del fleet.faults["n0"]
    rollouts.ended("spring", "Completed")


def test_nodes_move_from_kube_proxy_and_back(
    cluster: ControlPlane, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    make_fleet(2, by_label=True, labelled=False)
    rollouts.create("there", {"proxy": "nodeproxy", "mode": "ipvs"}, steps=["100%"])
    rollouts.ended("there", "Completed")
    assert {line["after"]["mode"] for line in rollouts.status("there")["nodes"]} == {"ipvs"}
    rollouts.create("back", {"proxy": "kube-proxy"}, steps=["100%"])
    rollouts.ended("back", "Completed")
    nodes = cluster.request("GET", "/api/v1/nodes")["items"]
    assert not any("nodeproxy.io/proxy" in node["metadata"].get("labels", {}) for node in nodes)
    eventually(lambda: not cluster.request("GET", PROXY_NODES)["items"], "nobody is told anything", scaled(10))
    pods = "/api/v1/namespaces/kube-system/pods?labelSelector=app.kubernetes.io/name%3Dnodeproxy-cleanup"
    eventually(lambda: not cluster.request("GET", pods)["items"], "the cleanup pods are gone", scaled(10))


def test_overlapping_paused_edited_and_aborted(rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess) -> None:
    fleet = make_fleet(3)
    rollouts.create("spring", {"mode": "ipvs"}, steps=[1, 2, "100%"], soakSeconds=3600)
    rollouts.until("spring", "it soaks", lambda status: status.get("phase") == "Soaking")
    rollouts.create("summer", {"mode": "iptables"}, nodes={"names": ["n2"]})
    refused = rollouts.ended("summer", "Failed")
    assert refused["message"] == "refused: node n2 belongs to roll-out spring, which has not ended"
    (accepted,) = (one for one in refused["conditions"] if one["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "Overlaps")

    rollouts.edit("spring", paused=True)
    rollouts.until("spring", "it is paused", lambda status: status.get("phase") == "Paused")
    rollouts.edit("spring", steps=[2, "100%"], paused=False)
    rollouts.until("spring", "the second node is done", lambda status: status["counts"]["updated"] == 2)
    rollouts.edit("spring", abort="Rollback")
    rollouts.ended("spring", "Aborted")
    assert rollouts.phases("spring") == {"n0": "RolledBack", "n1": "RolledBack", "n2": "Waiting"}
    assert {fleet.modes[name] for name in ("n0", "n1")} == {"iptables"} and "n2" not in fleet.modes


def test_deleted_half_way_it_stops_where_it_is(
    cluster: ControlPlane, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    fleet = make_fleet(3)
    fleet.faults["n1"] = Faults(deaf=True)
    rollouts.create("spring", {"mode": "ipvs"}, steps=["100%"])
    rollouts.until("spring", "the first is done", lambda status: status.get("counts", {}).get("updated") == 1)
    rollouts.delete("spring")
    eventually(lambda: not rollouts.there("spring"), "it is gone", scaled(20))
    assert fleet.modes == {"n0": "ipvs"}
    found = {one["metadata"]["name"]: one["spec"].get("mode") for one in cluster.request("GET", PROXY_NODES)["items"]}
    assert found["n0"] == "ipvs" and "ipvs" not in (found.get("n1"), found.get("n2"))
    eventually(lambda: not probe_pods(cluster), "no probe is left", scaled(10))


def test_a_node_that_goes_and_one_that_never_is_ready(
    cluster: ControlPlane, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    fleet = make_fleet(3)
    fleet.set_ready("n1", False)
    fleet.faults["n0"] = Faults(deaf=True)
    rollouts.create("spring", {"mode": "ipvs"}, steps=["100%"], timeouts={"nodeReadySeconds": 5})
    rollouts.until("spring", "the first is looked at", lambda _: rollouts.phases("spring").get("n0") == "Checking")
    cluster.request("DELETE", "/api/v1/nodes/n0")
    rollouts.until("spring", "it is not waited for", lambda _: rollouts.phases("spring").get("n0") == "Gone")
    fleet.add_node("n0")  # another one of this name
    status = rollouts.ended("spring", "Failed")
    assert status["message"] == "node n1: not well before anything was changed: not ready within 5 s: the node is not Ready"
    assert rollouts.phases("spring") == {"n0": "Gone", "n1": "Failed", "n2": "Updated"}
    eventually(lambda: not rollouts.get("spring")["metadata"].get("finalizers"), "nothing is left to be done", scaled(20))
    told = {one["metadata"]["name"]: one for one in cluster.request("GET", PROXY_NODES)["items"]}
    assert "n0" not in told
    (owner,) = told["n2"]["metadata"]["ownerReferences"]
    node = cluster.request("GET", "/api/v1/nodes/n2")
    assert (owner["kind"], owner["uid"]) == ("Node", node["metadata"]["uid"])


def test_the_role_holds_nothing_to_spare(cluster: ControlPlane) -> None:
    """What the tests above need is there; this is that there is no more."""
    account = cluster.service_account_access("kube-system", "nodeproxy-operator")
    review = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
    allowed: dict[str, dict[tuple[str, str, tuple[str, ...]], set[str]]] = {}
    for namespace in ("default", "kube-system"):
        answer = account.request("POST", review, {**kind, "spec": {"namespace": namespace}})
        found = allowed.setdefault(namespace, {})
        for rule in answer["status"]["resourceRules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    if group not in ("authorization.k8s.io", "authentication.k8s.io"):
                        key = (group, resource, tuple(rule.get("resourceNames", ())))
                        found.setdefault(key, set()).update(rule["verbs"])
    everywhere = {
        ("nodeproxy.io", "proxyrollouts", ()): {"list", "watch", "patch"},
        ("nodeproxy.io", "proxyrollouts/status", ()): {"update"},
        ("nodeproxy.io", "proxynodes", ()): {"get", "list", "watch", "create", "patch", "delete"},
        ("", "nodes", ()): {"get", "list", "patch"},
        ("", "services", ()): {"list"},
        ("discovery.k8s.io", "endpointslices", ()): {"list"},
        ("events.k8s.io", "events", ()): {"create"},
    }
    assert allowed["default"] == everywhere
    assert allowed["kube-system"] == everywhere | {
        ("", "pods", ()): {"get", "list", "create", "delete"},
        ("", "services", ("nodeproxy-probe",)): {"get"},
        ("apps", "daemonsets", ("nodeproxy", "kube-proxy")): {"get"},
        ("apps", "daemonsets", ("nodeproxy",)): {"patch"},
        ("coordination.k8s.io", "leases", ()): {"create"},
        ("coordination.k8s.io", "leases", ("nodeproxy-operator",)): {"get", "update"},
    }
