"""Whether an ipset holds a packet, by sets as `ipset save` prints them: members, and what is not known."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeproxy.trace.ip_sets import IpSet
from nodeproxy.trace.packet import PacketState
from nodeproxy.trace.saved_kernel import load_kernel
from tests.trace.cluster import view


@pytest.mark.parametrize(
    ("created", "added", "source", "held"),
    [
        ("hash:net", ["203.0.0.0/8"], "203.0.113.2", True),
        ("hash:net", ["203.0.0.0/8"], "10.0.0.1", False),
        ("hash:net", ["203.0.0.0/8", "203.0.113.2 nomatch"], "203.0.113.2", None),
        ("hash:net", ["203.0.0.0/8", "203.0.113.0/24 nomatch", "203.0.113.2"], "203.0.113.2", None),
        ("hash:net", ["203.0.0.0/8", "203.0.113.2 nomatch"], "203.0.113.3", True),
        ("hash:net", ["203.0.0.0/8", "203.0.113.2 nomatch"], "10.0.0.1", False),
        ("hash:ip family inet netmask 24", ["203.0.113.0"], "203.0.113.2", None),
        ("hash:ip family inet bitmask 255.255.0.255", ["203.0.0.2"], "203.0.113.2", None),
    ],
)
def test_who_is_held(tmp_path: Path, created: str, added: list[str], source: str, held: bool | None) -> None:
    (tmp_path / "iptables-save").write_text("")
    (tmp_path / "ipset-save").write_text("\n".join([f"create s {created}", *(f"add s {entry}" for entry in added)]))
    contents = load_kernel(tmp_path, 4, view()).ip_set("s")
    assert contents is not None
    assert IpSet(contents).holds(PacketState(4, "tcp", source, "10.96.0.1", 80), ["src"]) is held
