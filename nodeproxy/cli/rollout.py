"""Owns `nodeproxy rollout`: start, watch, pause, resume and abort ProxyRollouts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from nodeproxy.api.proxy_node import API_VERSION
from nodeproxy.cli.command_line import fail
from nodeproxy.cli.types import Duration, StringList, split_lists
from nodeproxy.cluster.findings import printable

if TYPE_CHECKING:
    from nodeproxy.operator.api import ProxyRollout
    from nodeproxy.operator.client import RolloutClient

_CHECKS = ("agent", "audit", "metrics", "probes")
_GIVE_UP_SECONDS = 300.0
_NOT_ANSWERED = 3
_WAIT_HELP = (
    "Show it until it has ended; exit status 1 where it is not {wanted},"
    " 3 where that is not known: the API server has not answered for 5 minutes."
)


@click.group()
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="Default: as kubectl; within a pod its service account.")
@click.option("--master", help="URL of the API server; replaces that in the kubeconfig.")
@click.pass_context
def rollout(context: click.Context, kubeconfig: Path | None, master: str | None) -> None:
    """Change mode, configuration, image or proxy of nodes, node by node, verified; the operator does it."""
    context.obj = (kubeconfig, master)


@rollout.command()
@click.argument("name")
@click.option("--mode", help="iptables or ipvs.")
@click.option("--image", help="The agent's image.")
@click.option("--proxy", help="nodeproxy or kube-proxy: moves nodes from the one to the other.")
@click.option("--configuration", type=click.Path(path_type=Path), help="YAML file with fields of a KubeProxyConfiguration.")
@click.option("--nodes", "selector", help="Nodes with these labels, as `zone=a,disk in (ssd)`.")
@click.option(
    "--node",
    "names",
    type=StringList(),
    multiple=True,
    callback=split_lists,
    help="Nodes by name; comma-separated, repeatable.",
)
@click.option("--all", "everything", is_flag=True, help="All nodes.")
@click.option("--steps", type=StringList(), default="1,10%,100%", show_default=True, help="How many nodes after each step.")
@click.option("--soak", type=Duration(), default="1m", show_default=True, help="To watch the nodes of a step.")
@click.option("--parallel", type=int, default=1, show_default=True, help="Nodes at the same time.")
@click.option("--check", "checks", type=click.Choice(_CHECKS), multiple=True, help="What is looked at. Default: all.")
@click.option("--no-check-before", is_flag=True, help="Nodes need not be well before: to mend some.")
@click.option("--error-ratio", type=float, help="Share of probes that may fail, beyond that before.")
@click.option("--latency-factor", type=float, help="Durations may be so many times those before.")
@click.option("--node-timeout", type=Duration(), help="For a node to become ready.")
@click.option("--auto-rollback", is_flag=True, help="When a node fails, the finished ones go back, too.")
@click.option("--paused", is_flag=True, help="Begin no node yet.")
@click.option("--wait", is_flag=True, help=_WAIT_HELP.format(wanted="completed"))
@click.option("--dry-run", is_flag=True, help="Have the API server check it, and print it as YAML.")
@click.pass_obj
def start(where: tuple[Path | None, str | None], /, name: str, wait: bool, dry_run: bool, **flags: Any) -> None:
    """Make a ProxyRollout. The operator begins with the first node at once."""
    spec = _spec(**flags)

    def make(client: RolloutClient) -> None:
        made = client.create(name, spec, dry_run=dry_run)
        if dry_run:
            click.echo(_yaml(name, spec), nl=False)
            return
        click.echo(f"proxyrollout {made.metadata.name} started", err=True)
        if wait:
            _follow(client, name)

    _with_client(where, make)


@rollout.command()
@click.argument("name", required=False)
@click.option("--watch", "-w", is_flag=True, help=_WAIT_HELP.format(wanted="completed"))
@click.option("--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def status(where: tuple[Path | None, str | None], /, name: str | None, watch: bool, output: str) -> None:
    """Show one roll-out with its nodes, or all of them."""
    if watch and name is None:
        raise click.UsageError("--watch needs a NAME")
    if watch and output == "json":
        raise click.UsageError("--watch and --output json do not go together")

    def show(client: RolloutClient) -> None:
        import msgspec  # noqa: PLC0415

        if output == "json":
            found: Any = client.get(name) if name is not None else client.all()
            click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
            return
        from nodeproxy.cli.rollout_view import listing, picture  # noqa: PLC0415 - rich

        if name is None:
            rollouts = client.all()
            if not rollouts:
                click.echo("no roll-outs", err=True)
            else:
                _console().print(listing(rollouts))
        elif watch:
            client.get(name)  # what cannot be read at all is not waited for
            _follow(client, name)
        else:
            _console().print(picture(client.get(name)))

    _with_client(where, show)


@rollout.command()
@click.argument("name")
@click.pass_obj
def pause(where: tuple[Path | None, str | None], /, name: str) -> None:
    """Begin no further node; what is begun is ended."""
    _with_client(where, lambda client: _change(client, name, {"paused": True}, "paused"))


@rollout.command()
@click.argument("name")
@click.option("--wait", is_flag=True, help=_WAIT_HELP.format(wanted="completed"))
@click.pass_obj
def resume(where: tuple[Path | None, str | None], /, name: str, wait: bool) -> None:
    """Go on."""

    def go_on(client: RolloutClient) -> None:
        _change(client, name, {"paused": False}, "resumed")
        if wait:
            _follow(client, name)

    _with_client(where, go_on)


@rollout.command()
@click.argument("name")
@click.option("--rollback", is_flag=True, help="Finished nodes go back, too; without it they stay as they are.")
@click.option("--wait", is_flag=True, help=_WAIT_HELP.format(wanted="aborted"))
@click.pass_obj
def abort(where: tuple[Path | None, str | None], /, name: str, rollback: bool, wait: bool) -> None:
    """Stop for good: nodes that are being changed go back. It cannot be taken back itself."""

    def stop(client: RolloutClient) -> None:
        _change(client, name, {"abort": "Rollback" if rollback else "Stop"}, "aborted")
        if wait:
            _follow(client, name, wanted="Aborted")

    _with_client(where, stop)


def _spec(
    *,
    mode: str | None,
    image: str | None,
    proxy: str | None,
    configuration: Path | None,
    selector: str | None,
    names: tuple[str, ...],
    everything: bool,
    steps: tuple[str, ...],
    soak: float,
    parallel: int,
    checks: tuple[str, ...],
    no_check_before: bool,
    error_ratio: float | None,
    latency_factor: float | None,
    node_timeout: float | None,
    auto_rollback: bool,
    paused: bool,
) -> dict[str, Any]:
    """What the flags say, as the spec of a ProxyRollout. What is wrong with values the API server says, by their field."""
    target = {"mode": mode, "image": image, "proxy": proxy, "configuration": _configuration(configuration)}
    target = {key: value for key, value in target.items() if value is not None}
    if not target:
        raise click.UsageError("--mode, --image, --proxy or --configuration: say what shall change")
    if everything == bool(selector or names):
        raise click.UsageError("--nodes, --node or --all: say which nodes, and not --all with others")
    thresholds = {"errorRatio": error_ratio, "latencyFactor": latency_factor}
    checked: dict[str, Any] = {"thresholds": {key: value for key, value in thresholds.items() if value is not None}}
    if checks:
        checked["which"] = list(checks)
    if no_check_before:
        checked["before"] = False
    spec: dict[str, Any] = {
        "target": target,
        "nodes": _nodes(selector, names),
        "steps": [int(step) if step.isdigit() else step for step in steps],
        "soakSeconds": round(soak),
        "maxParallel": parallel,
        "checks": checked,
        "autoRollback": auto_rollback,
        "paused": paused,
    }
    if node_timeout is not None:
        spec["timeouts"] = {"nodeReadySeconds": round(node_timeout)}
    return spec


def _nodes(selector: str | None, names: tuple[str, ...]) -> dict[str, Any]:
    import msgspec  # noqa: PLC0415

    from nodeproxy.operator.selectors import parse_selector  # noqa: PLC0415

    nodes: dict[str, Any] = {"names": list(names)} if names else {}
    if selector is not None:
        try:
            nodes["selector"] = msgspec.to_builtins(parse_selector(selector))
        except ValueError as error:
            raise click.UsageError(f"--nodes: {error}") from None
    return nodes or {"selector": {}}


def _configuration(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    import yaml  # noqa: PLC0415

    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        fail(f"--configuration: {path}: {error.strerror or error}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"--configuration: {path}: {' '.join(str(error).split())}")
    if not isinstance(found, dict):
        fail(f"--configuration: {path}: is not a mapping of fields")
    return {key: value for key, value in found.items() if key not in ("apiVersion", "kind")}


def _yaml(name: str, spec: dict[str, Any]) -> str:
    import yaml  # noqa: PLC0415

    document = {"apiVersion": API_VERSION, "kind": "ProxyRollout", "metadata": {"name": name}, "spec": spec}
    return yaml.safe_dump(document, sort_keys=False)


def _change(client: RolloutClient, name: str, spec: dict[str, Any], what: str) -> None:
    if client.get(name).finished:
        fail(f"roll-out {name} has ended: {client.get(name).status.message}")
    client.change(name, spec)
    click.echo(f"proxyrollout {name} {what}", err=True)


def _follow(client: RolloutClient, name: str, *, wanted: str = "Completed") -> None:
    """Show it until it has ended. Ends the program with 1 where that is not what was wanted, with 3 where nobody knows."""
    from nodeproxy.cli.patience import patiently  # noqa: PLC0415 - tenacity
    from nodeproxy.cli.rollout_view import follow  # noqa: PLC0415 - rich
    from nodeproxy.operator.client import Unanswered  # noqa: PLC0415 - kubernetes

    def ended(one: ProxyRollout) -> bool:
        return one.finished

    def say(why: str) -> None:
        # Where a picture is shown rich has another standard error in this place, which keeps it whole.
        click.echo(f"nodeproxy: {printable(why)}; trying again", file=sys.stderr)

    it_goes_on = f"it goes on: nodeproxy rollout status {name} --watch"
    try:
        last = follow(_console(), patiently(lambda: client.get(name), say, seconds=_GIVE_UP_SECONDS), ended)
    except KeyboardInterrupt:
        click.echo(it_goes_on, err=True)
        sys.exit(130)
    except Unanswered as error:
        click.echo(f"nodeproxy: no answer for {_GIVE_UP_SECONDS:g} s: {printable(str(error))}; {it_goes_on}", err=True)
        sys.exit(_NOT_ANSWERED)
    if last.status.phase != wanted:
        sys.exit(1)


def _with_client(where: tuple[Path | None, str | None], use: Callable[[RolloutClient], None]) -> None:
    from nodeproxy.operator.client import RolloutClient, RolloutError  # noqa: PLC0415 - kubernetes
    from nodeproxy.source.apiserver.connection import RequestError  # noqa: PLC0415

    try:
        use(RolloutClient(*where))
    except (RolloutError, RequestError) as error:
        _refuse(str(error))


def _refuse(text: str) -> NoReturn:
    fail(*(line for line in text.splitlines() if line.strip()))


def _console() -> Any:
    from rich.console import Console  # noqa: PLC0415

    return Console(highlight=False)
