"""Owns `nodeproxy compare`: both modes on the same cluster state, each on a throw-away node, with real packets."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from nodeproxy.cli.command_line import fail
from nodeproxy.cli.options import options
from nodeproxy.cli.state_options import STATE_EPILOG, STATE_OPTIONS, snapshot_of
from nodeproxy.cli.types import StringList
from nodeproxy.configuration.agent_config import Mode

if TYPE_CHECKING:
    from nodeproxy.compare.comparison import Report
    from nodeproxy.compare.results import Comparison

_VARIANTS: Final = ("legacy", "nft")
_EPILOG: Final = (
    "Exit status: 1 where anything disagrees, or a mode could not be run; 2 for wrong usage. Where this kernel has no IPVS, "
    "that mode is run in the VM of nodeproxy's repository; without one, and without --modes, only iptables mode is run. "
    "What a mode costs is told, and never judged. "
)


@click.command(epilog=_EPILOG + STATE_EPILOG)
@click.option("--modes", type=StringList(), default="", metavar="MODE,...", help="Default: iptables,ipvs.")
@click.option(
    "--variants", type=StringList(), default="", metavar="VARIANT,...",
    help="Variants of iptables: legacy, nft or both. Default: the one that this machine uses.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--html", "html_path", type=click.Path(path_type=Path), metavar="FILE", help="Write a report for a browser.")
@click.option(
    "--limit", type=click.IntRange(1), default=500, show_default=True,
    help="Service ports that are probed at most. Of more a sample is, of every sort some; all are programmed.",
)  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True, help="Of the sample. The same seed gives the same one.")
@click.option("--changes", type=click.IntRange(0), default=20, show_default=True, help="Changes of an endpoint to measure.")
@click.option(
    "--connects", type=click.IntRange(0), default=500, show_default=True,
    help="Connections to each of three cluster IPs to measure.",
)  # fmt: skip
@options(STATE_OPTIONS)
@click.pass_context
def compare(
    context: click.Context,
    /,
    *,
    modes: tuple[str, ...],
    variants: tuple[str, ...],
    output: str,
    html_path: Path | None,
    limit: int,
    seed: int,
    changes: int,
    connects: int,
    **given: Any,
) -> None:
    """Show what each mode makes of a cluster state: the same answers? and at what cost?

    The state is taken once. Each mode programs it on a node of its own in network namespaces, which is gone afterwards; real
    packets are sent to every frontend from a pod, from the node and from outside, and what becomes of them is held against
    the forwarding table and against the other modes. Nothing else of this machine is touched. Needs root.
    """
    chosen = _words("--modes", modes, tuple(Mode)) or tuple(Mode)
    asked_variants = _words("--variants", variants, _VARIANTS)
    if os.geteuid() != 0:
        fail("compare needs root: it makes network namespaces")
    if find_spec("nodeproxy.compare") is None:
        fail("compare is not in this image, whose pods make no network namespaces: take a snapshot, and compare elsewhere")
    write_html = None if html_path is None else _html_writer(html_path)
    snapshot = snapshot_of(context)

    import msgspec  # noqa: PLC0415

    from nodeproxy.compare.comparison import CompareError, Options  # noqa: PLC0415
    from nodeproxy.compare.comparison import compare as run  # noqa: PLC0415

    told = given.get("iptables_variant") or snapshot.config.iptables_variant
    wanted = Options(
        modes=[Mode(mode) for mode in chosen],
        variants=asked_variants or ((told,) if told else (_found_variant(),)),
        default_modes=not modes,
        limit=limit,
        seed=seed,
        changes=changes,
        connects=connects,
    )
    try:
        with _progress() as report:
            comparison = run(snapshot, wanted, report)
    except CompareError as error:
        fail(str(error))
    if output == "json":
        click.echo(msgspec.json.encode(comparison))
    else:
        from rich.console import Console  # noqa: PLC0415

        from nodeproxy.compare.table import show  # noqa: PLC0415

        show(comparison, Console(width=None if sys.stdout.isatty() else 140))
    if write_html is not None:
        write_html(comparison)
    context.exit(int(comparison.failed))


def _words(flag: str, given: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Each once. Raises click.UsageError for what is none of those allowed."""
    for word in given:
        if word not in allowed:
            raise click.UsageError(f"{flag}: {word!r} is none of {', '.join(allowed)}")
    return tuple(dict.fromkeys(given))


def _found_variant() -> str:
    from nodeproxy.kernel.errors import KernelError  # noqa: PLC0415
    from nodeproxy.kernel.variant import detect_variant  # noqa: PLC0415

    try:
        return str(detect_variant().variant)
    except KernelError as error:
        fail(str(error))


def _html_writer(path: Path) -> Callable[[Comparison], None]:
    """What writes the report; ends the command now where it could not, before there is anything to lose."""
    try:
        from nodeproxy.compare import html  # noqa: PLC0415
    except ImportError as error:
        fail(f"--html needs {error.name}: pip install 'nodeproxy[compare]'")

    def told(work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            fail(f"--html {error.filename or path}: {error.strerror or error}")

    told(lambda: html.make_room(path))
    return lambda comparison: told(lambda: html.write(comparison, path))


@contextmanager
def _progress() -> Iterator[Report]:
    """A line on standard error that tells how far it is, where that is a terminal; else nothing."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("taking the snapshot", total=1)

        def report(mode: str, stage: str, done: int, of: int) -> None:
            bar.update(task, description=f"{mode}: {stage}", completed=done, total=of)

        yield report
