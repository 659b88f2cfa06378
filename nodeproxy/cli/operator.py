"""Owns `nodeproxy operator`, and the hidden commands that its probe pods run."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import click

from nodeproxy.cli.command_line import fail
from nodeproxy.cli.logging import configure_logging
from nodeproxy.cli.options import LOG_OPTIONS, options
from nodeproxy.cli.types import Duration

_TERMINATION_LOG = Path("/dev/termination-log")


@click.command()
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="Default: the service account of the pod.")
@click.option("--master", help="URL of the API server; replaces that in the kubeconfig.")
@click.option(
    "--namespace", default="kube-system", show_default=True, envvar="POD_NAMESPACE",
    help="Where the DaemonSets, the Lease and probes are.",
)  # fmt: skip
@click.option("--pod", envvar="POD_NAME", help="Name of this pod; pods that it makes have its image.")
@click.option("--image", help="Image of pods that it makes, where that is not the image of this pod.")
@click.option("--identity", help="Name of this replica in the Lease. Default: the pod's or the host's name.")
@click.option(
    "--bind-address", default="0.0.0.0:10258", show_default=True, help="Where /healthz and /metrics are; empty: nowhere."
)
@click.option("--interval", type=Duration(), default="1s", show_default=True, help="Between passes during a roll-out.")
@click.option(
    "--lease-duration", type=Duration(), default="15s", show_default=True,
    help="Another replica takes over when the one that acts has not been heard of for so long.",
)  # fmt: skip
@options(LOG_OPTIONS)
def operator(
    *,
    kubeconfig: Path | None,
    master: str | None,
    namespace: str,
    pod: str | None,
    image: str | None,
    identity: str | None,
    bind_address: str,
    interval: float,
    lease_duration: float,
    verbosity: int,
    log_format: str,
) -> None:
    """Run the operator, which carries out ProxyRollouts. Of several replicas one acts. Needs no privileges."""
    from nodeproxy.operator.operator import Operator, OperatorConfig, OperatorError  # noqa: PLC0415 - kubernetes, kopf

    configure_logging(verbosity, log_format)
    if interval <= 0 or lease_duration < 1:
        fail("--interval must be positive, and --lease-duration a second at least")
    if pod is None and image is None:
        fail("--pod or --image: one of them must say which image probes have")
    config = OperatorConfig(
        identity=identity or pod or f"{socket.gethostname()}-{os.getpid()}",
        kubeconfig=kubeconfig,
        master=master,
        namespace=namespace,
        pod=pod,
        image=image,
        http_address=bind_address,
        interval=interval,
        lease_seconds=lease_duration,
    )
    try:
        asyncio.run(Operator(config).run())
    except OperatorError as error:
        fail(str(error))


@click.command(hidden=True)
@click.option("--named", multiple=True, help="NAME=HOST:PORT; must answer with the name of a probe server.")
@click.option("--target", multiple=True, help="NAME=HOST:PORT; must take connections.")
@click.option("--count", type=click.IntRange(1, 1000), default=20, show_default=True, help="Connections to each.")
@click.option("--timeout", type=Duration(), default="2s", show_default=True, help="Of one connection.")
@click.option("--output", type=click.Path(path_type=Path), default=_TERMINATION_LOG, show_default=True)
def probe(named: tuple[str, ...], target: tuple[str, ...], count: int, timeout: float, output: Path) -> None:
    """Connect, and write what became of it; what a probe pod of the operator runs."""
    from nodeproxy.operator.probe import destination, message  # noqa: PLC0415
    from nodeproxy.operator.probe import probe as connect  # noqa: PLC0415

    try:
        # The order is that in which the operator has written them.
        destinations = [destination(text, named=True) for text in named]
        destinations += [destination(text, named=False) for text in target]
    except ValueError as error:
        fail(str(error))
    if timeout <= 0:
        fail("--timeout: must be more than 0")
    found = message(asyncio.run(connect(destinations, count, timeout)))
    click.echo(found.decode())
    try:
        output.write_bytes(found)
    except OSError as error:
        fail(f"{output}: {error.strerror or error}")


@click.command(name="probe-server", hidden=True)
@click.option("--host", default="", help="Default: all addresses.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option("--name", envvar="POD_NAME", default="nodeproxy-probe", show_default=True, help="What it answers.")
def probe_server(host: str, port: int, name: str) -> None:
    """Answer each connection with a name; what the pods of the probes' Service run."""
    from nodeproxy.operator.probe import serve  # noqa: PLC0415

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, stop.set)
        await serve(host or None, port, name, stop)

    try:
        asyncio.run(run())
    except OSError as error:
        fail(f"cannot listen on port {port}: {error.strerror or error}")
