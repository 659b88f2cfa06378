"""The control plane from a shell: `python -m hack.controlplane --help`."""

import asyncio
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import click

from hack.controlplane.build import BuildError, binaries
from hack.controlplane.controlplane import ControlPlane
from hack.controlplane.external import ExternalCluster
from hack.controlplane.load import Load, Shape, node
from hack.controlplane.processes import StartError


@click.group()
def main() -> None:
    """A real Kubernetes control plane on this machine, for tests, benchmarks and experiments."""


@main.command()
def build() -> None:
    """Build the programs, unless they are cached, and print their directory."""
    click.echo(binaries())


@main.command()
@click.option("--dir", "directory", type=click.Path(path_type=Path), required=True, help="Keeps data, logs, kubeconfig.")
@click.option("--bind-address", default="127.0.0.1", show_default=True, help="Where the API server listens.")
@click.option("--port", default=0, help="Its port; by default, a free one.")
@click.option("--netns", help="Network namespace to run in; its loopback must be up.")
@click.option("--service-cidr", default="10.96.0.0/12,fd00:10:96::/112", show_default=True, help="One range or two.")
@click.option("--node-ports", default="30000-32767", show_default=True, help="The range of node ports.")
@click.option("--authorization", type=click.Choice(["RBAC", "AlwaysAllow"]), default="RBAC", show_default=True)
@click.option("--controller-manager", is_flag=True, help="Run the controllers, too.")
@click.option("--node", "nodes", multiple=True, metavar="NAME=ADDRESS", help="A Node to register; may be repeated.")
def up(directory: Path, nodes: tuple[str, ...], **options: object) -> None:
    """Run a control plane until interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    with ControlPlane(directory.absolute(), **options) as cluster:  # type: ignore[arg-type]
        kubeconfig = cluster.directory / "kubeconfig"
        cluster.write_kubeconfig(kubeconfig)
        for entry in nodes:
            name, _, address = entry.partition("=")
            cluster.request("POST", "/api/v1/nodes", node(name, address.split(",")))
        click.echo(f"ready in {time.monotonic() - started:.1f} s at {cluster.url}; stop it with Ctrl-C", err=True)
        click.echo(f"export KUBECONFIG={kubeconfig}")
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            click.echo("stopping", err=True)


@main.command()
@click.option("--kubeconfig", type=click.Path(path_type=Path, exists=True), envvar="KUBECONFIG", required=True)
@click.option("--services", default=1000, show_default=True, help="How many Services.")
@click.option("--endpoints", default=10, show_default=True, help="How many endpoints each.")
@click.option("--node-ports", default=0.0, show_default=True, help="The share of Services that get node ports.")
@click.option("--dual-stack", is_flag=True, help="IPv4 and IPv6.")
@click.option("--namespace", default="load", show_default=True)
@click.option("--delete", is_flag=True, help="Delete what the same options created.")
def load(kubeconfig: Path, delete: bool, **options: object) -> None:
    """Create many Services and EndpointSlices, or delete them."""
    shape = Shape(**options)  # type: ignore[arg-type]

    async def run() -> None:
        async with Load(ExternalCluster(kubeconfig).access, shape) as objects:
            await (objects.delete() if delete else objects.create())

    started = time.monotonic()
    asyncio.run(run())
    click.echo(f"{time.monotonic() - started:.1f} s", err=True)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        main()
    except (BuildError, StartError) as error:
        sys.exit(str(error))
