"""Owns the errors that the kernel drivers raise.

Every error says in one line which tool, rule or item was refused and why; the parts of that line are attributes, so that a
caller never parses text. Errno values are positive, as in the standard `errno` module.
"""

import errno as errno_names
import os
from collections.abc import Sequence
from dataclasses import dataclass


def describe_errno(number: int) -> str:
    """`EBUSY: Device or resource busy`; for numbers without a name (ipset has its own from 4096 on) `error 4097`."""
    name = errno_names.errorcode.get(number)
    return f"{name}: {os.strerror(number)}" if name else f"error {number}"


class KernelError(Exception):
    """Base of all errors of this package."""


class ToolMissing(KernelError):
    """A program that the driver runs is not installed, or not on PATH."""

    def __init__(self, tool: str, hint: str) -> None:
        super().__init__(f"{tool} is not on PATH: {hint}")
        self.tool = tool
        self.hint = hint


class ToolFailed(KernelError):
    """A program ended with an error that is not about one rule: `message` is its own text, in one line."""

    def __init__(self, tool: str, exit_status: int, message: str) -> None:
        super().__init__(f"{tool} failed with status {exit_status}: {message or 'no message'}")
        self.tool = tool
        self.exit_status = exit_status
        self.message = message


class PermissionMissing(KernelError):
    """The process may not do this in its network namespace (CAP_NET_ADMIN or CAP_NET_RAW is missing)."""

    def __init__(self, action: str, message: str) -> None:
        super().__init__(f"not permitted to {action}: {message}")
        self.action = action
        self.message = message


class LockHeld(KernelError):
    """Another program held the xtables lock for all the time that we were ready to wait, in seconds."""

    def __init__(self, waited_seconds: int, lock_file: str) -> None:
        super().__init__(f"another program holds the xtables lock {lock_file}; gave up after {waited_seconds} s")
        self.waited_seconds = waited_seconds
        self.lock_file = lock_file


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """One refusal inside a restore. `line` counts from 1; `None` where only the whole transaction is known to be refused.

    `chain` is the chain that the refused line writes to, `rule` the text of that line.
    """

    line: int | None
    chain: str | None
    message: str
    rule: str | None = None


class RestoreRefused(KernelError):
    """iptables-restore refused a transaction; the table is as it was before.

    `refused` holds every refusal that was reported (the nft variant can report several), and `line`, `chain`, `message` and
    `rule` are those of the first. `at_commit`: the text was parsed and the kernel refused the transaction as a whole, so
    `line` is None in the legacy variant: the caller has to bisect.
    """

    def __init__(self, table: str | None, refused: Sequence[RefusedLine], *, at_commit: bool) -> None:
        first = refused[0]
        where = f"table {table}" if table else "no table"
        if first.line is not None:
            where += f", line {first.line}"
        if first.chain is not None:
            where += f", chain {first.chain}"
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        super().__init__(f"restore refused, {where}: {first.message}{more}")
        self.table = table
        self.refused = tuple(refused)
        self.line = first.line
        self.chain = first.chain
        self.message = first.message
        self.rule = first.rule
        self.at_commit = at_commit


class PatchImpossible(KernelError):
    """A legacy table was left as it was, because a change of it was not one that can be made without iptables."""


class ItemRefused(KernelError):
    """The kernel refused one item (a set, an entry, a flow, an address) of a batch; `errno` is positive."""

    def __init__(self, operation: str, item: object, errno: int, message: str = "") -> None:
        super().__init__(f"{operation} {item}: {message or describe_errno(errno)}")
        self.operation = operation
        self.item = item
        self.errno = errno
        self.message = message or describe_errno(errno)


class RequestRefused(KernelError):
    """The kernel refused a netlink request as a whole (a dump, a query)."""

    def __init__(self, request: str, errno: int, message: str = "") -> None:
        super().__init__(f"{request}: {message or describe_errno(errno)}")
        self.request = request
        self.errno = errno


class AnswerLost(KernelError):
    """The kernel's answer did not arrive (receive buffer overrun, or none in time): what was carried out is not known."""

    def __init__(self, request: str, why: str) -> None:
        super().__init__(f"{request}: answer lost: {why}")
        self.request = request
        self.why = why


class FeatureMissing(KernelError):
    """This kernel does not have what was asked for (module not there, set type unknown, version too old)."""

    def __init__(self, feature: str, hint: str) -> None:
        super().__init__(f"the kernel has no {feature}: {hint}")
        self.feature = feature
        self.hint = hint


class SysctlAbsent(KernelError):
    """No such sysctl in this kernel or network namespace."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(f"sysctl {name} does not exist ({path})")
        self.name = name
        self.path = path


class SysctlReadOnly(KernelError):
    """The sysctl exists but may not be written (read-only /proc/sys, or missing capability)."""

    def __init__(self, name: str, value: str) -> None:
        super().__init__(f"sysctl {name} is read-only here, wanted {value}")
        self.name = name
        self.value = value


class SysctlRefused(KernelError):
    """The kernel refused the value (out of range, not a number); `errno` is positive."""

    def __init__(self, name: str, value: str, errno: int) -> None:
        super().__init__(f"sysctl {name} refused {value!r}: {describe_errno(errno)}")
        self.name = name
        self.value = value
        self.errno = errno
