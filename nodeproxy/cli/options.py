"""Owns the flags that configure an agent: kube-proxy's under their own names, and ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from nodeproxy.cli.types import ChoiceOrEmpty, Duration, StringList, split_lists
from nodeproxy.configuration.agent_config import LogFormat, Mode, WhileAnotherRuns
from nodeproxy.configuration.settings import UNSUPPORTED_FLAGS
from nodeproxy.programmer.base import DetectLocalMode
from nodeproxy.programmer.ipvs.settings import SCHEDULERS

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Decorator = Callable[[Any], Any]

_PATH = click.Path(path_type=Path)
_UNSUPPORTED_TYPES: dict[str, click.ParamType[Any]] = {
    **dict.fromkeys(("--config-sync-period", "--log-flush-frequency"), Duration()),
    "--kube-api-burst": click.INT,
    "--kube-api-qps": click.FLOAT,
    **dict.fromkeys(
        ("--bind-address-hard-fail", "--profiling", "--log-json-split-stream", "--log-text-split-stream"), click.BOOL
    ),
}

EPILOG = (
    "With --config, flags of kube-proxy do not count where the file has a field for them, as with kube-proxy; --mode, "
    "--metrics-bind-address, --hostname-override, --master and flags of logging do. Accepted, but not supported: "
    + ", ".join(sorted(UNSUPPORTED_FLAGS))
    + "."
)


def boolean(name: str, default: bool, text: str, variable: str | None = None) -> _Decorator:
    """A boolean flag as Go writes it: `--name`, `--name=true` or `--name=false`."""
    names = [name, variable] if variable else [name]
    return click.option(*names, type=bool, is_flag=False, flag_value=True, default=default, show_default=True, help=text)


def _words(words: Any) -> ChoiceOrEmpty:
    return ChoiceOrEmpty([str(word) for word in words])


def _duration(name: str, default: str, text: str | None = None, variable: str | None = None) -> _Decorator:
    names = [name, variable] if variable else [name]
    return click.option(*names, type=Duration(), default=default, show_default=True, help=text)


def _unsupported(flag: str) -> _Decorator:
    kind = _UNSUPPORTED_TYPES.get(flag, click.STRING)
    names = (flag, unsupported_parameter(flag))
    if kind is click.BOOL:
        return click.option(*names, type=kind, is_flag=False, flag_value=True, hidden=True)
    return click.option(*names, type=kind, hidden=True)


def unsupported_parameter(flag: str) -> str:
    """Name of the parameter of a flag that is accepted and does nothing."""
    return f"unsupported_{flag.strip('-').replace('-', '_')}"


_GENERAL: tuple[_Decorator, ...] = (
    click.option("--config", "config_file", type=_PATH, help="KubeProxyConfiguration file, as kubeadm writes it."),
    click.option(
        "--mode", "--proxy-mode", "mode", type=_words(Mode), default="iptables", show_default=True,
        help="Mechanism of the kernel that carries Services.",
    ),
    click.option(
        "--fallback", type=_words(Mode),
        help="Mode to take where the kernel lacks what --mode needs. Default: end with a message that says what is missing.",
    ),
    click.option("--kubeconfig", type=_PATH, help="Kubeconfig file. Without any source: in-cluster."),
    click.option("--master", help="URL of the API server; overrides the one in the kubeconfig file."),
    click.option("--manifests", type=_PATH, help="Directory of manifests (YAML, JSON) instead of an API server."),
    click.option("--hostname-override", "node_name", help="Name of this node's Node object. Default: the host name."),
    click.option("--service-proxy-name", help="Serve the Services that carry this label value, instead of those without."),
    click.option(
        "--while-another-runs", type=_words(WhileAnotherRuns), default="wait", show_default=True,
        help="What to do while kube-proxy or another agent runs on this node.",
    ),
    boolean("--events", True, "Send Kubernetes Events."),
    _duration("--traffic-counters-period", "10s", "How often counters of each Service are read. 0s: they are not kept."),
    click.option("--oom-score-adj", type=int, default=-999, show_default=True, help="Of the agent's process."),
)  # fmt: skip
_TRAFFIC: tuple[_Decorator, ...] = (
    click.option(
        "--cluster-cidr", "cluster_cidrs", type=StringList(), default="", help="CIDRs of pods, one for each IP family."
    ),
    click.option(
        "--detect-local-mode", type=_words(DetectLocalMode), default="ClusterCIDR",
        help="How traffic of pods on this node is recognised.",
    ),
    click.option("--pod-bridge-interface", help="Bridge of the pods, for mode BridgeInterface."),
    click.option("--pod-interface-name-prefix", help="Prefix of pod interfaces, for mode InterfaceNamePrefix."),
    click.option(
        "--nodeport-addresses", "node_port_addresses", type=StringList(), multiple=True, callback=split_lists,
        help="CIDRs of local addresses that serve node ports, or 'primary'. Default: all.",
    ),
    click.option("--bind-address", help="Address of this node, where no Node object tells it."),
    boolean("--iptables-localhost-nodeports", True, "Serve node ports on IPv4 loopback.", "localhost_node_ports"),
    boolean("--masquerade-all", False, "Masquerade everything that goes to a cluster IP."),
    click.option("--iptables-masquerade-bit", "masquerade_bit", type=int, default=14, show_default=True),
    _duration("--iptables-min-sync-period", "1s", variable="min_sync_period"),
    _duration("--iptables-sync-period", "30s", variable="sync_period"),
    click.option("--iptables-variant", type=_words(["legacy", "nft"]), help="Default: what the node uses already."),
)  # fmt: skip
_IPVS: tuple[_Decorator, ...] = (
    click.option(
        "--ipvs-scheduler", type=_words(SCHEDULERS), default="rr", show_default=True, metavar="NAME",
        help="Scheduler of all virtual servers: " + ", ".join(SCHEDULERS) + ".",
    ),
    boolean("--ipvs-strict-arp", False, "Answer ARP for service addresses on no interface (arp_ignore, arp_announce)."),
    click.option(
        "--ipvs-exclude-cidrs", type=StringList(), multiple=True, callback=split_lists,
        help="Never delete virtual servers at these addresses.",
    ),
    _duration("--ipvs-tcp-timeout", "0s", "Idle TCP connections. 0s: the kernel's."),
    _duration("--ipvs-tcpfin-timeout", "0s", "TCP connections after a FIN. 0s: the kernel's."),
    _duration("--ipvs-udp-timeout", "0s", "Idle UDP flows. 0s: the kernel's."),
    _duration("--ipvs-drain-timeout", "15m", "How long an endpoint that goes keeps its established connections at most."),
    _duration("--ipvs-min-sync-period", "1s"),
    _duration("--ipvs-sync-period", "30s"),
)  # fmt: skip
_NODE: tuple[_Decorator, ...] = (
    click.option("--conntrack-max-per-core", type=int, default=32768, show_default=True, help="0 leaves the limit alone."),
    click.option("--conntrack-min", type=int, default=131072, show_default=True),
    _duration("--conntrack-tcp-timeout-established", "24h", "0s leaves it alone."),
    _duration("--conntrack-tcp-timeout-close-wait", "1h", "0s leaves it alone."),
    boolean("--conntrack-tcp-be-liberal", False, "Accept TCP packets that conntrack finds out of window."),
    _duration("--conntrack-udp-timeout", "0s", "0s leaves it alone."),
    _duration("--conntrack-udp-timeout-stream", "0s", "0s leaves it alone."),
    click.option("--healthz-bind-address", default="0.0.0.0:10256", show_default=True, help="Empty: not served."),
    click.option("--metrics-bind-address", default="127.0.0.1:10249", show_default=True, help="Empty: not served."),
    click.option("--healthz-port", type=int, hidden=True),  # deprecated by kube-proxy; 0: not served
    click.option("--metrics-port", type=int, hidden=True),
)
LOG_OPTIONS: tuple[_Decorator, ...] = (
    click.option("-v", "verbosity", type=int, default=0, show_default=True, help="Verbosity; from 4 on, debug lines."),
    click.option("--logging-format", "log_format", type=_words(LogFormat), default="text", show_default=True),
)


def options(*groups: tuple[_Decorator, ...]) -> Callable[[_Command], _Command]:
    """Decorator that gives a command these options, in this order."""

    def decorate(command: _Command) -> _Command:
        for group in reversed(groups):
            for option in reversed(group):
                command = option(command)
        return command

    return decorate


AGENT_OPTIONS = (*_GENERAL, *_TRAFFIC, *_IPVS, *_NODE, *LOG_OPTIONS, *map(_unsupported, UNSUPPORTED_FLAGS))
