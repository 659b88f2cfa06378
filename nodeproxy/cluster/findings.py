"""Owns how faults are written down: the problems found in one object, values quoted safely, names and ports judged.

Names are judged as the API server does (DNS labels and subdomains of RFC 1123), because they end up in rule comments and
chain hashes: text from the cluster must never get there unchecked, whatever source it came through.
"""

from __future__ import annotations

import re

from nodeproxy.cluster.names import IPProtocol, Problem, ServiceName

MAX_PROBLEMS = 20
"""So many problems are named of one object; a hostile one must not flood the log and the events."""

_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_PROTOCOLS = {
    None: IPProtocol.TCP,
    "": IPProtocol.TCP,
    "TCP": IPProtocol.TCP,
    "UDP": IPProtocol.UDP,
    "SCTP": IPProtocol.SCTP,
}


class Findings:
    """Collects the problems of one object. `prefix` is put before every field path."""

    def __init__(self, service: ServiceName, prefix: str = "") -> None:
        self._service = service
        self._prefix = prefix
        self._problems: list[Problem] = []
        self._more = 0

    def add(self, field: str, reason: str) -> None:
        """Note that the value of `field` cannot be used."""
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(Problem(self._service, self._prefix + field, reason))
        else:
            self._more += 1

    def all(self) -> tuple[Problem, ...]:
        """What was found, in order."""
        if not self._more:
            return tuple(self._problems)
        rest = Problem(self._service, f"{self._prefix}(further fields)", f"{self._more} more problems")
        return (*self._problems, rest)


def quoted(value: str) -> str:
    """`value` in quotes, escaped to printable ASCII and cut to a readable length."""
    return ascii(value if len(value) <= 64 else value[:61] + "...")


def printable(text: str) -> str:
    """`text` on one line, without what a terminal would act upon."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def printable_lines(text: str) -> str:
    """As `printable`, but lines stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


def is_label(text: str) -> bool:
    """Whether `text` is a DNS label: a-z, 0-9 and '-', at most 63 characters."""
    return _LABEL.fullmatch(text) is not None


def is_subdomain(text: str) -> bool:
    """Whether `text` is a DNS subdomain: labels joined by dots, at most 253 characters."""
    return len(text) <= 253 and _SUBDOMAIN.fullmatch(text) is not None


def is_port(number: int) -> bool:
    """Whether `number` is a port number, 0 excluded."""
    return 1 <= number <= 65535


def protocol_of(text: str | None) -> IPProtocol | None:
    """The protocol by its name in the API, which defaults to TCP. None where it is unknown."""
    return _PROTOCOLS.get(text)
