"""The rules around IPVS read back as they were written, in both variants and families, and are removed without a trace.

They need ipsets but no IPVS, so every kernel will do.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.ipset import IPSets, SetSpec
from nodeproxy.kernel.ipvs import VirtualServer
from nodeproxy.programmer.base import LocalDetector, NodePortAddresses, ProgrammerConfig
from nodeproxy.programmer.ipvs.names import SET_TYPES, SetName
from nodeproxy.programmer.ipvs.places import Target
from nodeproxy.programmer.ipvs.rules import TABLES, chains, jumps
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.common import Features
from nodeproxy.programmer.rules.snapshot import TableSnapshot, parse_save
from nodeproxy.sandbox.namespace import Namespace, unique_stem

pytestmark = pytest.mark.kernel

DETECTORS = {
    "none": LocalDetector(),
    "cidr": LocalDetector(cidrs={Family.IPV4: "10.244.0.0/16", Family.IPV6: "fd00:244::/64"}),
    "interface": LocalDetector(interface="cni0"),
    "prefix": LocalDetector(interface_prefix="veth"),
}


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(f"{unique_stem()}-rules") as made:
        yield made


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("features", [Features(), Features(random_fully=False, bpf=False)], ids=["all", "few"])
@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_what_is_written_reads_back_the_same(
    namespace: Namespace, variant: str, family: Family, features: Features, detector: str
) -> None:
    tool = f"{'iptables' if family is Family.IPV4 else 'ip6tables'}-{variant}"
    specs = [SetSpec(name.of(family), SET_TYPES.get(name, "hash:ip,port"), int(family)) for name in SetName]
    assert namespace.run(lambda: IPSets().create(specs)) == []
    config = ProgrammerConfig((family,), DETECTORS[detector], {family: NodePortAddresses()}, masquerade_bit=14)
    address = "198.51.100.7" if family is Family.IPV4 else "2001:db8::7"
    place = VirtualServer(int(family), "tcp", address, 80)
    target = {place: Target("10.96.0.1" if family is Family.IPV4 else "fd00:96::1", 443)}
    wanted = chains(family, config, features, target, target)

    def read() -> dict[str, TableSnapshot]:
        return {table: parse_save(namespace.command([f"{tool}-save", "-t", table]).stdout, table) for table in TABLES}

    empty = {table: parse_save("", table) for table in TABLES}
    namespace.command([f"{tool}-restore", "--noflush"], input=tx.render(tx.full(wanted, jumps(), empty)))
    assert tx.render(tx.full(wanted, jumps(), read())) == ""
    namespace.command([f"{tool}-restore", "--noflush"], input=tx.render(tx.cleanup(jumps(), read())))
    assert all(not rules for table in read().values() for rules in table.chains.values())
    assert namespace.run(lambda: IPSets().destroy([spec.name for spec in specs])) == []
