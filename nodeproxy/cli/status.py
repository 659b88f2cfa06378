"""Owns `nodeproxy status`: what the agent on this node says of itself, for people and for tools."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Final, Literal

import click

from nodeproxy.cli.command_line import fail
from nodeproxy.cluster.findings import printable

if TYPE_CHECKING:
    from rich.console import Console

    from nodeproxy.agent.status import AgentStatus, Drift, Refusals, Size, SyncState, Trouble

_SHOWN: Final = 10  # of refused ServicePorts, problems and errors; the rest is in the JSON

Line = tuple[str, str, Literal["", "good", "bad", "warn"]]
"""A title (empty: as above), a text, and how it is to be taken."""

_STYLES: Final = {"": "", "good": "bold green", "bad": "bold red", "warn": "yellow"}


@click.command()
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--watch", type=click.FloatRange(min=0.2), metavar="SECONDS", help="Show it again and again, until stopped.")
def status(output: str, watch: float | None) -> None:
    """Say how the agent in this network namespace is doing. Exit status 0 where the kernel is in sync, else 1."""
    if watch is None:
        sys.exit(0 if _show(output, again=False) else 1)
    with suppress(KeyboardInterrupt):
        while True:
            _show(output, again=True)
            time.sleep(watch)


def _show(output: str, *, again: bool) -> bool:
    """Print the status once; whether the kernel is in sync. `again`: over what is on the terminal."""
    import msgspec  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415 - the agent does without

    from nodeproxy.snapshot.agent_socket import AgentNotRunning, ask, decode_status  # noqa: PLC0415

    try:
        body = ask("/status")
        told = decode_status(body)
    except AgentNotRunning as error:
        if not again:
            fail(str(error))
        click.echo(f"nodeproxy: {error}", err=True)  # it may come
        return False
    if output == "json":
        click.echo(msgspec.json.format(body, indent=0 if again else 2))
    else:
        console = Console(highlight=False, markup=False, emoji=False)
        if again:
            console.clear()
        _print(console, lines(told))
    return told.in_sync


def _print(console: Console, shown: Iterable[Line]) -> None:
    from rich.text import Text  # noqa: PLC0415

    for title, text, taken in shown:
        console.print(Text.assemble((f"{title:<10}", "bold"), (printable(text), _STYLES[taken])), soft_wrap=True)


def lines(told: AgentStatus) -> Iterator[Line]:
    """The status in words."""
    since = f"since {told.started} ({_ago(told.started, told.now)})"
    variant = f" ({told.variant})" if told.variant else ""
    yield ("", "in sync", "good") if told.in_sync else ("", "NOT IN SYNC", "bad")
    for reason in told.why_not:
        yield "", reason, "bad"
    yield "Agent", f"nodeproxy {told.version}, {told.mode} mode{variant}, node {told.node}, pid {told.pid}, {since}", ""
    if told.mode is not told.configured_mode:
        yield "", f"configured is {told.configured_mode} mode", "warn"
    yield "Sync", _sync(told.sync, told.now), "" if told.sync.in_time and told.sync.error is None else "bad"
    heard = f"last event {_ago(told.source.last_event, told.now)} ago" if told.source.last_event else "no event yet"
    complete = "lists complete" if told.source.lists_complete else "lists not complete"
    yield "Source", f"{told.source.origin}; {complete}; {heard}", "" if told.source.lists_complete else "bad"
    counts = told.counts
    held = (
        (counts.services, "Services"),
        (counts.service_ports, "ServicePorts"),
        (counts.frontends, "frontends"),
        (counts.backends, "backends"),
        (counts.health_checks, "health-check ports"),
        (counts.virtual_servers, "virtual servers"),
    )
    yield "Holds", ", ".join(f"{count:,} {what}" for count, what in held if count is not None), ""
    for family, tables in counts.rules.items():
        rules = ", ".join(f"{table} {count:,}" for table, count in tables.items())
        yield "", f"{family} rules: {rules}", ""
    yield from _largest(told.most_backends, "backends")
    yield from _largest(told.most_frontends, "frontends")
    yield from _drift(told)
    yield from _refused(told.refused)
    yield from _several("Problems", told.problems.count, told.problems.first, "warn")
    if told.draining_real_servers:
        yield "Draining", f"{told.draining_real_servers:,} real servers keep their connections and get no new ones", ""
    for other in told.other_proxies:
        yield "Others", other, "warn"
    yield from _several("Errors", len(told.errors), [_trouble(one) for one in reversed(told.errors)], "warn")


def _sync(sync: SyncState, now: str) -> str:
    parts = []
    if sync.last is not None:
        extent = "all" if sync.last.full else f"{sync.last.rows:,}"
        parts.append(f"last {_ago(sync.last.at, now)} ago, took {_seconds(sync.last.seconds)} ({extent} ServicePorts)")
    else:
        parts.append("none yet")
    pending = f"{sync.pending:,} Services pending" if sync.pending else "nothing pending"
    parts.append(pending if sync.in_time else f"{pending}, late")
    if sync.error is not None:
        again = f"; again in {sync.retry_seconds:g} s" if sync.retry_seconds is not None else ""
        parts.append(f"failed at {sync.error.at}: {sync.error.text}{again}")
    return "; ".join(parts)


def _largest(sizes: Iterable[Size], what: str) -> Iterator[Line]:
    shown = ", ".join(f"{one.service} {one.count:,}" for one in sizes)
    if shown:
        yield "Largest", f"by {what}: {shown}", ""


def _drift(told: AgentStatus) -> Iterator[Line]:
    audited = f"{told.audits:,} audits, last {_ago(told.last_audit, told.now)} ago" if told.last_audit else "no audit yet"
    if not told.drift:
        yield "Drift", f"none seen; {audited}", ""
        return
    yield "Drift", f"seen, last as follows; {audited}", "warn"
    for one in reversed(told.drift):
        yield "", _one_drift(one), "bad" if one.repaired is None else ""


def _one_drift(one: Drift) -> str:
    repaired = "not put back yet" if one.repaired is None else f"put back {one.repaired}"
    return f"{one.found} changed by somebody: {', '.join(one.differs)}; {repaired}"


def _refused(refused: Refusals) -> Iterator[Line]:
    again = f" (again in {refused.retry_seconds:g} s)" if refused.retry_seconds is not None else ""
    yield from _several(
        "Refused", refused.count, [f"{one.service_port}: {one.reason}{again}" for one in refused.first], "bad"
    )


def _several(title: str, count: int, texts: Iterable[str], taken: Literal["bad", "warn"]) -> Iterator[Line]:
    shown = list(texts)[:_SHOWN]
    for index, text in enumerate(shown):
        yield ("" if index else title), text, taken
    if count > len(shown):
        yield "", f"and {count - len(shown):,} more", taken


def _trouble(one: Trouble) -> str:
    times = f" ({one.times} times)" if one.times > 1 else ""
    return f"{one.at} {one.where}: {one.text}{times}"


def _ago(then: str, now: str) -> str:
    """The time between two RFC 3339 timestamps, in two units at most."""
    seconds = round((datetime.fromisoformat(now) - datetime.fromisoformat(then)).total_seconds())
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts: list[str] = []
    for unit, size in units:
        if seconds >= size or (unit == "s" and not parts):
            parts.append(f"{max(0, seconds) // size} {unit}")
            seconds %= size
    return " ".join(parts[:2])


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
