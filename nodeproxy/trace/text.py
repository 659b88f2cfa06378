"""Owns a trace as text for people: what must happen and why, then what the kernel says, then the warning where they differ.

Names and rules come from the cluster and from others: what is not printable is escaped, lest it commands the terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import click

from nodeproxy.cluster.findings import printable
from nodeproxy.trace.ends import Several, endpoint_text
from nodeproxy.trace.results import Agreement, Destination, Expected, KernelFinding, Sent, Trace, TracedEndpoint
from nodeproxy.trace.walk import Step

MANY = 20
"""So many endpoints or destinations are shown of each sort; all of them with `-o json`, or with `--all`."""

_CONFIRMS: Final = {
    True: "as the walk has it",
    False: "where the walk does not have it",
    None: "whether the walk has it so cannot be told",
}


def trace_lines(trace: Trace, *, everything: bool = False) -> Iterator[str]:
    """A trace, line by line."""
    most = None if everything else MANY
    for line in _lines(trace, most):
        yield printable(line)


def verdict_line(trace: Trace) -> str:
    """Whether kernel and table agree; coloured where the terminal has colours."""
    if trace.agreement is Agreement.DIFFERS:
        return click.style("WARNING: the kernel does not do what the forwarding table says", fg="red", bold=True)
    if trace.agreement is Agreement.UNKNOWN:
        return click.style("The kernel's rules could not be followed to the end; no difference up to there", fg="yellow")
    if trace.agreement is Agreement.AGREES:
        return click.style("The kernel does what the forwarding table says", fg="green")
    return f"Kernel: not looked at ({trace.kernel_left_out})"


def listing_lines(several: Several) -> Iterator[str]:
    """Frontends to choose from."""
    yield f"{printable(several.what)}: add a port to trace one of these"
    rows = [(f"{one.at}/{one.protocol}", one.kind, one.service_port) for one in several.frontends]
    yield from _table(rows)


def _lines(trace: Trace, most: int | None) -> Iterator[str]:
    packet = trace.packet
    yield (
        f"{packet.protocol.upper()} {packet.source} -> {endpoint_text(packet.destination, packet.port)}"
        f"   (from {packet.sender})"
    )
    yield f"Cluster state: {trace.state}"
    yield ""
    yield from _frontend(trace)
    yield from _endpoints(trace.endpoints, most)
    yield f"Expected: {_outcome(trace.expected)}"
    for reason in trace.expected.why:
        yield f"  - {reason}"
    for problem in trace.problems:
        yield f"  ! {problem}"
    if trace.kernel is not None:
        yield ""
        yield from _kernel(trace.kernel, most)
    if trace.sent is not None:
        yield ""
        yield _sent(trace.sent)
    if trace.differences or trace.notes:
        yield ""
    for note in trace.notes:
        yield f"Note: {note}"
    for difference in trace.differences:
        yield f"DIFFERENCE: {difference}"


def _sent(sent: Sent) -> str:
    told = _CONFIRMS[sent.confirms]
    if sent.to is None:
        what = "conntrack has no entry" if sent.confirms is None else "stopped before it left"
        how = f", {sent.refusal}" if sent.refusal else ""
        return f"Sent for real, from {sent.source}: {what}{how}; {told}"
    source = f", answers come to {sent.answers_to}" if sent.answers_to else ", source kept"
    return f"Sent for real, from {sent.source}: conntrack has it going to {sent.to}{source}; {told}"


def _frontend(trace: Trace) -> Iterator[str]:
    frontend = trace.frontend
    if frontend is None:
        yield "Frontend: none"
        return
    yield f"Frontend: {frontend.service_port}, {frontend.at}"
    yield f"  {frontend.policy}; {frontend.backend_set.capitalize()} set"
    if frontend.affinity_seconds is not None:
        yield f"  session affinity ClientIP, {frontend.affinity_seconds} s"
    if frontend.allowed_sources is not None:
        yield f"  allowed sources: {', '.join(frontend.allowed_sources) or 'none'}"


def _endpoints(endpoints: Sequence[TracedEndpoint], most: int | None) -> Iterator[str]:
    for used, title in ((True, "used"), (False, "not used")):
        found = [one for one in endpoints if one.used is used]
        if not found:
            continue
        yield f"Endpoints {title}: {len(found)}"
        yield from _table(
            [
                (endpoint_text(one.address, one.port) if one.port else one.address or "(no address)", one.reason,
                 f"EndpointSlice {one.slice}" + (f", node {one.node}" if one.node else ""))
                for one in found[:most]
            ]
        )  # fmt: skip
        yield from _more(len(found), most)


def _outcome(expected: Expected) -> str:
    if not expected.backends:
        return expected.outcome.upper()
    masqueraded = {backend.masquerade for backend in expected.backends}
    how = "masqueraded" if masqueraded == {True} else "source kept" if masqueraded == {False} else "masqueraded in part"
    count = len(expected.backends)
    return f"FORWARD to {f'one of {count} endpoints' if count > 1 else _place(expected)}, {how}"


def _place(expected: Expected) -> str:
    return endpoint_text(expected.backends[0].address, expected.backends[0].port)


def _kernel(finding: KernelFinding, most: int | None) -> Iterator[str]:
    yield f"Kernel ({finding.origin}):"
    yield from _steps(finding.steps, "  ")
    several = len(finding.destinations) > 1
    for destination in finding.destinations[:most]:
        if several:
            yield f"  {destination.chance:6.1%}"
        yield from _steps(destination.steps, "    " if several else "  ")
        yield f"{'    ' if several else '  '}=> {_end(destination)}"
    yield from _more(len(finding.destinations), most)
    if finding.last_steps:
        yield "  and then, whichever it is:"
        yield from _steps(finding.last_steps, "    ")


def _steps(steps: Sequence[Step], indent: str) -> Iterator[str]:
    for step in steps:
        where = f"{step.table} {step.chain}" + (f" {step.number}" if step.number else "")
        counted = f"  [{step.packets} packets]" if step.packets is not None else ""
        remark = f"  ({step.remark})" if step.remark else ""
        yield f"{indent}{f'{where}: ' if step.table else ''}{step.text}{remark}{counted}"


def _end(destination: Destination) -> str:
    parts = [destination.end]
    if destination.backend is not None:
        parts.append(f"to {destination.backend}")
    if destination.interface:
        parts.append(f"by {destination.interface}")
    if destination.masqueraded:
        parts.append("masqueraded")
    return ", ".join(parts) + (f" ({destination.reason})" if destination.reason else "")


def _more(count: int, most: int | None) -> Iterator[str]:
    if most is not None and count > most:
        yield f"  ... and {count - most} more (--all)"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
