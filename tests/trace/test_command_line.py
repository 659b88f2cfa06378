"""The command `nodeproxy trace` as people run it: on a node, offline on a snapshot, on saved rules."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hack.scene_oracle import snapshot_of_scene
from nodeproxy.snapshot.take import save
from tests.trace.node import TracedNode, traced_node
from tests.trace.test_broken_rules import CLUSTER_IP, POD, SCENE, STICKY_IP
from tests.ways import NFT

PROGRAM = str(Path(sys.executable).with_name("nodeproxy"))
FLAGS = ["--hostname-override", "test-node", "--cluster-cidr", "10.0.0.0/16"]

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("snapshot") / "it"
    save(snapshot_of_scene(SCENE), directory)
    return directory


def offline(snapshot: Path, *arguments: str) -> Done:
    command = [PROGRAM, "trace", *arguments, "--snapshot", str(snapshot)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_offline(snapshot: Path) -> None:
    done = offline(snapshot, POD, "shop/web:http")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"TCP {POD} -> {CLUSTER_IP}:80   (from a pod of this node" in done.stdout
    assert "Frontend: shop/web:http, cluster IP 172.30.0.41:80/tcp" in done.stdout
    assert "Expected: FORWARD to one of 3 endpoints, source kept" in done.stdout
    assert "Kernel: not looked at (a snapshot is looked at; --kernel compares" in done.stdout


def test_offline_json(snapshot: Path) -> None:
    done = offline(snapshot, "outside", f"{CLUSTER_IP}:80", "-o", "json")
    [trace] = json.loads(done.stdout)["traces"]
    assert trace["frontend"]["service_port"] == "shop/web:http"
    assert [one["address"] for one in trace["expected"]["backends"]] == ["10.0.1.1", "10.0.1.2", "10.180.0.3"]
    assert all(one["masquerade"] for one in trace["expected"]["backends"])
    assert (trace["agreement"], trace["kernel"]) == ("not compared", None)


def test_frontends_to_choose_from(snapshot: Path) -> None:
    done = offline(snapshot, "outside", "192.168.0.2")
    assert done.returncode == 0
    assert "192.168.0.2: add a port to trace one of these" in done.stdout
    assert "192.168.0.2:30041/tcp  node port  shop/web:http" in done.stdout
    listed = json.loads(offline(snapshot, "outside", "node", "-o", "json").stdout)
    assert {one["at"] for one in listed["frontends"]} == {f"192.168.0.2:{port}" for port in (30041, 30042, 30043)}


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["x", "1.2.3.4:80"], 1, "nodeproxy: SRC: 'x' is neither an IP address nor one of 'node', 'outside'"),
        ([POD, "shop/none:80"], 1, "nodeproxy: DST: there is no Service shop/none"),
        ([POD, "shop/web:80", "--kernel-from", "/nowhere"], 1, "nodeproxy: /nowhere: No such file or directory"),
        ([POD, "shop/web:80", "--kernel-from", "/dev/null", "--kernel"], 2, "--kernel-from cannot be used together"),
        ([POD, "shop/web:80", "--protocol", "icmp"], 2, "'icmp' is not one of"),
        ([POD], 2, "Missing argument"),
    ],
)
def test_bad_usage(snapshot: Path, arguments: list[str], status: int, line: str) -> None:
    done = offline(snapshot, *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert status == 2 or len(done.stderr.splitlines()) == 1


def test_what_is_not_printable_never_gets_to_the_terminal(tmp_path: Path) -> None:
    """Node names of endpoints are text that nobody checked."""
    service, slice_ = SCENE.objects(with_node=False)[0], SCENE.objects(with_node=False)[3]
    slice_["endpoints"][2] = slice_["endpoints"][2] | {"nodeName": "\x1b[31mred\x07"}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all([service, slice_]))
    done = offline(tmp_path, "outside", "shop/web:http", *FLAGS)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    assert "[31mred" in done.stdout


@pytest.fixture(scope="module")
def node() -> Iterator[TracedNode]:
    with traced_node(SCENE, NFT) as made:
        yield made


def run(node: TracedNode, *arguments: str) -> Done:
    source = ["--manifests", str(node.box.directory / "manifests"), "--iptables-variant", "nft"]
    return node.box.node.command([PROGRAM, "trace", *arguments, *source, *FLAGS], check=False)


@pytest.mark.kernel
def test_agreement_and_difference(node: TracedNode) -> None:
    """Exit status 1 says that the kernel does otherwise; it is 0 again once that is mended."""
    good = run(node, POD, "shop/web:http")
    assert (good.returncode, good.stderr) == (0, "")
    assert "nat PREROUTING 1: " in good.stdout
    assert "=> sent out, to 10.180.0.3:8080, by eth0" in good.stdout
    assert good.stdout.splitlines()[-1] == "The kernel does what the forwarding table says"
    rule = ["PREROUTING", "-s", f"{POD}/32", "-p", "tcp", "-j", "DNAT", "--to-destination", "10.180.0.3:8080"]
    node.iptables("-t", "nat", "-I", *rule)
    bad = run(node, POD, "shop/web:http")
    node.iptables("-t", "nat", "-D", *rule)
    assert bad.returncode == 1
    assert "DIFFERENCE: the kernel never sends it to 10.0.1.1:8080, which is one of 3 backends" in bad.stdout
    assert bad.stdout.splitlines()[-1] == "WARNING: the kernel does not do what the forwarding table says"
    assert run(node, POD, "shop/web:http").returncode == 0


@pytest.mark.kernel
def test_outside_where_nothing_leads_to_who_stands_for_it(node: TracedNode) -> None:
    """The made-up address proves nothing then; one that somebody wrote does."""
    default = node.box.node.command(["ip", "route", "show", "default"]).stdout.split()
    node.box.node.command(["ip", "route", "del", *default])
    try:
        outside, written = run(node, "outside", "shop/web:http"), run(node, "203.0.113.1", "shop/web:http")
    finally:
        node.box.node.command(["ip", "route", "add", *default])
    assert outside.returncode == 0, outside.stdout
    assert "nothing leads to 203.0.113.1, which stands for anybody outside" in outside.stdout
    assert "write the client's address as SRC" in outside.stdout
    assert outside.stdout.splitlines()[-1].startswith("The kernel's rules could not be followed to the end")
    assert written.returncode == 1
    assert "not routed: nothing leads to its source 203.0.113.1" in written.stdout


@pytest.mark.kernel
def test_json(node: TracedNode) -> None:
    [trace] = json.loads(run(node, "node", "shop/sticky:80", "-o", "json").stdout)["traces"]
    assert trace["agreement"] == "agrees"
    assert [round(one["chance"], 3) for one in trace["kernel"]["destinations"]] == [0.333] * 3
    assert all(one["masqueraded"] for one in trace["kernel"]["destinations"])
    assert trace["kernel"]["steps"][0]["chain"] == "OUTPUT"


@pytest.mark.kernel
def test_without_kernel(node: TracedNode) -> None:
    done = run(node, POD, "shop/web:http", "--no-kernel")
    assert done.stdout.splitlines()[-1] == "Kernel: not looked at (--no-kernel)"


@pytest.mark.kernel
def test_saved_rules(node: TracedNode, snapshot: Path, tmp_path: Path) -> None:
    """What an operator sends: iptables-save alone, or with the sets; what they lack is said, not guessed."""
    rules = node.box.node.command(["iptables-nft-save", "-c"]).stdout
    saved = tmp_path / "iptables-save"
    saved.write_text(rules)
    done = offline(snapshot, POD, f"{CLUSTER_IP}:80", "--kernel-from", str(saved))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "The kernel does what the forwarding table says"
    unknown = offline(snapshot, POD, f"{STICKY_IP}:80", "--kernel-from", str(saved))
    assert unknown.returncode == 0
    assert "-m set is not understood" in unknown.stdout
    names = sorted({word for word in rules.split() if word.startswith("KUBE-AFFINITY-")})
    created = [f"create {name} hash:ip family inet hashsize 64 maxelem 1048576 timeout 10800" for name in names]
    (tmp_path / "ipset-save").write_text("\n".join([*created, f"add {names[0]} {POD} timeout 100", ""]))
    held = offline(snapshot, POD, f"{STICKY_IP}:80", "--kernel-from", str(tmp_path))
    assert held.returncode == 0, held.stdout
    assert "session affinity: the source is bound" in held.stdout
    saved.write_text(rules.replace("10.180.0.3:8080", "10.180.0.4:8080"))
    broken = offline(snapshot, POD, f"{CLUSTER_IP}:80", "--kernel-from", str(saved))
    assert broken.returncode == 1
    assert "never sends it to 10.180.0.3:8080" in broken.stdout
