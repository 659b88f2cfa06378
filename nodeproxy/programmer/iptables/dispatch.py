"""Owns dispatch: a prefix tree of chains that leads a packet to the rule for its frontend in O(log n) rules.

Keys are integers: destination address, then protocol, then port (or only protocol and port, for node ports). A chain with
more than `LEAF_MAX` keys below it splits by the next two bits in which its keys differ, so the tree adapts to how addresses
lie: 5,000 cluster IPs need about six jumps. The shape is a function of the set of keys alone, never of their history, so a
tree that grew by increments equals one built afresh, and a change rewrites only chains on the path to the changed keys.
"""

from __future__ import annotations

import socket
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from nodeproxy.forwarding.table import Family, IPProtocol
from nodeproxy.programmer.rules.names import MAX_CHAIN_NAME, hash16

LEAF_MAX = 8
INLINE_MAX = 2
_STRIDE = 2

_PROTOCOL_CODE = {IPProtocol.TCP: 0, IPProtocol.UDP: 1, IPProtocol.SCTP: 2}
_CODE_PROTOCOL = {code: protocol for protocol, code in _PROTOCOL_CODE.items()}
_SERVICE_BITS = 18  # two for the protocol, sixteen for the port


class Leaf(NamedTuple):
    """What to do at a key: a comment (None for none) and the target with its options."""

    comment: str | None
    target: str


class KeySpace(Protocol):
    """How keys of one tree look as matches and chain names."""

    width: int

    def match(self, prefix: int, length: int) -> tuple[str, str]:
        """Match for all keys with this prefix (`prefix` holds its `length` high bits): before and after the comment."""

    def chain_name(self, prefix: int, length: int) -> str:
        """Name of the chain that holds the keys with this prefix."""


def _protocol_and_ports(bits: int, length: int) -> tuple[str, str]:
    """Match for a prefix of protocol and port; empty where the prefix does not fix the protocol."""
    if length < _STRIDE:
        return "", ""
    protocol = _CODE_PROTOCOL[bits >> (length - 2)]
    free = _SERVICE_BITS - length
    low = (bits << free) & 0xFFFF
    if free == 16:
        return f"-p {protocol}", ""
    high = low | ((1 << free) - 1)
    ports = str(low) if free == 0 else f"{low}:{high}"
    return f"-p {protocol}", f"-m {protocol} --dport {ports}"


