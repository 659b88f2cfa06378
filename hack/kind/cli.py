"""The command line of `python -m hack.kind`."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from hack.kind import cluster, config, engine, loading, logs, parts
from hack.kind.places import KindError
from hack.kind.progress import say

_NAME = click.option("--name", default=config.DEFAULT_NAME, show_default=True, help="the cluster's name")
_BROKEN, _INTERRUPTED = 1, 130


class _Group(click.Group):
    """Ends with a readable message on KindError and on Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KindError as error:
            say(str(error))
            sys.exit(_BROKEN)
        except KeyboardInterrupt:
            say("interrupted")
            sys.exit(_INTERRUPTED)


@click.group(cls=_Group)
def main() -> None:
    """A real Kubernetes cluster for tests: Docker's engine, node image, kind, nodeproxy."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs would ignore SIGINT
        signal.signal(number, _interrupted)


@main.command(name="engine")
@click.option("--stop", is_flag=True, help="stop the engine that this command started, unless containers run in it")
def engine_command(stop: bool) -> None:
    """Have a Docker engine that answers: start one, and install it before that, where there is none."""
    if stop:
        say("stopped" if engine.stop() else "nothing of ours to stop")
    else:
        say(str(engine.ensure()))


@main.command()
@_NAME
@click.option("--workers", default=2, show_default=True, help="nodes besides the control plane")
@click.option("--ip-family", type=click.Choice(config.IP_FAMILIES), default="ipv4", show_default=True)
@click.option("--kube-proxy", type=click.Choice(config.PROXIES), default="none", show_default=True, help="its mode")
def up(name: str, workers: int, ip_family: str, kube_proxy: str) -> None:
    """Make a cluster, or take the one that is there if it fits; E2E_KEEP=1 keeps one whose creation failed."""
    made = cluster.up(config.Shape(name, workers, ip_family, kube_proxy))
    for node in made.nodes():
        say(f"{node.name}: {', '.join(node.addresses)}; pods {', '.join(node.pod_subnets)}")
    say(f'for kubectl: eval "$(python -m hack.kind env --name {name})"')


@main.command()
@_NAME
def down(name: str) -> None:
    """Remove a cluster, its network and its routes."""
    cluster.down(name)


@main.command()
@_NAME
def env(name: str) -> None:
    """Print what a shell needs to use the cluster: KUBECONFIG, and a PATH with kubectl and kind."""
    made = cluster.existing(name)
    folders = ":".join(map(str, parts.tools()))
    click.echo(f"export KUBECONFIG={shlex.quote(str(made.kubeconfig))} PATH={shlex.quote(folders)}:$PATH")
    click.echo(f"export KIND_EXPERIMENTAL_DOCKER_NETWORK={shlex.quote(made.network)}")


@main.command()
@click.argument("which", type=click.Choice(["base", "node", "agent", "agnhost", "all"]))
def image(which: str) -> None:
    """Have an image in the engine (from the cache, pulled or built), and print its reference."""
    from hack.kind import agent_image, base_image, node_image, test_images  # noqa: PLC0415 each knows much

    engine.ensure()
    makers = {
        "base": base_image.base_image,
        "node": node_image.node_image,
        "agent": agent_image.agent_image,
        "agnhost": test_images.agnhost,
    }
    for name in makers if which == "all" else [which]:
        click.echo(makers[name]())


@main.command()
@_NAME
@click.argument("references", nargs=-1, required=True)
def load(name: str, references: tuple[str, ...]) -> None:
    """Load images of the engine into all nodes at once."""
    loading.load(cluster.existing(name), references)


@main.command()
@_NAME
@click.option("--mode", type=click.Choice(["iptables", "ipvs"]), default="iptables", show_default=True)
def deploy(name: str, mode: str) -> None:
    """Build and load the agent's image, apply deploy/overlays/MODE, wait for the roll-out and for CoreDNS."""
    from hack.kind import deploy as deployment  # noqa: PLC0415 it knows the agent's image

    deployment.deploy(cluster.existing(name), mode)


@main.command(name="deploy-operator")
@_NAME
def deploy_operator(name: str) -> None:
    """Build and load the image, apply deploy/operator, wait until the operator and what its probes connect to are ready."""
    from hack.kind import deploy as deployment  # noqa: PLC0415 it knows the agent's image

    deployment.deploy_operator(cluster.existing(name))


@main.command(name="logs")
@_NAME
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def logs_command(name: str, directory: Path) -> None:
    """Collect kind's logs, the nodes' rules and the agents' metrics in DIRECTORY."""
    logs.collect(cluster.existing(name), directory)


def _interrupted(signum: int, frame: FrameType | None) -> None:
    """A polite request to end is taken like Ctrl-C, so that what was made is removed."""
    raise KeyboardInterrupt
