"""The benchmark from a shell: `python -m hack.bench --help`."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from hack.bench import plot, report
from hack.bench.agents import Contender, KubeProxy, Nodeproxy
from hack.bench.connecting import ConnectPlan, ConnectScenario
from hack.bench.feeds import open_feed, shape_of
from hack.bench.profiled import print_top
from hack.bench.results import Machine, Report, Run
from hack.bench.scenarios import PODS, Plan, measure_all, warm_up
from hack.controlplane.build import BuildError, binary
from hack.controlplane.processes import StartError
from nodeproxy.sandbox.agent import Variant
from nodeproxy.sandbox.namespace import NamespaceError


class Words(click.ParamType[list[str]]):
    """Some of a few words, separated by commas, each once."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed
        self.name = ",".join(allowed)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        words = list(dict.fromkeys(word.strip() for word in str(value).split(",") if word.strip()))
        if not words or not set(words) <= set(self._allowed):
            self.fail(f"{value}: choose from {', '.join(self._allowed)}", param, ctx)
        return words


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    services: int
    endpoints: int
    changes: int
    variants: list[Variant]
    sources: list[str]
    peers: tuple[str, ...]
    scenarios: list[str]
    connect: bool
    connect_services: tuple[int, int]
    connections: int
    idle_seconds: float
    rounds: int
    timeout: float
    floor: bool
    profile: bool
    json_file: Path | None
    plot_file: Path | None


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(context_settings={"max_content_width": 110, "show_default": True})
@click.option("--services", default=5000, help="How many Services.")
@click.option("--endpoints", default=10, help="How many endpoints each.")
@click.option("--changes", default=15, help="How many times an endpoint is moved, one at a time.")
@click.option("--variants", type=Words(("legacy", "nft")), default="legacy,nft", help="Which iptables, in turn.")
@click.option(
    "--source",
    "sources",
    type=Words(("manifests", "apiserver")),
    default="manifests",
    help="Where nodeproxy gets the state from; one run for each. kube-proxy always uses the API server.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="PATH|built",
    help="Run this kube-proxy, too, or the one that hack/controlplane builds. May be repeated.",
)
@click.option(
    "--scenario",
    "scenarios",
    type=Words(("sync", "idle", "connect")),
    default="sync",
    help="sync: first sync and changes; idle: CPU while nothing changes; connect: latency of connect().",
)
@click.option("--connect", is_flag=True, help="The connect scenario besides the others.")
@click.option("--connect-services", type=(int, int), default=(10, 10_000), help="Few and many Services to connect among.")
@click.option("--connections", default=2000, help="Connections to each address in the connect scenario.")
@click.option("--idle-seconds", default=60.0, help="How long the idle scenario watches.")
@click.option("--rounds", default=1, help="How many times everything but connect is repeated.")
@click.option("--timeout", default=300.0, help="Seconds that a first sync may take.")
@click.option("--floor", is_flag=True, help="Time iptables-restore alone with the same rules, too.")
@click.option("--profile", is_flag=True, help="Run nodeproxy under cProfile and print what took longest. Slows it down.")
@click.option("--json", "json_file", type=_FILE, help="Write all samples here.")
@click.option("--plot", "plot_file", type=_FILE, help="Write a bar chart (SVG) here.")
def main(**values: Any) -> None:
    """Measure nodeproxy, and any kube-proxy beside it, on nodes in network namespaces. Needs root."""
    if os.geteuid() != 0:
        raise click.ClickException("needs root: programs a real kernel in network namespaces")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that everything is cleaned up
    options = Options(**values)
    result = _new_report(options)
    peers = _peers(options.peers)
    with tempfile.TemporaryDirectory(prefix="nodeproxy-bench-profile-") as directory:
        bench = _Bench(options, result, peers, Path(directory) / "profile" if options.profile else None)
        if {"sync", "idle"} & set(options.scenarios):
            bench.run()
        if options.connect or "connect" in options.scenarios:
            bench.connect()
    report.show(_console(), result)
    if options.json_file:
        options.json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    if options.plot_file:
        plot.write(options.plot_file, result)
    errors = [(run.agent, run.error) for run in result.runs] + [(run.agent, run.error) for run in result.connect]
    if any(error for agent, error in errors if agent == Nodeproxy.name):
        sys.exit(1)


