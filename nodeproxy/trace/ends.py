"""Owns what is asked for: SRC and DST as people write them, and the addresses and frontends that they mean.

SRC: an address, `node`, `outside`. DST: `ADDRESS[:PORT]`, `[IPV6]:PORT`, `node:PORT`, `NAMESPACE/SERVICE[:PORT]`,
`SERVICE[.NAMESPACE]:PORT`; a Service's port by its number or name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from nodeproxy.cluster.addresses import Address, is_local_only, parse_address
from nodeproxy.cluster.findings import is_label, quoted
from nodeproxy.cluster.names import Family, IPProtocol, ServiceName
from nodeproxy.forwarding.table import FrontendKind
from nodeproxy.snapshot.view import NodeView

NODE: Final = "node"
OUTSIDE: Final = "outside"
_CLUSTER_DOMAIN: Final = re.compile(r"\.svc(\..*)?$")


class TraceError(Exception):
    """What is asked for makes no sense, or is not there. One line that names the argument."""


class Target(NamedTuple):
    """An address and port to send to."""

    address: Address
    port: int
    protocol: IPProtocol


class Listing(NamedTuple):
    """A frontend that DST may mean, where it names several: at what, and of which ServicePort."""

    at: str
    protocol: str
    service_port: str
    kind: str


class Several(NamedTuple):
    """DST names no port: these are there to choose from. `what` is DST in words."""

    what: str
    frontends: tuple[Listing, ...]


class Sender(NamedTuple):
    """SRC: `address` None for `node` and `outside`."""

    text: str
    address: Address | None


def endpoint_text(address: str, port: int) -> str:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def read_sender(text: str) -> Sender:
    """SRC. Raises TraceError."""
    if text in (NODE, OUTSIDE):
        return Sender(text, None)
    address = parse_address(text.removeprefix("[").removesuffix("]"))
    if address is None:
        raise TraceError(f"SRC: {quoted(text)} is neither an IP address nor one of 'node', 'outside'")
    if address.text in ("0.0.0.0", "::"):
        raise TraceError(f"SRC: {address.text} is no address that a packet comes from")
    return Sender(text, address)


def read_targets(text: str, protocol: IPProtocol | None, view: NodeView, family: Family | None) -> list[Target] | Several:
    """What DST means, in `family` (None: in every one that it has). `protocol` None: the one there is, else TCP.

    Raises TraceError.
    """
    host, port = _host_and_port(text)
    address = parse_address(host)
    if address is not None:
        _check_family(address, family)
        return _at_address(address, port, protocol, view)
    if host == NODE:
        return _at_node(port, protocol, view, family)
    name, port_name = _service(host, port, view)
    return _at_service(name, port_name, protocol, view, family)


def _host_and_port(text: str) -> tuple[str, str]:
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")) or parse_address(host) is None or ":" not in host:
            raise TraceError(f"DST: {quoted(text)} is not [IPV6]:PORT")
        return host, rest[1:]
    if parse_address(text) is not None:
        return text, ""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", "")
    if ":" in host:
        raise TraceError(f"DST: {quoted(text)}: write an IPv6 address with a port as [IPV6]:PORT")
    if not host:
        raise TraceError(f"DST: {quoted(text)} names no address and no Service")
    return host, port


def _number(port: str) -> int:
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise TraceError(f"DST: port {quoted(port)} is not a number in 1-65535")
    return int(port)


def _check_family(address: Address, family: Family | None) -> None:
    if family is not None and address.family is not family:
        raise TraceError(f"SRC is IPv{int(family)}, and DST {address.text} is IPv{int(address.family)}")


def _at_address(address: Address, port: str, protocol: IPProtocol | None, view: NodeView) -> list[Target] | Several:
    if port:
        number = _number(port)
        return [Target(address, number, protocol or _protocol_at(address, number, view))]
    loopback_or_own = is_local_only(address) or address.text in {str(one) for one in view.node_addresses}
    serves = loopback_or_own and view.serves_node_ports(address.text)
    listed = tuple(
        Listing(endpoint_text(address.text, claim.port), claim.protocol, str(found.row.key.name), found.frontend.kind)
        for claim, found in view.index.items()
        if claim.family is address.family
        and (claim.address == address.text or (claim.address is None and serves))
        and protocol in (None, claim.protocol)
    )
    if not listed:
        raise TraceError(f"DST: {address.text} has no frontend; with a port it can be traced all the same")
    return Several(address.text, listed)


def _protocol_at(address: Address, port: int, view: NodeView) -> IPProtocol:
    """The protocol where only one is served there; TCP where it is, or where nothing is."""
    own = address.text in {str(one) for one in view.node_addresses} or is_local_only(address)
    found = {
        claim.protocol
        for claim in view.index
        if claim.port == port
        and claim.family is address.family
        and (claim.address == address.text or (own and claim.address is None))
    }
    return next(iter(found)) if len(found) == 1 else IPProtocol.TCP


def _at_node(port: str, protocol: IPProtocol | None, view: NodeView, family: Family | None) -> list[Target] | Several:
    """At the node's first address of each family in which the port is served; where it is in none, of the first family."""
    texts = (*view.facts.addresses, *sorted(map(str, view.node_addresses)))
    known = [address for text in texts if (address := parse_address(text)) is not None and not is_local_only(address)]
    first = {address.family: address for address in reversed(known) if family in (None, address.family)}
    if not first:
        raise TraceError("DST: no address of the node is known; write one instead of 'node'")
    addresses = [first[one] for one in sorted(first)]
    if not port:
        return _at_address(addresses[0], port, protocol, view)
    number = _number(port)
    served = {claim.family for claim in view.index if claim.port == number and claim.address is None}
    wanted = [address for address in addresses if address.family in served] or addresses[:1]
    return [Target(address, number, protocol or _protocol_at(address, number, view)) for address in wanted]


