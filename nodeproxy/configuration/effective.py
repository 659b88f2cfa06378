"""Owns the translation between a KubeProxyConfiguration and `AgentConfig`, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodeproxy.configuration.agent_config import AgentConfig, LogFormat, Mode
from nodeproxy.configuration.document import Duration, KubeProxyConfiguration, as_text, completed, leaves, nested
from nodeproxy.configuration.settings import SETTINGS
from nodeproxy.programmer.base import DetectLocalMode


def values_of(document: KubeProxyConfiguration) -> tuple[dict[str, Any], dict[str, str]]:
    """What a document says, by field of `AgentConfig`; and why it cannot be so, for fields whose value makes no sense."""
    found = leaves(document)
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for setting in SETTINGS:
        if setting.path is None:
            continue
        try:
            values[setting.field] = _FROM_DOCUMENT.get(setting.field, _plain)(found[setting.path])
        except ValueError as error:
            reasons[setting.field] = str(error)
    return values, reasons


def not_supported(document: KubeProxyConfiguration) -> tuple[str, ...]:
    """Paths of what a document sets to other than the default and what is not honoured."""
    honoured = {setting.path for setting in SETTINGS}
    defaults = leaves(KubeProxyConfiguration())
    found: list[str] = []
    for path, value in leaves(document).items():
        if path in honoured or value == defaults[path]:
            continue
        found += [f"{path}.{key}" for key in value] if isinstance(value, dict) else [path]
    return tuple(found)


def honoured(document: KubeProxyConfiguration) -> dict[str, Any]:
    """What a document sets to other than the default, and what is honoured: plain values by path."""
    found = leaves(document)
    defaults = leaves(completed(KubeProxyConfiguration(bind_address=document.bind_address)))
    defaults["bindAddress"] = KubeProxyConfiguration().bind_address
    paths = [setting.path for setting in SETTINGS if setting.path is not None]
    return {path: as_text(found[path]) for path in paths if found[path] != defaults[path]}


def as_document(config: AgentConfig) -> dict[str, Any]:
    """The KubeProxyConfiguration that is in force, of JSON's types, as `/configz` and `--write-config-to` show it.

    What is not honoured has its default, whatever the file said. What has no field there (our own flags) is left out.
    """
    values = leaves(KubeProxyConfiguration())
    for setting in SETTINGS:
        if setting.path is not None:
            values[setting.path] = _to_document(getattr(config, setting.field), values[setting.path])
    values["clusterCIDR"] = ",".join(config.cluster_cidrs)
    values["bindAddress"] = config.bind_address or "0.0.0.0"
    return nested(values)


def _to_document(value: Any, former: Any) -> Any:
    if value is None:
        return ""
    if isinstance(former, Duration):
        return Duration(value)
    return str(value) if isinstance(former, str) and not isinstance(value, tuple) else value


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Duration) else value


def _or_none(value: str) -> str | None:
    return value or None


def _mode(value: str) -> Mode:
    if value == "nftables":
        raise ValueError("nftables mode is not supported; --mode iptables or --mode ipvs overrides the file")
    try:
        return Mode(value)
    except ValueError:
        raise ValueError(f"{value!r} is neither iptables nor ipvs nor empty (iptables)") from None


def _detect_local_mode(value: str) -> DetectLocalMode:
    try:
        return DetectLocalMode(value)
    except ValueError:
        raise ValueError(f"{value!r} is none of {', '.join(DetectLocalMode)}") from None


def _log_format(value: str) -> LogFormat:
    try:
        return LogFormat(value)
    except ValueError:
        raise ValueError(f"{value!r} is neither text nor json") from None


def _comma_separated(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


_FROM_DOCUMENT: dict[str, Callable[[Any], Any]] = {
    "mode": _mode,
    "detect_local_mode": _detect_local_mode,
    "log_format": _log_format,
    "kubeconfig": lambda value: Path(value) if value else None,
    "cluster_cidrs": _comma_separated,
    "pod_bridge_interface": _or_none,
    "pod_interface_name_prefix": _or_none,
}
