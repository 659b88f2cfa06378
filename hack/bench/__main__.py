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
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from hack.bench import plot, report
from hack.bench.agents import Contender, KubeProxy, Nodeproxy
from hack.bench.connecting import ConnectPlan, ConnectScenario
from hack.bench.feeds import SOURCES, ApiServerFeed, Feed, open_feed, shape_of
from hack.bench.profiled import print_top
from hack.bench.results import Machine, Report, Run
from hack.bench.scenarios import PODS, Plan, measure_all, warm_up
from hack.controlplane.build import BuildError, binary
from hack.controlplane.processes import StartError
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.agent import Variant
from nodeproxy.sandbox.namespace import NamespaceError
from nodeproxy.sandbox.pace import factor, scaled

_TIMEOUTS = {"iptables": 300.0, "ipvs": 900.0}


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


class Sizes(click.ParamType[list[int]]):
    """Some numbers from 1 on, separated by commas: each once, the least first."""

    name = "number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            numbers = sorted({int(part) for part in str(value).split(",")})
        except ValueError:
            numbers = []
        if not numbers or numbers[0] < 1:
            self.fail(f"{value}: numbers from 1 on, separated by commas", param, ctx)
        return numbers


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    mode: str
    services: list[int]
    endpoints: int
    changes: int
    variants: list[Variant] | None
    sources: list[str]
    peers: tuple[str, ...]
    scenarios: list[str]
    connect: bool
    connect_services: tuple[int, int]
    connections: int
    idle: float
    rounds: int
    timeout: float | None
    floor: bool
    profile: bool
    json_file: Path | None
    plot_file: Path | None

    @property
    def periodic(self) -> bool:
        """Whether agents sync every now and then, as by default: while idling, that is what they do."""
        return self.idle > 0


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(context_settings={"max_content_width": 110, "show_default": True})
@click.option(
    "--mode", type=click.Choice(["iptables", "ipvs"]), default="iptables", help="The mode of all that are compared."
)
@click.option("--services", type=Sizes(), default="5000", help="How many Services; one run for each of several numbers.")
@click.option("--endpoints", default=10, help="How many endpoints each.")
@click.option("--changes", default=15, help="How many times an endpoint is moved, one at a time.")
@click.option(
    "--variants",
    type=Words(("legacy", "nft")),
    show_default="legacy,nft; nft in IPVS mode, which has few rules",
    help="Which iptables, in turn.",
)
@click.option(
    "--source",
    "sources",
    type=Words(SOURCES),
    default="manifests",
    help="Where the state comes from; one run for each. static is an API server that needs no etcd and is filled in "
    "seconds. kube-proxy cannot use manifests: it then gets an API server.",
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
    type=Words(("sync", "connect")),
    default="sync",
    help="sync: first sync, changes, idling; connect: latency of connect().",
)
@click.option("--connect", is_flag=True, help="The connect scenario besides the others.")
@click.option("--connect-services", type=(int, int), default=(10, 10_000), help="Few and many Services to connect among.")
@click.option("--connections", default=2000, help="Connections to each address in the connect scenario.")
@click.option(
    "--idle",
    type=click.FloatRange(min=0.0),
    default=0.0,
    metavar="SECONDS",
    help="After the changes leave the agent alone for so long, and tell what it uses (0: do not). Periodic syncs then come "
    "as by default; without this they are put off, so that they are not counted with changes.",
)
@click.option("--rounds", default=1, help="How many times everything but connect is repeated.")
@click.option(
    "--timeout",
    type=float,
    show_default="300; 900 in IPVS mode",
    help="Seconds that a first sync may take, on a machine of usual speed. A slow one gets several times as many: in an "
    "emulated VM, where kube-proxy may take more than an hour for 5000 Services in IPVS mode, the default is three hours.",
)
@click.option("--floor", is_flag=True, help="Time iptables-restore alone with the same rules, too (iptables mode only).")
@click.option("--profile", is_flag=True, help="Run nodeproxy under cProfile and print what took longest. Slows it down.")
@click.option("--json", "json_file", type=_FILE, help="Write all samples here.")
@click.option("--plot", "plot_file", type=_FILE, help="Write a bar chart (SVG) here.")
def main(**values: Any) -> None:
    """Measure nodeproxy, and any kube-proxy beside it, on nodes in network namespaces. Needs root."""
    if os.geteuid() != 0:
        raise click.ClickException("needs root: programs a real kernel in network namespaces")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that everything is cleaned up
    options = Options(**values)
    if options.mode == "ipvs":
        _require_ipvs()
    result = _new_report(options)
    peers = _peers(options)
    with tempfile.TemporaryDirectory(prefix="nodeproxy-bench-profile-") as directory:
        bench = _Bench(options, result, peers, Path(directory) / "profile" if options.profile else None)
        if "sync" in options.scenarios:
            bench.run()
        if options.connect or "connect" in options.scenarios:
            bench.connect()
    report.show(_console(), result)
    if options.json_file:
        options.json_file.parent.mkdir(parents=True, exist_ok=True)
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
        self._ours = Nodeproxy(options.mode, periodic=options.periodic, profile=profile)
        self._variants: list[Variant] = options.variants or (["nft"] if options.mode == "ipvs" else ["legacy", "nft"])
        self._timeout = scaled(options.timeout or _TIMEOUTS[options.mode])
        self._started = time.monotonic()

    def run(self) -> None:
        """First sync, changes, idle. Manifests come first: the API server then is not there to take processor time."""
        for source, contenders in self._contenders().items():
            with closing(open_feed(source, PODS[0])) as feed:
                for contender in contenders:
                    self.say(f"{source}: warming up {contender.name}")
                    warm_up(contender, feed, self._variants[0], self._timeout, self.say)
                there = 0
                for services in self._options.services:
                    self.say(f"{source}: making {services} Services x {self._options.endpoints} endpoints")
                    feed.add(shape_of(services - there, self._options.endpoints, first=there))
                    there = services
                    self._measure(contenders, feed, services)

    def _measure(self, contenders: list[Contender], feed: Feed, services: int) -> None:
        options = self._options
        plan = Plan(
            shape=shape_of(services, options.endpoints),
            changes=options.changes,
            idle=options.idle,
            floor=options.floor,
            timeout=self._timeout,
        )
        for _ in range(options.rounds):
            for run in measure_all(contenders, feed, self._variants, plan, self.say):
                self._result.runs.append(run)
                self._show_profile(run)

    def connect(self) -> None:
        """Latency of connect(). What is in the kernel does not depend on the source: one is enough."""
        options = self._options
        few, many = options.connect_services
        plan = ConnectPlan(few=few, many=many, connections=options.connections, timeout=self._timeout)
        ours = options.sources[0]
        with ConnectScenario(plan, self.say) as scenario:
            if self._peers and ours not in KubeProxy.sources:
                scenario.program([self._ours], ours, self._variants)
                scenario.program(self._peers, ApiServerFeed.name, self._variants)
            else:
                scenario.program([self._ours, *self._peers], ours, self._variants)
            self.say(f"connecting {options.connections} times to each address")
            self._result.connect = scenario.measure()

    def say(self, text: str) -> None:
        """A line of progress, with the time since the start."""
        first_line = text.partition("\n")[0]
        print(f"[{time.monotonic() - self._started:6.1f} s] {first_line}", file=sys.stderr, flush=True)

    def _contenders(self) -> dict[str, list[Contender]]:
        """Who runs from which source: kube-proxy from each that it can use, or else from an API server."""
        found: dict[str, list[Contender]] = {source: [self._ours] for source in SOURCES if source in self._options.sources}
        if self._peers:
            for source in [source for source in found if source in KubeProxy.sources] or [ApiServerFeed.name]:
                found.setdefault(source, []).extend(self._peers)
        return found

    def _show_profile(self, run: Run) -> None:
        if self._profile is not None and self._profile.exists():
            print(f"\n{run.title}")
            print_top(self._profile)
            self._profile.unlink()


def _require_ipvs() -> None:
    try:
        with IPVS() as ipvs:
            ipvs.require()
    except KernelError as error:
        command = shlex.join(["python", "-m", "hack.vm", "run", "--", "python", "-m", "hack.bench", *sys.argv[1:]])
        raise click.ClickException(f"{error}\nIn a VM that has it: {command}") from error


def _peers(options: Options) -> list[Contender]:
    made: list[Contender] = []
    for path in options.peers:
        program = binary("kube-proxy") if path == "built" else Path(path).absolute()
        if not os.access(program, os.X_OK):
            raise click.BadParameter(f"{path} is not a program", param_hint="--peer")
        made.append(KubeProxy(options.mode, program, periodic=options.periodic))
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
            time_factor=round(factor(), 1),
        ),
        mode=options.mode,
        services=options.services,
        endpoints=options.endpoints,
    )


if __name__ == "__main__":
    try:
        main()
    except (BuildError, StartError, NamespaceError) as failure:
        sys.exit(str(failure))