def _service(host: str, port: str, view: NodeView) -> tuple[ServiceName, str]:
    namespace, slash, name = host.partition("/")
    if not slash:
        host = _CLUSTER_DOMAIN.sub("", host)
        name, _, namespace = host.partition(".")
    if not is_label(name) or (namespace and not is_label(namespace)):
        raise TraceError(f"DST: {quoted(host)} is neither an address nor the name of a Service")
    return ServiceName(namespace or "default", name), port


def unknown_service(name: ServiceName, view: NodeView, why: Callable[[NodeView, ServiceName], str]) -> TraceError:
    """Why DST cannot be traced: not there, or there and not programmed."""
    if reason := why(view, name):
        return TraceError(f"DST: Service {name} has no frontends: {reason}")
    close = difflib.get_close_matches(str(name), [str(one) for one in view.state.services], n=3)
    hint = f"; there is {', '.join(close)}" if close else ""
    proxy = view.snapshot.config.service_proxy_name
    selected = f" with the label service-proxy-name={proxy}" if proxy else " without the label service-proxy-name"
    unread = f"; {len(view.refused)} objects or files could not be read" if view.refused else ""
    origin = view.snapshot.origin
    return TraceError(f"DST: there is no Service {name}{selected} in the cluster state ({origin}){hint}{unread}")


def _at_service(
    name: ServiceName, port: str, protocol: IPProtocol | None, view: NodeView, family: Family | None
) -> list[Target] | Several:
    from nodeproxy.trace.explain import why_ignored  # noqa: PLC0415 - it speaks of ends as well

    if name not in view.state.services:
        raise unknown_service(name, view, why_ignored)
    rows = [row for row in view.table.rows.values() if row.key.name.service == name]
    if family is not None:
        rows = [row for row in rows if row.key.family is family]
        if not rows:
            raise TraceError(f"DST: Service {name} has no address of SRC's family, IPv{int(family)}")
    frontends = [
        (row, frontend)
        for row in rows
        for frontend in row.frontends
        if protocol in (None, row.key.protocol)
        and (not port or _meant(port, row.key.name.port, frontend.port, frontend.kind is FrontendKind.CLUSTER_IP))
    ]
    at_cluster_ip = [(row, frontend) for row, frontend in frontends if frontend.kind is FrontendKind.CLUSTER_IP]
    if port and not at_cluster_ip:
        there = ", ".join(
            sorted({f"{f.port}/{row.key.protocol}" + (f" ({row.key.name.port})" if row.key.name.port else "")
                    for row in rows for f in row.frontends if f.kind is FrontendKind.CLUSTER_IP})
        )  # fmt: skip
        raise TraceError(f"DST: Service {name} has no port {quoted(port)}; it has {there or 'none that it gets'}")
    if not port and len({(row.key.name, row.key.protocol) for row, _ in at_cluster_ip}) != 1:
        return Several(f"Service {name}", tuple(
            Listing(
                endpoint_text(frontend.address, frontend.port) if frontend.address else f"node port {frontend.port}",
                row.key.protocol, str(row.key.name), frontend.kind,
            )
            for row, frontend in frontends
        ))  # fmt: skip
    return sorted(
        Target(Address(row.key.family, frontend.address or ""), frontend.port, row.key.protocol)
        for row, frontend in at_cluster_ip
    )


def _meant(asked: str, name: str, number: int, at_cluster_ip: bool) -> bool:
    return at_cluster_ip and asked in (name, str(number))