class _Bench:
    """Carries out what the command line asks for, and adds to the report."""

    def __init__(self, options: Options, result: Report, peers: list[Contender], profile: Path | None) -> None:
        self._options = options
        self._result = result
        self._peers = peers
        self._profile = profile
        self._ours = Nodeproxy(profile)
        self._started = time.monotonic()

    def run(self) -> None:
        """First sync, changes, idle. Manifests come first: the API server then is not there to take processor time."""
        options = self._options
        plan = Plan(
            shape=shape_of(options.services, options.endpoints),
            changes=options.changes if "sync" in options.scenarios else 0,
            idle=options.idle_seconds if "idle" in options.scenarios else 0.0,
            floor=options.floor,
            timeout=options.timeout,
        )
        for source, contenders in self._contenders().items():
            self.say(f"{source}: making {options.services} Services x {options.endpoints} endpoints")
            feed = open_feed(source, plan.shape, PODS[0])
            try:
                for contender in contenders:
                    warm_up(contender, feed, options.timeout)
                for _ in range(options.rounds):
                    for run in measure_all(contenders, feed, options.variants, plan, self.say):
                        self._result.runs.append(run)
                        self._show_profile(run)
            finally:
                feed.close()

    def connect(self) -> None:
        """Latency of connect(). nodeproxy's rules do not depend on the source: one is enough."""
        options = self._options
        few, many = options.connect_services
        plan = ConnectPlan(few=few, many=many, connections=options.connections, timeout=options.timeout)
        ours = options.sources[0]
        with ConnectScenario(plan, self.say) as scenario:
            if self._peers and ours != "apiserver":
                scenario.program([self._ours], ours, options.variants)
                scenario.program(self._peers, "apiserver", options.variants)
            else:
                scenario.program([self._ours, *self._peers], ours, options.variants)
            self.say(f"connecting {options.connections} times to each address")
            self._result.connect = scenario.measure()

    def say(self, text: str) -> None:
        """A line of progress, with the time since the start."""
        first_line = text.partition("\n")[0]
        print(f"[{time.monotonic() - self._started:6.1f} s] {first_line}", file=sys.stderr, flush=True)

    def _contenders(self) -> dict[str, list[Contender]]:
        """Who runs from which source."""
        sources = self._options.sources
        found: dict[str, list[Contender]] = {
            source: [self._ours] for source in ("manifests", "apiserver") if source in sources
        }
        if self._peers:
            found.setdefault("apiserver", []).extend(self._peers)
        return found

    def _show_profile(self, run: Run) -> None:
        if self._profile is not None and self._profile.exists():
            print(f"\n{run.title}")
            print_top(self._profile)
            self._profile.unlink()


def _peers(paths: Sequence[str]) -> list[Contender]:
    made: list[Contender] = []
    for path in paths:
        program = binary("kube-proxy") if path == "built" else Path(path).absolute()
        if not os.access(program, os.X_OK):
            raise click.BadParameter(f"{path} is not a program", param_hint="--peer")
        made.append(KubeProxy(program))
    return made


def _console() -> Console:
    """As wide as the tables need where the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=220)


def _new_report(options: Options) -> Report:
    version = subprocess.run(["iptables", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return Report(
        command=shlex.join(["python", "-m", "hack.bench", *sys.argv[1:]]),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=Machine(
            cores=os.cpu_count() or 1,
            kernel=platform.release(),
            iptables=version,
            python=platform.python_version(),
            load_average=round(os.getloadavg()[0], 2),
        ),
        services=options.services,
        endpoints=options.endpoints,
    )


if __name__ == "__main__":
    try:
        main()
    except (BuildError, StartError, NamespaceError) as failure:
        sys.exit(str(failure))
