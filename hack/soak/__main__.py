"""Load tests from a shell: `python -m hack.soak --help`."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from hack.bench.options import Words
from hack.soak import report
from hack.soak.agents import kube_proxy_binary
from hack.soak.events import EVENTS, Event
from hack.soak.field import FieldError
from hack.soak.report import Soak, Trouble
from hack.soak.runs import machine, run_event
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.agent import AgentError, Variant
from nodeproxy.sandbox.load.children import LoadError
from nodeproxy.sandbox.load.generator import affordable
from nodeproxy.sandbox.namespace import NamespaceError

WAYS: Final[dict[str, tuple[str, Variant]]] = {
    "legacy": ("iptables", "legacy"),
    "nft": ("iptables", "nft"),
    "ipvs": ("ipvs", "nft"),
    "ipvs-legacy": ("ipvs", "legacy"),
}
_REPOSITORY: Final = Path(__file__).resolve().parents[2]
_VM_RESULTS: Final = "build/soak"  # relative to the repository; git ignores it


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    events: list[str]
    modes: list[str]
    rate: float
    seconds: float
    times: int | None
    seed: int
    json_file: Path | None


@click.command(context_settings={"max_content_width": 110, "show_default": True})
@click.option("--events", type=Words(tuple(EVENTS)), default=",".join(EVENTS), help="Which events.")
@click.option(
    "--modes",
    type=Words(tuple(WAYS)),
    default="legacy,nft,ipvs",
    help="In which modes; where this kernel has no IPVS, a VM is started for that.",
)
@click.option("--rate", default=1000.0, help="Short connections in a second; fewer on a machine that cannot bear them.")
@click.option("--seconds", default=30.0, help="How long each event is under load, at least.")
@click.option("--times", type=int, help="How often each event happens. Default: as the event has it.", show_default=False)
@click.option("--seed", default=0, help="For what is left to chance.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures here.")
def main(**values: Any) -> None:
    """Load a node and let things happen to it: does anybody notice? Needs root. Exit status 1: somebody did."""
    if os.geteuid() != 0:
        raise click.ClickException("needs root: programs a real kernel in network namespaces")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that everything is cleaned up
    options = Options(**values)
    soak = Soak(shlex.join(["python", "-m", "hack.soak", *sys.argv[1:]]), machine(), time.strftime("%FT%TZ", time.gmtime()))
    natively = [way for way in options.modes if WAYS[way][0] != "ipvs" or not _lacks_ipvs()]
    console = Console() if sys.stdout.isatty() else Console(width=180)
    for way in natively:
        for event in _events(options, way):
            _carry_out(soak, event, way, options)
    if soak.rows:
        report.show(console, soak.rows)
    status = 0
    if elsewhere := [way for way in options.modes if way not in natively]:
        status = _in_vm(soak, elsewhere, options)
    if options.json_file:
        report.write(options.json_file, soak)
    for trouble in soak.troubles:
        console.print(f"{trouble.event}, {trouble.way}: {trouble.error}", highlight=False, markup=False)
    if status or soak.troubles or any(row.bad for row in soak.rows):
        sys.exit(1)


def _events(options: Options, way: str) -> Sequence[Event]:
    """The events that make sense in a way."""
    wanted = [event for event in EVENTS.values() if event.name in options.events and WAYS[way][0] in event.modes]
    for event in wanted:
        if event.needs_kube_proxy and kube_proxy_binary() is None:
            _say(f"{way}: {event.title}: left out, there is no kube-proxy (KUBE_PROXY=path, or hack/controlplane/build.py)")
    return [event for event in wanted if not event.needs_kube_proxy or kube_proxy_binary() is not None]


def _carry_out(soak: Soak, event: Event, way: str, options: Options) -> None:
    mode, variant = WAYS[way]
    times = options.times or event.times
    start = time.monotonic()
    _say(f"{way}: {event.title}, {times} x in {options.seconds:g} s or more …")
    try:
        row = run_event(
            event, mode, variant, rate=affordable(options.rate), seconds=options.seconds, times=times, seed=options.seed
        )
    except (FieldError, AgentError, LoadError, NamespaceError) as error:
        soak.troubles.append(Trouble(event.name, way, str(error)))
        _say(f"{way}: {event.title}: FAILED after {time.monotonic() - start:.0f} s: {str(error).partition(chr(10))[0]}")
        return
    soak.rows.append(row)
    _say(
        f"{way}: {event.title}: {'NOT AS IT MUST BE' if row.bad else 'ok'}, {row.attempts} attempts, {row.failed} failed, "
        f"{row.reset} reset, {row.wrong} wrong, longest stall {row.stall * 1000:.0f} ms; {time.monotonic() - start:.0f} s"
    )


def _in_vm(soak: Soak, ways: Sequence[str], options: Options) -> int:
    """The same in a VM with IPVS; adds its rows, and returns its exit status. It prints a table of its own."""
    (_REPOSITORY / _VM_RESULTS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_REPOSITORY / _VM_RESULTS) as directory:
        place = Path(directory).relative_to(_REPOSITORY)
        command = [sys.executable, "-m", "hack.vm", "run", "--fresh", "--env", "KUBE_PROXY", "--results", str(place), "--"]
        command += ["python", "-m", "hack.soak", "--modes", ",".join(ways), "--events", ",".join(options.events)]
        command += ["--rate", str(options.rate), "--seconds", str(options.seconds), "--seed", str(options.seed)]
        command += ["--times", str(options.times)] if options.times else []
        file = place / "soak.json"
        done = subprocess.run([*command, "--json", str(file)], cwd=_REPOSITORY, check=False)
        if (_REPOSITORY / file).exists():
            found = report.read(_REPOSITORY / file)
            soak.rows += found.rows
            soak.troubles += found.troubles
            soak.machine += f"; {', '.join(ways)}: {found.machine}"
    return done.returncode


def _lacks_ipvs() -> bool:
    try:
        with IPVS() as ipvs:
            ipvs.require()
    except KernelError:
        return True
    return False


def _say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%T')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
