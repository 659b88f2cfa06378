"""The OCI runtime for machines that lack a capability: what it takes out, of which file, and that it becomes runc."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from hack.kind import oci_runtime
from hack.kind.oci_runtime import document, lacking, without

ALL = 0x1FFFFFFFFFF  # up to CAP_CHECKPOINT_RESTORE
SYS_RESOURCE = 1 << 24


def status(mask: int) -> str:
    return f"Name:\tx\nCapEff:\t0000000000000000\nCapBnd:\t{mask:016x}\nCapAmb:\t0000000000000000\n"


def test_lacking_is_what_the_bounding_set_has_not() -> None:
    assert lacking(status(ALL)) == set()
    assert lacking(status(ALL & ~SYS_RESOURCE)) == {"CAP_SYS_RESOURCE"}
    assert lacking(status(ALL & ~1)) == {"CAP_CHOWN"}
    assert lacking("Name:\tx\n") == set()


def test_every_set_of_a_bundle_loses_the_capability_and_nothing_else() -> None:
    sets = {name: ["CAP_SYS_RESOURCE", "CAP_CHOWN"] for name in ("bounding", "effective", "permitted", "inheritable")}
    bundle = {"ociVersion": "1.0.2", "process": {"args": ["sh"], "capabilities": sets}, "root": {"path": "rootfs"}}
    edited = without(bundle, {"CAP_SYS_RESOURCE"})
    assert edited["process"]["capabilities"] == {name: ["CAP_CHOWN"] for name in sets}
    assert edited["process"]["args"] == ["sh"]
    assert edited["root"] == bundle["root"]


def test_a_process_of_its_own_is_edited_and_one_without_capabilities_left_alone() -> None:
    process = {"args": ["sh"], "capabilities": {"bounding": ["CAP_SYS_RESOURCE"]}}
    assert without(process, {"CAP_SYS_RESOURCE"}) == {"args": ["sh"], "capabilities": {"bounding": []}}
    assert without({"args": ["sh"]}, {"CAP_SYS_RESOURCE"}) == {"args": ["sh"]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--root /run --log /l create --bundle /b --pid-file /p ID", "/b/config.json"),
        ("create --bundle=/b ID", "/b/config.json"),
        ("run -b /b ID", "/b/config.json"),
        ("create ID", "config.json"),
        ("--root /run exec --process /tmp/p --detach ID", "/tmp/p"),
        ("exec -p /tmp/p ID", "/tmp/p"),
        ("exec ID sh", None),
        ("--root /run kill --all ID 9", None),
        ("delete ID", None),
    ],
)
def test_the_file_of_a_call(arguments: str, expected: str | None) -> None:
    assert document(arguments.split()) == (Path(expected) if expected else None)


def test_as_a_program_it_edits_and_becomes_runc(tmp_path: Path) -> None:
    runc = tmp_path / "runc"
    runc.write_text('#!/bin/sh\necho "runc $*"\n')
    runc.chmod(0o755)
    lost = lacking(Path("/proc/self/status").read_text())
    held = ["CAP_CHOWN", *sorted(lost)]
    (tmp_path / "config.json").write_text(json.dumps({"process": {"capabilities": {"bounding": held}}}))
    done = subprocess.run(
        [oci_runtime.__file__, "create", "--bundle", tmp_path, "ID"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"runc create --bundle {tmp_path} ID\n"
    left = json.loads((tmp_path / "config.json").read_text())["process"]["capabilities"]["bounding"]
    assert left == [capability for capability in held if capability not in lost]
