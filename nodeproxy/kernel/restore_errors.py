"""Owns reading what iptables-restore prints when it refuses a transaction, in both variants.

The forms, as 1.8.9 prints them (older and newer ones differ only in the program's name and version before the colon):

- by the parser, both variants: the message on a line of its own, then `Error occurred at line: N`
- by the parser about the text's frame: `COMMIT expected at line N`, `line N failed`
- by the table's cache, nft: `line N failed: No chain/target/match by that name.`; legacy: `line N failed`
- by the kernel, nft: `line N: RULE_APPEND failed (Invalid argument): rule in chain C`, one such line per refusal
- by the kernel, legacy: `line N failed`, where N is the line of the COMMIT: the rule at fault is not known
- a jump to a chain that is not there, nft: `Chain 'C' does not exist`, at the line of the COMMIT
- lock, permission: their own sentences, without a line
"""

import re
from typing import Final

from nodeproxy.kernel.errors import (
    KernelError,
    LockHeld,
    PermissionMissing,
    RefusedLine,
    RestoreRefused,
    ToolFailed,
)

_KERNEL_NFT: Final = re.compile(r"^\s*line (\d+): (\w+) failed \((.*?)\): (.*)$", re.MULTILINE)
_PARSER: Final = re.compile(r"^Error occurred at line: (\d+)\s*$", re.MULTILINE)
_LINE_FAILED: Final = re.compile(r"\bline (\d+) failed(?:: (.*?))?\.?\s*$", re.MULTILINE)
_COMMIT_EXPECTED: Final = re.compile(r"\bCOMMIT expected at line (\d+)")
_PROGRAM: Final = re.compile(r"^(?:\S*tables\S* v[\d.]+(?: \(\w+\))?: ?|\S*tables-\S*restore: ?)+")
_CHAIN_NAMED: Final = re.compile(r"\bchain (\S+)")
_CHAIN_ABSENT: Final = re.compile(r"Chain '(.+?)' does not exist")
_RULE_CHAIN: Final = re.compile(rb"^\s*(?:\[\d+:\d+\]\s+)?-{1,2}[A-Za-z-]+[ =]+(\S+)")
_DECLARED_CHAIN: Final = re.compile(rb"^:(\S+)")
_NOISE: Final = ("Try `", "# Warning:")
_MAX_MESSAGE: Final = 300  # characters: parser messages quote the rule's text, which may be long


def restore_error(
    stderr: str, text: bytes, *, tool: str, exit_status: int, waited_seconds: int, lock_file: str
) -> KernelError:
    """The typed error for a restore of `text` that ended with a status other than 0 and this standard error."""
    lines = text.split(b"\n")
    if kernel := list(_KERNEL_NFT.finditer(stderr)):
        refused = [_by_kernel_nft(match, lines) for match in kernel]
        return RestoreRefused(_table_at(lines, int(kernel[0][1])), refused, at_commit=True)
    for pattern in (_PARSER, _LINE_FAILED, _COMMIT_EXPECTED):
        if match := pattern.search(stderr):
            number = int(match[1])
            message = (match[2] if pattern is _LINE_FAILED else None) or _sentence(stderr)
            return _at_line(number, message, lines)
    # Only now: messages about a line quote its text, which may say anything.
    if "holding the xtables lock" in stderr:
        return LockHeld(waited_seconds, lock_file)
    if "you must be root" in stderr or "Permission denied" in stderr:
        return PermissionMissing("change the packet filter", _sentence(stderr))
    return ToolFailed(tool, exit_status, _sentence(stderr))


def _at_line(number: int, message: str, lines: list[bytes]) -> RestoreRefused:
    """The refusal at this line; where it is a COMMIT, look for the rule that the message speaks of."""
    table = _table_at(lines, number)
    content = _line(lines, number)
    if content != b"COMMIT":
        if message.startswith("line "):  # legacy gives no reason
            message = "no such chain or rule, or the chain is in use"
        refused = RefusedLine(number, _chain_of(content), message, content.decode(errors="replace"))
        return RestoreRefused(table, [refused], at_commit=False)
    if absent := _CHAIN_ABSENT.search(message):
        jump = re.compile(rb"\s(?:-[jg]|--jump|--goto)[ =]+" + re.escape(absent[1].encode()) + rb"(?:\s|$)")
        found = [n for n in _transaction(lines, number) if jump.search(_line(lines, n))]
        if found:
            refused_lines = [
                RefusedLine(n, _chain_of(_line(lines, n)), message, _line(lines, n).decode(errors="replace")) for n in found
            ]
            return RestoreRefused(table, refused_lines, at_commit=True)
    if message.startswith("line "):
        message = "the kernel refused the transaction without naming the rule"
    return RestoreRefused(table, [RefusedLine(None, None, message)], at_commit=True)


def _by_kernel_nft(match: re.Match[str], lines: list[bytes]) -> RefusedLine:
    number = int(match[1])
    content = _line(lines, number)
    named = _CHAIN_NAMED.search(match[4])
    chain = named[1] if named else _chain_of(content)
    return RefusedLine(number, chain, f"{match[2]} failed: {match[3]}", content.decode(errors="replace"))


def _line(lines: list[bytes], number: int) -> bytes:
    return lines[number - 1].strip() if 0 < number <= len(lines) else b""


def _transaction(lines: list[bytes], commit: int) -> range:
    """Numbers of the lines between the table's header and this COMMIT."""
    start = commit - 1
    while start > 0 and not lines[start - 1].startswith(b"*"):
        start -= 1
    return range(start + 1, commit)


def _table_at(lines: list[bytes], number: int) -> str | None:
    for index in range(min(number, len(lines)) - 1, -1, -1):
        if lines[index].startswith(b"*"):
            return lines[index][1:].strip().decode(errors="replace")
    return None


def _chain_of(content: bytes) -> str | None:
    match = _DECLARED_CHAIN.match(content) or _RULE_CHAIN.match(content)
    return match[1].decode(errors="replace") if match else None


def _sentence(stderr: str) -> str:
    """The program's message in one line, without its name, its advice and the line number that is told apart."""
    parts = []
    for line in stderr.splitlines():
        text = _PROGRAM.sub("", line.strip())
        if text and not text.startswith(_NOISE) and not _PARSER.match(text) and text not in parts:
            parts.append(text)
    return " ".join(parts)[:_MAX_MESSAGE]
