"""Docker and kind in the VM: what is asked for, what its disk is made of, and a container that runs."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hack.kind import engine
from hack.kind.config import Shape
from hack.vm import choice, cli, docker_disk, e2e, kind_content, uml, uml_kernel
from hack.vm.docker_disk import Content
from hack.vm.kernel import Kernel
from hack.vm.kind_nodes import Nodes
from hack.vm.places import VmError
from tests.vm.test_vm import vm

BROKEN = 125
IMAGE = "hack-vm-test:latest"
NODES = Nodes("some", "node:1", ("agent:1",))


def test_docker_works_in_user_mode_linux_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.kinds(docker=True) == ["uml"]
    monkeypatch.setenv("HACK_VM_ACCEL", "tcg")
    with pytest.raises(VmError, match="kind uml only, HACK_VM_ACCEL=tcg"):
        choice.kinds(docker=True)


def test_images_are_for_a_vm_with_docker(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HACK_VM", "vm")
    assert cli.main(["run", "--image", "x", "--", "true"]) == BROKEN
    assert "--image is for --docker and --kind" in capsys.readouterr().err


def test_the_disk_is_known_by_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {"agent:1": "a", "node:1": "n"}
    monkeypatch.setattr(docker_disk, "_id_of", lambda image: ids[image])
    contents = [
        Content(),
        Content(("agent:1",)),
        Content(("agent:1",), NODES),
        Content((), NODES),
        Content((), NODES, ("agent:1",)),
    ]
    before = [content.key() for content in contents]
    assert len(set(before)) == len(before)
    assert [content.key() for content in contents] == before
    ids["agent:1"] = "another"
    assert [content.key() == old for content, old in zip(contents, before, strict=True)] == [True, False, False, False, True]
    ids["node:1"] = "another"
    assert contents[-1].key() != before[-1]


def test_what_the_vm_writes_goes_to_a_file_of_its_own(tmp_path: Path) -> None:
    kernel, disk = Kernel("6", Path(sys.executable), tmp_path), tmp_path / "disk"
    assert f"ubd0={tmp_path}/docker.cow,{disk}" in uml.command(kernel, tmp_path, 64, 0, disk)
    assert not [word for word in uml.command(kernel, tmp_path, 64, 0) if word.startswith("ubd")]


def test_nodes_of_the_cluster_get_their_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some/0").mkdir(parents=True)
    (tmp_path / "some/1").mkdir()
    monkeypatch.setenv("NODEPROXY_NODE_STORES", str(tmp_path))
    nodes = yaml.safe_load(Shape("some", workers=2).kind_config())["nodes"]
    mounts = [[mount["hostPath"] for mount in node.get("extraMounts", ())] for node in nodes]
    assert mounts == [[str(tmp_path / "some/0")], [str(tmp_path / "some/1")], []]
    assert "extraMounts" not in Shape("other").kind_config()
    told = dict(pair.split("=", 1) for pair in kind_content.environment(Content((), NODES)))
    assert told["NODEPROXY_NODE_IMAGE"] == "node:1-vm"
    assert told["NODEPROXY_NODE_STORES"] == "/var/lib/docker/node-stores"


def test_the_short_suite_runs_in_the_vm_unless_all_is_asked_for() -> None:
    options = cli.parser().parse_args(e2e.in_vm(["-k", "affinity"], everything=False))
    command = cli._command(options)
    assert options.kind == "nodeproxy-e2e"
    assert command[:4] == ["python", "-m", "e2e", "--smoke"]
    assert command[-2:] == ["-k", "affinity"]
    assert "--smoke" not in e2e.in_vm([], everything=True)


@pytest.fixture
def image() -> Iterator[str]:
    """An image with nothing but busybox, in this machine's engine."""
    engine.ensure()
    busybox = uml_kernel.user_mode_kernel(print).busybox
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(busybox, "bin/busybox")
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
        tar.addfile(link)
    subprocess.run(["docker", "import", "-", IMAGE], input=archive.getvalue(), capture_output=True, check=True)
    yield IMAGE
    subprocess.run(["docker", "rmi", IMAGE], capture_output=True, check=False)


@pytest.mark.vm
@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_container_runs_in_the_vm(image: str) -> None:
    """With the image from the start, limits by cgroups, a published port, and nothing on the disk of the next VM."""
    server = 'while :; do printf "HTTP/1.0 200 OK\\r\\n\\r\\nserved\\n" | busybox nc -l -p 80; done'
    script = f"""
set -e
python -m hack.kind engine
docker run --rm --memory 64m --cpus 0.5 --pids-limit 20 {image} sh -c 'echo inside'
docker run --detach --publish 127.0.0.1:8080:80 {image} sh -c '{server}' >/dev/null
curl --silent --retry 50 --retry-connrefused --retry-delay 1 http://127.0.0.1:8080/
docker ps --all --quiet | wc -l
"""
    for _ in range(2):
        done = vm("run", "--fresh", "--docker", "--image", image, "--", "sh", "-c", script)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines() == ["inside", "served", "1"], done.stdout
