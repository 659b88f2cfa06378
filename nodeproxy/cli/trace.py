"""Owns `nodeproxy trace`: what would happen to a packet on this node and why, and what the kernel says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nodeproxy.cli.command_line import fail
from nodeproxy.cli.options import options
from nodeproxy.cli.state_options import STATE_EPILOG, STATE_OPTIONS, snapshot_of

if TYPE_CHECKING:
    from nodeproxy.cluster.names import Family
    from nodeproxy.snapshot.view import NodeView
    from nodeproxy.trace.kernel_view import KernelView
    from nodeproxy.trace.results import Trace

_OFFLINE = "a snapshot is looked at; --kernel compares it with the kernel here, --kernel-from with a saved one"


@click.command(epilog=STATE_EPILOG)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST[:PORT]")
@click.option(
    "--protocol", type=click.Choice(["tcp", "udp", "sctp"], case_sensitive=False),
    help="Default: the one that is served there; TCP where there are several or none.",
)  # fmt: skip
@click.option(
    "--kernel/--no-kernel", "with_kernel", default=None,
    help="Follow the packet through the rules in this network namespace's kernel.  [default: unless --snapshot is given]",
)  # fmt: skip
@click.option(
    "--kernel-from", type=click.Path(path_type=Path), metavar="PATH",
    help="Follow it through saved rules: a file that iptables-save printed, or a directory with files iptables-save, "
    "ip6tables-save, ipset-save and ipvsadm-save.",
)  # fmt: skip
@click.option(
    "--send", "really", is_flag=True,
    help="Also send the packet for real (one TCP SYN or empty UDP datagram; SRC must be «node»), and see where it went.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--all", "everything", is_flag=True, help="Show all endpoints and destinations, however many there are.")
@options(STATE_OPTIONS)
@click.pass_context
def trace(
    context: click.Context,
    /,
    *,
    source: str,
    destination: str,
    protocol: str | None,
    with_kernel: bool | None,
    kernel_from: Path | None,
    really: bool,
    output: str,
    everything: bool,
    **_: Any,
) -> None:
    """Say what would happen to a packet from SRC to DST on this node, and why.

    SRC is an address, «node» (the node itself) or «outside» (somebody outside the cluster). DST is ADDRESS:PORT,
    [IPV6]:PORT, node:PORT, NAMESPACE/SERVICE:PORT or SERVICE.NAMESPACE:PORT; a Service's port by number or name. Without a
    port the frontends there are listed.

    First comes what the forwarding table says: frontend, policy, endpoints and why each is in or out, masquerading. Then
    the packet, on paper, goes through the rules and virtual servers that the kernel really has, and exit status 1 says that
    the two differ. Nothing is changed, and nothing is sent but with --send.
    """
    from nodeproxy.snapshot.view import NodeView  # noqa: PLC0415 - other commands do without all this
    from nodeproxy.trace.ends import NODE, Several, TraceError, read_sender, read_targets  # noqa: PLC0415
    from nodeproxy.trace.kernel_view import KernelViewError  # noqa: PLC0415
    from nodeproxy.trace.tracer import Tracer, protocol_of  # noqa: PLC0415

    if kernel_from is not None and with_kernel is not None:
        raise click.UsageError("--kernel-from cannot be used together with --kernel or --no-kernel", context)
    view = NodeView(snapshot_of(context))
    live = context.params.get("snapshot_path") is None if with_kernel is None else with_kernel
    left_out = "--no-kernel" if with_kernel is False else "" if live or kernel_from is not None else _OFFLINE
    if really and (source != NODE or not live or kernel_from is not None):
        raise click.UsageError("--send needs «node» as SRC, and the kernel here", context)
    try:
        sender = read_sender(source)
        family = sender.address.family if sender.address is not None else None
        targets = read_targets(destination, protocol_of(protocol), view, family)
        if isinstance(targets, Several):
            _print_listing(targets, output)
            return
        with ExitStack() as open_kernels:
            tracer = Tracer(view, _kernels(view, kernel_from, live, open_kernels), left_out)
            traces = [tracer.trace(source, target, really=really) for target in targets]
    except TraceError as error:
        fail(str(error))
    except KernelViewError as error:
        fail(f"{error} (--no-kernel leaves the kernel out)" if live and kernel_from is None else str(error))
    _print(traces, output, everything)
    if any(one.differences for one in traces):
        raise SystemExit(1)


def _kernels(view: NodeView, saved: Path | None, live: bool, close: ExitStack) -> Callable[[Family], KernelView] | None:
    """What gives the kernel of a family; each is opened once."""
    from nodeproxy.kernel.xtables_tools import Variant  # noqa: PLC0415
    from nodeproxy.trace.live_kernel import LiveKernel  # noqa: PLC0415
    from nodeproxy.trace.saved_kernel import load_kernel  # noqa: PLC0415

    opened: dict[Family, KernelView] = {}
    variant = view.snapshot.config.iptables_variant

    def kernel(family: Family) -> KernelView:
        if family not in opened:
            if saved is not None:
                opened[family] = load_kernel(saved, int(family), view)
            else:
                opened[family] = close.enter_context(LiveKernel(int(family), Variant(variant) if variant else None))
        return opened[family]

    return kernel if live or saved is not None else None


def _print(traces: list[Trace], output: str, everything: bool) -> None:
    if output == "json":
        _print_json({"traces": traces})
        return
    for number, one in enumerate(traces):
        if number:
            click.echo("\n" + "-" * 72)
        for line in _text(one, everything):
            click.echo(line)


def _text(one: Trace, everything: bool) -> Iterator[str]:
    from nodeproxy.trace.text import trace_lines, verdict_line  # noqa: PLC0415

    yield from trace_lines(one, everything=everything)
    yield verdict_line(one)


def _print_listing(several: Any, output: str) -> None:
    from nodeproxy.trace.text import listing_lines  # noqa: PLC0415

    if output == "json":
        _print_json({"frontends": [one._asdict() for one in several.frontends]})
        return
    for line in listing_lines(several):
        click.echo(line)


def _print_json(value: object) -> None:
    import msgspec  # noqa: PLC0415

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
