"""Owns the comparison as a whole: one mode after the other on the same snapshot, and what they did beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from msgspec import Struct

from nodeproxy.compare import running
from nodeproxy.compare.node import adapted_words
from nodeproxy.compare.one_mode import ModeRun, Work
from nodeproxy.compare.places import PlacesError, find_places, with_node_addresses
from nodeproxy.compare.probing import Fault, Progress
from nodeproxy.compare.results import Comparison, Difference, ModeResult, ProbeResult, shortened
from nodeproxy.compare.sampling import choose, scope
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.snapshot.model import Snapshot, SnapshotError, left_out
from nodeproxy.snapshot.view import NodeView

Report = Callable[[str, str, int, int], None]
"""Mode, what is being done, how much of it is done, of how much."""
RunOne = Callable[[Work, Snapshot, Progress], ModeRun]


class CompareError(Exception):
    """Nothing can be compared; one line."""


class Options(Struct, frozen=True):
    """What to compare and how much of it. `default_modes`: the modes were not asked for by name, one may be left out."""

    modes: Sequence[Mode]
    variants: Sequence[str]
    default_modes: bool = False
    limit: int = 500
    seed: int = 1
    changes: int = 20
    connects: int = 500


def compare(snapshot: Snapshot, options: Options, report: Report, run_one: RunOne | None = None) -> Comparison:
    """Compare modes on a snapshot. `run_one` does one mode's work; by default a process does. Raises CompareError."""
    started = time.monotonic()
    try:
        view = NodeView(snapshot, mode=Mode.IPTABLES)
        snapshot, made_up = with_node_addresses(snapshot, view)
        view = NodeView(snapshot, mode=Mode.IPTABLES) if made_up else view
        find_places(view)
        run_one = run_one or _in_a_process(snapshot)
    except (PlacesError, SnapshotError) as error:
        raise CompareError(str(error)) from error
    if not view.table.rows:
        raise CompareError(f"{snapshot.origin}: no Service port to compare ({len(snapshot.objects)} objects)")
    runs: list[ModeRun] = []
    not_run: dict[str, str] = {}
    for mode in options.modes:
        if options.default_modes and (lacking := running.where(mode).lacking) is not None:
            not_run[str(mode)] = lacking
            continue
        for variant in options.variants:
            runs.append(_one(snapshot, (mode, variant), options, report, run_one))
    chosen = choose(view.table, options.limit, options.seed)
    disagreements, by_design = _differences(runs)
    return Comparison(
        version=version("nodeproxy"),
        origin=snapshot.origin,
        taken=snapshot.taken,
        node=snapshot.config.node_name,
        machine=running.machine(),
        seed=options.seed,
        scope=scope(view.table, chosen, options.limit, options.seed),
        modes=tuple(one.result for one in runs),
        disagreements=disagreements,
        by_design=by_design,
        refused=(
            *map(left_out, view.refused),
            *(str(problem) for problems in view.problems.values() for problem in problems),
        ),
        left_out=len(view.refused),
        not_run=not_run,
        adapted=(*made_up, *adapted_words(snapshot.config)),
        seconds=time.monotonic() - started,
    )


def _one(snapshot: Snapshot, way: tuple[Mode, str], options: Options, report: Report, run_one: RunOne) -> ModeRun:
    mode, variant = way
    name = f"{mode} ({variant})"
    work = Work(
        mode=mode,
        variant="legacy" if variant == "legacy" else "nft",
        limit=options.limit,
        seed=options.seed,
        changes=options.changes,
        connects=options.connects,
    )
    return run_one(work, snapshot, lambda stage, done, of: report(name, stage, done, of))


def _in_a_process(snapshot: Snapshot) -> RunOne:
    """Work is done by a process, natively or in a VM; the snapshot is packed once."""
    archive = running.packed(snapshot)

    def run(work: Work, _: Snapshot, progress: Progress) -> ModeRun:
        at = running.where(work.mode)
        if at.lacking is not None:
            return ModeRun(ModeResult(str(work.mode), work.variant, "nowhere", at.lacking))
        return running.run(at, work, archive, progress)

    return run


_Key = tuple[str, str, str]


def _differences(runs: Sequence[ModeRun]) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    """What is not as expected, and what is by design not as the table says; with what the other modes did there."""
    seen = {one.result.name: _by_probe(one.result) for one in runs}
    found: tuple[list[Difference], list[Difference]] = ([], [])
    for one in runs:
        for fault in one.faults:
            found[fault.by_design].append(_difference(one.result.name, fault, seen))
    return tuple(found[False]), tuple(found[True])


def _by_probe(result: ModeResult) -> dict[_Key, ProbeResult]:
    return {
        (frontend.service_port, frontend.name, str(probe.sender)): probe
        for frontend in result.frontends
        for probe in frontend.probes
    }


def _difference(mode: str, fault: Fault, seen: Mapping[str, Mapping[_Key, ProbeResult]]) -> Difference:
    key = (fault.service_port, fault.frontend, str(fault.sender))
    others = {
        other: ("as expected: " if probe.agrees else "") + shortened([str(one) for one in probe.seen])
        for other, probes in seen.items()
        if other != mode and (probe := probes.get(key)) is not None
    }
    return Difference(
        mode=mode,
        service_port=fault.service_port,
        frontend=f"{fault.frontend} ({fault.kind})" if fault.kind else fault.frontend,
        sender=str(fault.sender) if fault.sender else "",
        expected=fault.expected,
        seen=fault.seen,
        reason=fault.reason,
        other_modes=others,
    )
