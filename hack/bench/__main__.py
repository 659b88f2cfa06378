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
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from hack.bench import report as shown
from hack.bench.agents import Nodeproxy
from hack.bench.feeds import SOURCES
from hack.bench.options import MODES, SCENARIOS, Options, ShapesType, Sizes, Words, use_quick
from hack.bench.results import Machine, Part, Report, merged
from hack.bench.session import Session
from hack.controlplane.build import BuildError, binary
from hack.controlplane.processes import StartError
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.namespace import NamespaceError
from nodeproxy.sandbox.pace import factor

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(invoke_without_command=True, context_settings={"max_content_width": 110, "show_default": True})
@click.option("--mode", "modes", type=Words(MODES), default="iptables", help="The modes of all that are compared, in turn.")
@click.option(
    "--scenario",
    "scenarios",
    type=Words(SCENARIOS),
    default="startup,change",
    help="startup: first sync, change: single changes, idle: what it uses when left alone (all three with one process); "
    "rolling: a Deployment's pods replaced under load; churn: many changes a second; scale: startup and change for each of "
    "--shapes; connect: latency of connect(). Or all.",
)
@click.option("--quick", is_flag=True, is_eager=True, callback=use_quick, help="All scenarios, small: does it work?")
@click.option("--services", type=Sizes(), default="5000", help="How many Services; one run for each of several numbers.")
@click.option("--endpoints", type=click.IntRange(min=1), default=10, help="How many endpoints each.")
@click.option("--changes", type=click.IntRange(min=1), default=15, help="How many single changes.")
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
    "seconds. kube-proxy cannot use manifests: it then gets an API server. rolling and churn write to an API server, that "
    "of these sources or else static.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="PATH|built",
    help="Run this kube-proxy, too, or the one that hack/controlplane builds. May be repeated.",
)
@click.option(
    "--shapes",
    type=ShapesType(),
    default="100x10,1000x10,5000x10,10000x10,5000x50,40000x1",
    help="The states of scale. Who times out with one does not run with a larger one.",
)
@click.option("--replicas", type=click.IntRange(min=1), default=10, help="How many pods rolling replaces.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0.0),
    default=1.0,
    metavar="SECONDS",
    help="How long after it is terminating a pod ends in rolling; what reaches it later has failed.",
)
@click.option("--churn-rate", type=click.FloatRange(min=0.1), default=100.0, help="Changes a second in churn.")
@click.option("--churn-seconds", type=click.FloatRange(min=0.1), default=30.0, help="How long churn lasts.")
@click.option(
    "--connect-services",
    type=Sizes(),
    default="10,100,1000,5000,10000",
    help="Among how many Services to connect: a curve; 10,10000 is the short form.",
)
@click.option("--connections", default=2000, help="Connections to each address in the connect scenario.")
@click.option(
    "--idle",
    type=click.FloatRange(min=0.1),
    default=60.0,
    metavar="SECONDS",
    help="How long idle leaves the agent alone. With that scenario periodic syncs come as by default; else they are put "
    "off, so that they are not counted with changes.",
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
@click.option("--markdown", "markdown_file", type=_FILE, help="Write the tables here.")
@click.option("--plot", "plot_file", type=_FILE, help="Write plots (SVG) here.")
@click.pass_context
def main(
    ctx: click.Context, /, json_file: Path | None, markdown_file: Path | None, plot_file: Path | None, **values: Any
) -> None:
    """Measure nodeproxy, and any kube-proxy beside it, on nodes in network namespaces. Needs root.

    A contender that fails or times out is a row that says so. The exit status is 1 if nodeproxy is one.
    """
    if ctx.invoked_subcommand is not None:
        return
    if os.geteuid() != 0:
        raise click.ClickException("needs root: programs a real kernel in network namespaces")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that everything is cleaned up
    options = Options(**values)
    if "ipvs" in options.modes:
        _require_ipvs()
    result = Report([_part(options)])
    programs = [_program(path) for path in options.peers]
    files = (json_file, markdown_file, plot_file)
    with tempfile.TemporaryDirectory(prefix="nodeproxy-bench-profile-") as directory:
        session = Session(options, result, programs, Path(directory) / "profile" if options.profile else None)
        try:
            session.run()
        finally:  # what was measured is not lost if the rest cannot be, or is interrupted
            _write(result, *files)
    if any(agent == Nodeproxy.name for agent, _, _ in result.failed):
        sys.exit(1)


@main.command("report")
@click.argument("json_files", nargs=-1, required=True, metavar="JSON...", type=click.Path(path_type=Path, exists=True))
@click.option("--json", "json_file", type=_FILE, help="Write all of them together here.")
@click.option("--markdown", "markdown_file", type=_FILE, help="Write the tables here.")
@click.option("--plot", "plot_file", type=_FILE, help="Write plots (SVG) here.")
def report_command(
    json_files: tuple[Path, ...], json_file: Path | None, markdown_file: Path | None, plot_file: Path | None
) -> None:
    """Show what earlier runs wrote by --json, as one: modes that different kernels have, say."""
    reports = []
    for file in json_files:
        try:
            reports.append(msgspec.json.decode(file.read_bytes(), type=Report))
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise click.ClickException(f"{file} is no report of the benchmark: {error}") from error
    _write(merged(reports), json_file, markdown_file, plot_file)


def _write(result: Report, json_file: Path | None, markdown_file: Path | None, plot_file: Path | None) -> None:
    shown.show(_console(), result)
    if json_file:
        _file(json_file).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    if markdown_file:
        _file(markdown_file).write_text(shown.markdown(result), encoding="utf-8")
    if plot_file:
        from hack.bench import plot  # noqa: PLC0415

        plot.write(plot_file, result)


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _require_ipvs() -> None:
    try:
        with IPVS() as ipvs:
            ipvs.require()
    except KernelError as error:
        command = shlex.join(["python", "-m", "hack.vm", "run", "--", "python", "-m", "hack.bench", *sys.argv[1:]])
        raise click.ClickException(
            f"{error}\nIn a VM that has it: {command}\nTwo --json files together: python -m hack.bench report A.json B.json"
        ) from error


def _program(path: str) -> Path:
    program = binary("kube-proxy") if path == "built" else Path(path).absolute()
    if not os.access(program, os.X_OK):
        raise click.BadParameter(f"{path} is not a program", param_hint="--peer")
    return program


def _console() -> Console:
    """As wide as the tables need where the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=220)


def _part(options: Options) -> Part:
    version = subprocess.run(["iptables", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return Part(
        command=shlex.join(["python", "-m", "hack.bench", *sys.argv[1:]]),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        modes=options.modes,
        machine=Machine(
            cores=os.cpu_count() or 1,
            kernel=platform.release(),
            iptables=version,
            python=platform.python_version(),
            load_average=round(os.getloadavg()[0], 2),
            time_factor=round(factor(), 1),
        ),
    )


if __name__ == "__main__":
    try:
        main()
    except (BuildError, StartError, NamespaceError) as failure:
        sys.exit(str(failure))
