"""Owns what of a changed configuration a running agent can apply."""

from __future__ import annotations

from msgspec.structs import replace

from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.configuration.settings import NEED_RESTART, SETTINGS


def restart_needed(old: AgentConfig, new: AgentConfig) -> tuple[str, ...]:
    """What differs and cannot be applied without a restart, named by its path in the document or by its flag."""
    return tuple(
        setting.name
        for setting in SETTINGS
        if setting.field in NEED_RESTART and getattr(old, setting.field) != getattr(new, setting.field)
    )


def with_fixed_part(new: AgentConfig, old: AgentConfig) -> AgentConfig:
    """The new configuration, with the old values of what cannot be applied without a restart."""
    return replace(new, **{field: getattr(old, field) for field in NEED_RESTART})
