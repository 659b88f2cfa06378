"""The dispatch tree: whatever its history, its shape is a function of its keys, and every key is found by few rules."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeproxy.forwarding.table import Family, IPProtocol
from nodeproxy.programmer.iptables.dispatch import AddressSpace, DispatchTree, Leaf, PortSpace
from nodeproxy.programmer.rules.names import MAX_CHAIN_NAME, TREE

PROTOCOLS = st.sampled_from(list(IPProtocol))
PORTS = st.one_of(st.sampled_from([80, 443, 65535, 1]), st.integers(1, 65535))
IPV4 = AddressSpace(Family.IPV4, TREE)
IPV6 = AddressSpace(Family.IPV6, TREE)
NODE_PORTS = PortSpace(TREE)
SPACES = {
    "IPv4": (
        IPV4,
        st.builds(
            lambda n, p, port: IPV4.key(f"10.{n % 3}.{n % 5}.{n % 250}", p, port), st.integers(0, 999), PROTOCOLS, PORTS
        ),
    ),
    "IPv6": (
        IPV6,
        st.builds(lambda n, p, port: IPV6.key(f"fd00::{n % 7:x}:{n:x}", p, port), st.integers(1, 999), PROTOCOLS, PORTS),
    ),
    "node ports": (NODE_PORTS, st.builds(NODE_PORTS.key, PROTOCOLS, st.integers(30000, 30400))),
}


def changes(keys: st.SearchStrategy[int]) -> st.SearchStrategy[list[dict[int, Leaf | None]]]:
    leaf = st.sampled_from([None, Leaf("a", "-j A"), Leaf("b", "-j B")])
    return st.lists(st.dictionaries(keys, leaf, max_size=40), max_size=12)


@pytest.mark.parametrize("name", SPACES)
def test_a_tree_that_grew_equals_one_built_afresh(name: str) -> None:
    space, keys = SPACES[name]

    @settings(max_examples=60, deadline=None)
    @given(changes(keys))
    def check(steps: list[dict[int, Leaf | None]]) -> None:
        tree = DispatchTree("ROOT", space)
        kernel: dict[str, list[str]] = {"ROOT": []}
        present: dict[int, Leaf] = {}
        for step in steps:
            change = tree.update(step)
            assert not set(change.changed) & change.removed
            kernel.update(change.changed)
            for chain in change.removed:
                del kernel[chain]
            for key, leaf in step.items():
                present.pop(key, None)
                if leaf is not None:
                    present[key] = leaf
        fresh = DispatchTree("ROOT", space)
        fresh.update(present)
        assert dict(tree.chains()) == dict(fresh.chains()) == kernel
        assert len(tree) == len(present)
        assert all(len(chain) <= MAX_CHAIN_NAME for chain in kernel)

    check()


def walk(chains: dict[str, list[str]], chain: str, address: str, protocol: str, port: int) -> tuple[str | None, int]:
    """Target that a packet finds, and how many rules it passed. Reads the rules as the kernel would."""
    passed = 0
    for rule in chains[chain]:
        passed += 1
        words = rule.split()
        if "-d" in words and ipaddress.ip_address(address) not in ipaddress.ip_network(words[words.index("-d") + 1]):
            continue
        if "-p" in words and words[words.index("-p") + 1] != protocol:
            continue
        if "--dport" in words:
            low, _, high = words[words.index("--dport") + 1].partition(":")
            if not int(low) <= port <= int(high or low):
                continue
        target = words[-1]
        if target not in chains:
            return target, passed
        found, more = walk(chains, target, address, protocol, port)
        passed += more
        if found is not None:
            return found, passed
    return None, passed


def test_every_frontend_is_found_and_nothing_else() -> None:
    tree = DispatchTree("ROOT", IPV4)
    frontends = [
        (f"10.96.{n // 200}.{n % 200}", proto, port)
        for n in range(600)
        for proto, port in ((IPProtocol.TCP, 80), (IPProtocol.UDP, 53))
    ]
    frontends += [("10.96.0.1", IPProtocol.TCP, 1000 + n) for n in range(1000)]  # a Service of a thousand ports
    tree.update({IPV4.key(*front): Leaf(None, f"-j T{n}") for n, front in enumerate(frontends)})
    chains = dict(tree.chains())
    for n, front in enumerate(frontends):
        found, passed = walk(chains, "ROOT", *front)
        assert found == f"T{n}"
        assert passed < 45
    for address, protocol, port in (
        ("10.96.0.1", "tcp", 999),
        ("10.96.3.199", "tcp", 80),
        ("8.8.8.8", "udp", 53),
        ("10.96.0.5", "sctp", 80),
    ):
        assert walk(chains, "ROOT", address, protocol, port)[0] is None


def test_one_frontend_touches_few_chains() -> None:
    tree = DispatchTree("ROOT", IPV4)
    tree.update(
        {
            IPV4.key(f"10.{96 + n // 60000}.{n // 250 % 240}.{n % 250}", IPProtocol.TCP, 80): Leaf(None, "-j X")
            for n in range(20000)
        }
    )
    change = tree.update({IPV4.key("10.96.100.251", IPProtocol.TCP, 80): Leaf(None, "-j Y")})
    assert 1 <= len(change.changed) <= 4
    assert sum(map(len, change.changed.values())) < 40
