"""Owns what a `ProxyNode` adds to the configuration of its node's agent: which of it counts, and why some of it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from nodeproxy.api.proxy_node import ProxyNodeSpec
from nodeproxy.configuration.agent_config import AgentConfig, ConfigError, Mode
from nodeproxy.configuration.check import check_values
from nodeproxy.configuration.effective import values_of
from nodeproxy.configuration.read import read_part
from nodeproxy.configuration.settings import FLAGS, NEED_RESTART, SETTINGS

_NAMES = {**FLAGS, **{setting.field: f"spec.configuration.{setting.path}" for setting in SETTINGS if setting.path}}


class Overlaid(Struct, frozen=True):
    """A configuration with a spec on top. `remark`: which of the spec a running agent does not take, "" for none."""

    config: AgentConfig
    remark: str = ""


def overlaid(config: AgentConfig, spec: ProxyNodeSpec) -> Overlaid:
    """An agent's own configuration with the spec of its ProxyNode on top. Raises `ConfigError`.

    A field that is given with its zero value counts as its default, as in a file. A mode is wanted as it is told: no other
    one takes its place.
    """
    given = spec.configuration or {}
    read = read_part(given)
    values, reasons = values_of(read.document)
    complaints = [f"spec.configuration.{line}" for line in read.complaints]
    chosen: dict[str, Any] = {}
    later: list[str] = []
    for setting in SETTINGS:
        if setting.path is None or not _is_given(given, setting.path):
            continue
        if setting.field in reasons:
            complaints.append(f"{_NAMES[setting.field]}: {reasons[setting.field]}")
        elif setting.field in NEED_RESTART:
            later.append(setting.path)
        else:
            chosen[setting.field] = values[setting.field]
    if spec.mode is not None:
        try:
            chosen |= {"mode": Mode(spec.mode), "fallback": None}
        except ValueError:
            complaints.append(f"spec.mode: {spec.mode!r} is none of {', '.join(Mode)}")
    if complaints:
        raise ConfigError(complaints)
    made = replace(config, **chosen)
    if complaints := check_values(made, _NAMES):
        raise ConfigError(complaints)
    remarks = [
        (f"a running agent cannot change {', '.join(later)}", later),
        (f"unknown: {', '.join(read.unknown)}", read.unknown),
    ]
    return Overlaid(made, "; ".join(text for text, names in remarks if names))


def _is_given(values: Mapping[str, Any], path: str) -> bool:
    found: Any = values
    for name in path.split("."):
        if not isinstance(found, Mapping) or found.get(name) is None:
            return False
        found = found[name]
    return True