class AddressSpace:
    """Keys of a destination address, protocol and port."""

    def __init__(self, family: Family, chain_prefix: str) -> None:
        self._bits = family.address_bits
        self._socket_family = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
        self._chain_prefix = chain_prefix
        self.width = self._bits + _SERVICE_BITS

    def key(self, address: str, protocol: IPProtocol, port: int) -> int:
        """Key of a frontend; `address` is canonical text."""
        number = int.from_bytes(socket.inet_pton(self._socket_family, address))
        return (number << _SERVICE_BITS) | (_PROTOCOL_CODE[protocol] << 16) | port

    def match(self, prefix: int, length: int) -> tuple[str, str]:
        if length <= self._bits:
            return f"-d {self._network(prefix, length)}", ""
        rest = length - self._bits
        before, after = _protocol_and_ports(prefix & ((1 << rest) - 1), rest)
        destination = f"-d {self._network(prefix >> rest, self._bits)}"
        return (f"{destination} {before}" if before else destination), after

    def chain_name(self, prefix: int, length: int) -> str:
        if length <= self._bits:
            name = f"{self._chain_prefix}{self._network(prefix, length)}"
            if len(name) <= MAX_CHAIN_NAME:
                return name
        return f"{self._chain_prefix}IP-{hash16(f'{prefix:x}/{length}')}"

    def _network(self, prefix: int, length: int) -> str:
        packed = (prefix << (self._bits - length)).to_bytes(self._bits // 8)
        return f"{socket.inet_ntop(self._socket_family, packed)}/{length}"


class PortSpace:
    """Keys of a protocol and port, for destinations that the caller has matched already."""

    width = _SERVICE_BITS

    def __init__(self, chain_prefix: str) -> None:
        self._chain_prefix = chain_prefix

    def key(self, protocol: IPProtocol, port: int) -> int:
        """Key of a node port."""
        return (_PROTOCOL_CODE[protocol] << 16) | port

    def match(self, prefix: int, length: int) -> tuple[str, str]:
        return _protocol_and_ports(prefix, length)

    def chain_name(self, prefix: int, length: int) -> str:
        free = self.width - length
        protocol = _CODE_PROTOCOL[prefix >> (length - 2)]
        low = (prefix << free) & 0xFFFF
        return f"{self._chain_prefix}{protocol}-{low}-{low | ((1 << free) - 1) & 0xFFFF}"


class _Child(NamedTuple):
    """A chain below another: the prefix of its keys, and its name."""

    prefix: int
    length: int
    chain: str


class _Node(NamedTuple):
    """A chain of the tree: the chains it jumps to, and the keys whose rules it holds itself."""

    children: tuple[_Child, ...]
    inline: tuple[int, ...]


class TreeChange(NamedTuple):
    """Chains that have new content (all of it), and chains that are gone."""

    changed: dict[str, list[str]]
    removed: set[str]


class _Walk(NamedTuple):
    """What one update has found so far: new content, chains that a parent dropped, chains that are in use."""

    changed: dict[str, list[str]]
    dropped: set[str]
    used: set[str]


class DispatchTree:
    """A set of keys with their leaves, and the chains that find them. `root` is the name of the chain to enter by."""

    def __init__(self, root: str, space: KeySpace) -> None:
        self.root = root
        self._space = space
        self._keys: list[int] = []
        self._leaves: dict[int, Leaf] = {}
        self._nodes: dict[str, _Node] = {root: _Node((), ())}

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key: int) -> Leaf | None:
        """The leaf at a key."""
        return self._leaves.get(key)

    def chains(self) -> Iterator[tuple[str, list[str]]]:
        """Every chain with its rules."""
        for name, node in self._nodes.items():
            yield name, self._render(node)

    def update(self, changes: Mapping[int, Leaf | None]) -> TreeChange:
        """Set leaves (None removes), and say which chains that changes."""
        touched = sorted(key for key, leaf in changes.items() if self._leaves.get(key) != leaf)
        if not touched:
            return TreeChange({}, set())
        self._replace_keys({key: changes[key] for key in touched})
        walk = _Walk({}, set(), set())
        self._rebuild(_Child(0, 0, self.root), touched, walk)
        return TreeChange(walk.changed, self._forget(walk))

    def _replace_keys(self, changes: Mapping[int, Leaf | None]) -> None:
        added = [key for key, leaf in changes.items() if leaf is not None and key not in self._leaves]
        gone = {key for key, leaf in changes.items() if leaf is None}
        for key, leaf in changes.items():
            if leaf is None:
                del self._leaves[key]
            else:
                self._leaves[key] = leaf
        if len(added) + len(gone) > 64:
            self._keys = sorted(self._leaves)
            return
        for key in gone:
            del self._keys[bisect_left(self._keys, key)]
        for key in added:
            insort(self._keys, key)

    def _range(self, prefix: int, length: int) -> tuple[int, int]:
        """Positions in the sorted keys of those with this prefix."""
        free = self._space.width - length
        return bisect_left(self._keys, prefix << free), bisect_left(self._keys, (prefix + 1) << free)

    def _shape(self, prefix: int, length: int) -> _Node:
        """What the chain for a prefix holds: a function of the keys below the prefix alone."""
        low, high = self._range(prefix, length)
        if high - low <= LEAF_MAX:
            return _Node((), tuple(self._keys[low:high]))
        first, last = self._keys[low], self._keys[high - 1]
        common = self._space.width - (first ^ last).bit_length()
        split = common - common % _STRIDE + _STRIDE
        free = self._space.width - split
        children: list[_Child] = []
        inline: list[int] = []
        for branch in range(first >> free, (last >> free) + 1):
            start, end = self._range(branch, split)
            if end - start > INLINE_MAX:
                children.append(_Child(branch, split, self._space.chain_name(branch, split)))
            else:
                inline.extend(self._keys[start:end])
        return _Node(tuple(children), tuple(inline))

    def _rebuild(self, at: _Child, touched: list[int], walk: _Walk) -> None:
        """Bring a chain and all below it up to date; `touched` are the changed keys below it, sorted."""
        walk.used.add(at.chain)
        old = self._nodes.get(at.chain)
        node = self._shape(at.prefix, at.length)
        self._nodes[at.chain] = node
        if old != node or not set(node.inline).isdisjoint(touched):
            walk.changed[at.chain] = self._render(node)
        names = {child.chain for child in node.children}
        if old is not None:
            walk.dropped.update(child.chain for child in old.children if child.chain not in names)
        for child in node.children:
            free = self._space.width - child.length
            start = bisect_left(touched, child.prefix << free)
            end = bisect_left(touched, (child.prefix + 1) << free)
            if start == end and child.chain in self._nodes:
                walk.used.add(child.chain)
            else:
                self._rebuild(child, touched[start:end], walk)

    def _forget(self, walk: _Walk) -> set[str]:
        """Remove chains that no parent names any more, and what hangs below them."""
        removed: set[str] = set()
        pending = [name for name in walk.dropped if name not in walk.used]
        while pending:
            name = pending.pop()
            removed.add(name)
            pending.extend(child.chain for child in self._nodes.pop(name).children if child.chain not in walk.used)
        return removed

    def _render(self, node: _Node) -> list[str]:
        rules = [_rule(self._space.match(key, self._space.width), self._leaves[key]) for key in node.inline]
        for child in node.children:
            rules.append(_rule(self._space.match(child.prefix, child.length), Leaf(None, f"-j {child.chain}")))
        return rules


def _rule(match: tuple[str, str], leaf: Leaf) -> str:
    before, after = match
    comment = f'-m comment --comment "{leaf.comment}"' if leaf.comment else ""
    return " ".join(part for part in (before, comment, after, leaf.target) if part)
