"""Owns nothing any more: `nodeproxy.configuration` does, whose names are still imported from here."""

from nodeproxy.configuration.addresses import by_family, parse_host_port, parse_networks
from nodeproxy.configuration.agent_config import PRIMARY, AgentConfig, ConfigError, LogFormat, Mode, WhileAnotherRuns
from nodeproxy.configuration.changes import restart_needed, with_fixed_part
from nodeproxy.configuration.check import check
from nodeproxy.configuration.effective import as_document
from nodeproxy.configuration.watch import process_start, watch_file

__all__ = [
    "PRIMARY",
    "AgentConfig",
    "ConfigError",
    "LogFormat",
    "Mode",
    "WhileAnotherRuns",
    "as_document",
    "by_family",
    "check",
    "parse_host_port",
    "parse_networks",
    "process_start",
    "restart_needed",
    "watch_file",
    "with_fixed_part",
]
