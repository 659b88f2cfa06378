"""Owns what counts: from a configuration file and the flags of a command line to one checked `AgentConfig`."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from nodeproxy.configuration.addresses import with_port
from nodeproxy.configuration.agent_config import AgentConfig, ConfigError
from nodeproxy.configuration.check import check_sources, check_values
from nodeproxy.configuration.effective import not_supported, values_of
from nodeproxy.configuration.read import ReadDocument, read_document
from nodeproxy.configuration.settings import BY_FIELD, FLAGS, SETTINGS, UNSUPPORTED_FLAGS

_HEALTHZ_PORT = 10256
_METRICS_PORT = 10249


class Remark(Struct, frozen=True):
    """Something that is not as it was written, and does no harm: one line for the log, and the names that it is about."""

    text: str
    names: tuple[str, ...]


class Resolved(Struct, frozen=True):
    """What a configuration comes to.

    `complaints`: why it cannot be used. `absent`: complaints about this machine only (a missing kubeconfig file).
    """

    config: AgentConfig
    remarks: tuple[Remark, ...] = ()
    complaints: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def usable(self) -> AgentConfig:
        """The configuration. Raises `ConfigError` with every complaint."""
        if self.complaints or self.absent:
            raise ConfigError([*self.absent, *self.complaints])
        return self.config


def resolve(file: Path | None = None, flags: Mapping[str, Any] | None = None, others: Sequence[str] = ()) -> Resolved:
    """Join a configuration file and the flags that were given, as kube-proxy does.

    `flags`: values by field of `AgentConfig`; `others`: given flags that are not among its fields. With a file, a flag
    counts only where the file has no such field, or where `Setting.overrides` says so. Raises `ConfigError` where the file
    cannot be read at all; everything else is in the result.
    """
    flags = dict(flags or {})
    read = read_document(file) if file is not None else None
    remarks: list[Remark] = []
    complaints: list[str] = []
    values: dict[str, Any] = {}
    names = dict(FLAGS)
    if read is not None:
        ignored = [BY_FIELD[field].flag for field in flags if not _counts(field)]
        ignored += [flag for flag in others if UNSUPPORTED_FLAGS.get(flag, flag) is not None]
        others = [flag for flag in others if flag not in ignored]
        flags = {field: value for field, value in flags.items() if _counts(field)}
        values, reasons = values_of(read.document)
        names.update({s.field: f"{file}: {s.path}" for s in SETTINGS if s.path is not None and s.field not in flags})
        complaints = [f"{file}: {line}" for line in read.complaints]
        complaints += [f"{names[field]}: {reason}" for field, reason in reasons.items() if field not in flags]
        remarks = _remarks(read, ignored)
        if "manifests" in flags and values.pop("kubeconfig"):
            remarks.append(Remark("--manifests is the source; ignored in the file", ("clientConnection.kubeconfig",)))
    if others:
        remarks.append(Remark("flags of kube-proxy that are not supported, ignored", tuple(others)))
    values.update(flags)
    config = _complete(values)
    if not values.get("node_name"):
        names["node_name"] = FLAGS["node_name"]
    complaints += check_values(config, names)
    return Resolved(config, tuple(remarks), tuple(complaints), tuple(check_sources(config, names)))


def _counts(field: str) -> bool:
    """Whether a flag counts beside a configuration file."""
    setting = BY_FIELD[field]
    return setting.path is None or setting.overrides


def _complete(values: Mapping[str, Any]) -> AgentConfig:
    """The configuration of what is set; the name of the node as kube-proxy makes it, addresses with their ports."""
    name = str(values.get("node_name") or socket.gethostname()).strip().lower()
    config = AgentConfig(**{**values, "node_name": name})
    return replace(
        config,
        healthz_bind_address=with_port(config.healthz_bind_address, _HEALTHZ_PORT),
        metrics_bind_address=with_port(config.metrics_bind_address, _METRICS_PORT),
    )


def _remarks(read: ReadDocument, ignored: Sequence[str]) -> list[Remark]:
    remarks = [
        Remark("flags are ignored, the configuration file counts", tuple(ignored)),
        Remark("not supported in the configuration file, ignored", not_supported(read.document)),
        Remark("unknown fields in the configuration file, ignored", read.unknown),
        Remark("given more than once in the configuration file, the last counts", read.duplicates),
    ]
    found = [remark for remark in remarks if remark.names]
    if read.more:
        found.append(Remark("the configuration file holds further documents, ignored", ()))
    return found
