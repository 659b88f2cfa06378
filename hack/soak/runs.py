"""Owns carrying out one event under load, and what clients noticed of it as a row."""

from __future__ import annotations

import os
import re
import time
from bisect import bisect_right
from collections.abc import Sequence

from msgspec import Struct

from hack.soak.agents import kube_proxy_binary
from hack.soak.events import Event, prepare_kube_proxy
from hack.soak.field import Field, FieldError
from nodeproxy.sandbox.agent import Variant
from nodeproxy.sandbox.load.generator import Load
from nodeproxy.sandbox.load.plan import CONNECTION, FRESH_FLOW, KEPT_FLOW, STREAM, Failure, Outcome, Report

_BEFORE = 1.0
_AFTER = 1.0
_SHOWN, _TRACED = 40, 6


class Row(Struct, frozen=True):
    """What clients noticed of an event. Times in seconds.

    `borne`: failures of an unplanned event in the time that it is given to heal; `wanting` names all others, with what had
    happened before each; `gap` is the longest time from such an event to the last request that failed by it.
    `stall`: the longest time that one target gave no success to short connections or UDP requests from one place;
    `slowest`: the longest that one request took; `stream_stall`: the longest that a line of a stream took.
    `repeated`: requests that were answered only after a packet was sent again. `moved`: how often sticky clients changed
    servers; `strayed`: how often they did although theirs was not terminating.
    `wanting` and `slow` tell of requests one by one; `traces` is what the kernel then remembered of the first of them.
    `late`: the longest time that a generator was held up itself, which stalls include. `programming`: the longest that the
    agent took to program a change.
    """

    event: str
    mode: str
    variant: str
    planned: bool
    times: int
    seconds: float
    rate: float
    attempts: int
    failed: int
    reset: int
    wrong: int
    borne: int
    gap: float
    repeated: int
    moved: int
    strayed: int
    stall: float
    slowest: float
    stream_stall: float
    streams: int
    late: float
    skipped: int
    programming: float
    conntrack: dict[str, int]
    wanting: tuple[str, ...]
    timeline: tuple[str, ...]
    slow: tuple[str, ...]
    traces: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def bad(self) -> bool:
        """Whether something failed that must not."""
        return bool(self.wanting)


def run_event(event: Event, mode: str, variant: Variant, *, rate: float, seconds: float, times: int, seed: int = 0) -> Row:
    """Do an event `times` times under a load of `seconds` at least, on a new node.

    Raises FieldError, AgentError or LoadError where the node, the agent or the load do not work at all.
    """
    with Field(mode, variant, rate=rate, seed=seed, api=event.api, bystanders=event.bystanders) as field:
        _prepare(event, field)
        before = field.conntrack()
        with Load(field.plans()) as load:
            time.sleep(_BEFORE)
            start = time.monotonic()
            event.do(field, times, seconds)
            time.sleep(max(_AFTER, start + seconds - time.monotonic()))
            if not field.agent.running():
                raise FieldError(f"the agent is not running any more\n{field.agent.log_tail()}")
            report = load.stop()
        after = field.conntrack()
        conntrack = {name: value - (before[name] if name != "entries" else 0) for name, value in after.items()}
        traces = field.traces(_ports([*report.failures, *report.slow]))
        return _row(event, field, load.began, report, conntrack=conntrack, traces=traces, how=(mode, times, rate))


def _prepare(event: Event, field: Field) -> None:
    if event.api:
        field.api.start()
    if event.needs_kube_proxy:
        binary = kube_proxy_binary()
        if binary is None:
            raise FieldError("no kube-proxy: name one in KUBE_PROXY")
        prepare_kube_proxy(field, binary)
    else:
        field.agent.start()
        field.agent.wait_ready()
    field.wait_programmed(list(field.pods), [])


def _row(
    event: Event,
    field: Field,
    began: float,
    report: Report,
    *,
    conntrack: dict[str, int],
    traces: Sequence[str],
    how: tuple[str, int, float],
) -> Row:
    mode, times, rate = how
    marks = [(moment - began, what) for moment, what in field.timeline]
    flushes = [moment for moment, what in marks if what == "flush"]
    borne: list[Failure] = []
    wanting: list[Failure] = []
    for failure in report.failures:
        (borne if _by_fault(failure, flushes, event.gap) else wanting).append(failure)
    total = report.count()
    requests = report.count(CONNECTION, KEPT_FLOW, FRESH_FLOW)
    streams = report.count(STREAM)
    unnoted = total.ended_badly - len(report.failures)
    lines = [_told(failure, marks) for failure in wanting[:_SHOWN]]
    if len(wanting) > _SHOWN or unnoted > 0:
        lines.append(f"and {len(wanting) - len(lines) + unnoted} more")
    strayed = [move for move in report.moves if field.leaving.get(move.before, float("inf")) - began > move.at]
    if event.keeps_affinity:
        lines += [f"affinity: {move}" for move in strayed[:_SHOWN]]
    if total.succeeded == 0:
        lines.append("nothing succeeded")
    return Row(
        event=event.name,
        mode=mode,
        variant=field.variant,
        planned=event.planned,
        times=times,
        seconds=report.seconds,
        rate=round(rate, 1),
        attempts=total.attempted,
        failed=total.failed,
        reset=total.reset,
        wrong=total.wrong,
        borne=len(borne),
        gap=round(max((_after(flushes, failure.began) for failure in borne), default=0.0), 3),
        repeated=total.repeated,
        moved=total.moved,
        strayed=len(strayed),
        stall=requests.stall,
        slowest=requests.slowest,
        stream_stall=streams.slowest,
        streams=streams.attempted,
        late=report.late,
        skipped=report.skipped,
        programming=round(field.slowest_programming, 3),
        conntrack=conntrack,
        wanting=tuple(lines),
        timeline=tuple(f"{moment:8.3f} {what}" for moment, what in marks),
        slow=tuple(_told(failure, marks) for failure in report.slow[:_SHOWN]),
        traces=tuple(traces),
        outcomes=report.outcomes,
    )


def _ports(failures: Sequence[Failure]) -> list[int]:
    """The client ports of the first few failures, as they are told."""
    found = (re.search(r"port (\d+)", failure.what) for failure in failures[:_TRACED])
    return [int(match[1]) for match in found if match]


def _by_fault(failure: Failure, faults: Sequence[float], gap: float) -> bool:
    """Whether a request was under way when one of the faults came, or begun until `gap` seconds after it."""
    return any(fault <= failure.at and failure.began <= fault + gap for fault in faults)


def _after(moments: Sequence[float], moment: float) -> float:
    """Seconds since the last of the (sorted) moments; 0 if there was none yet."""
    place = bisect_right(moments, moment)
    return moment - moments[place - 1] if place else 0.0


def _told(failure: Failure, marks: Sequence[tuple[float, str]]) -> str:
    """A failure, with what had happened before it was sent."""
    place = bisect_right([moment for moment, _ in marks], failure.began)
    if not place:
        return f"{failure}; before the event"
    moment, what = marks[place - 1]
    return f"{failure}; {failure.began - moment:.3f} s after: {what}"


def machine() -> str:
    """The kernel and the processors, for reports."""
    return f"Linux {os.uname().release}, {os.cpu_count()} processors"
