"""Owns the reading of one rule as iptables-save prints it: matches with their options, target, counters.

Quoting is that of xtables_save_string (libxtables): a text with anything but letters, digits, `_` and `-` is put in double
quotes, and `"`, `'` and `\\` in it are preceded by a backslash. So an unquoted text may begin with a dash: how many values
an option has is known for those that are evaluated, and only guessed for others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

_PLAIN: Final = re.compile(r"[-_0-9A-Za-z]+")
_COUNTERS: Final = re.compile(r"\[(\d+):(\d+)\] ")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Options by how many values they have; all others take what follows up to the next option.
_FLAGS: Final = _words(
    "--random --random-fully --persistent --reap --rttl --rsource --rdest --set --update --rcheck --remove --exist"
    " --map-set --save-mark --restore-mark --syn --icmp --notrack --return-nomatch --limit-iface-in --limit-iface-out"
    " --validmark --physdev-is-in --physdev-is-out --physdev-is-bridged --loose --accept-local --invert --ports-inverse"
    " --socket-exists --transparent --nowildcard --suppl-groups"
)
_ONE: Final = _words(
    "-s -d -i -o -p -j -g -m --comment --dport --sport --dports --sports --ports --ctstate --ctstatus --ctdir --state"
    " --ctproto --mark --set-mark --set-xmark --and-mark --or-mark --xor-mark --mask --nfmask --ctmask --mode --probability"
    " --every --packet --bytecode --object-pinned --src-type --dst-type --to-destination --to-source --to-ports --to"
    " --reject-with --name --seconds --hitcount --src-range --dst-range --timeout --log-prefix --log-level --nflog-prefix"
    " --nflog-group --zone --helper --tcp-option --icmp-type --icmpv6-type"
)
_TWO: Final = frozenset(("--match-set", "--add-set", "--del-set", "--tcp-flags"))


class RuleTextError(ValueError):
    """The text is no rule as iptables-save prints it. The message says what is wrong."""


class Option(NamedTuple):
    """An option of a rule with its values; `negated` where a `!` stands before it."""

    name: str
    values: tuple[str, ...]
    negated: bool = False


class Match(NamedTuple):
    """A match extension (`-m NAME`) with its options; "" is what every rule may have: -s, -d, -i, -o, -p, -f."""

    module: str
    options: tuple[Option, ...]


class Rule(Struct, frozen=True, gc=False):
    """A rule. `number` counts from 1 in its chain; counters are None where the text had none; `target` "" for no target."""

    chain: str
    number: int
    text: str
    matches: tuple[Match, ...]
    target: str
    target_options: tuple[Option, ...]
    goto: bool = False
    packets: int | None = None
    bytes: int | None = None

    @property
    def comment(self) -> str:
        """Its comment, "" for none."""
        return next((o.values[0] for m in self.matches if m.module == "comment" for o in m.options if o.values), "")


class Token(NamedTuple):
    """A word of a rule, without its quotes."""

    text: str
    quoted: bool


def quote(text: str) -> str:
    """`text` as iptables-save prints it."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + re.sub(r"([\"'\\])", r"\\\1", text) + '"'


def tokens(text: str) -> list[Token]:
    """The words of a rule. Raises RuleTextError for a quote that is not closed."""
    if '"' not in text and "\\" not in text:
        return [Token(word, False) for word in text.split()]
    return list(_tokens(text))


def _tokens(text: str) -> Iterator[Token]:
    word: list[str] = []
    inside = started = quoted = False
    position, end = 0, len(text)
    while position < end:
        character = text[position]
        position += 1
        if character == "\\" and inside and position < end:
            word.append(text[position])
            position += 1
        elif character == '"':
            inside = not inside
            started = quoted = True
        elif not inside and character in " \t\n":
            if started:
                yield Token("".join(word), quoted)
            word, started, quoted = [], False, False
        else:
            word.append(character)
            started = True
    if inside:
        raise RuleTextError("a quote is not closed")
    if started:
        yield Token("".join(word), quoted)


def open_quote(text: str) -> bool:
    """Whether a quote is still open at the end of `text`: the rule goes on in the next line."""
    if "\\" not in text:
        return bool(text.count('"') & 1)
    try:
        tokens(text)
    except RuleTextError:
        return True
    return False


def chain_of(line: str) -> str | None:
    """The chain that a line appends a rule to, None for a line that is no rule."""
    if line.startswith("["):
        line = line.partition("] ")[2]
    if not line.startswith("-A "):
        return None
    return line[3:].split(" ", 1)[0]


def parse_rule(line: str, number: int) -> Rule:
    """Read a line `[packets:bytes] -A CHAIN ...`, counters optional. Raises RuleTextError."""
    counters = _COUNTERS.match(line)
    text = line[counters.end() :] if counters else line
    words = tokens(text)
    if len(words) < 2 or words[0].text != "-A":
        raise RuleTextError("does not begin with -A CHAIN")
    chain = words[1].text
    matches, jump, target, options = _split(list(_options(words[2:])))
    return Rule(
        chain=chain,
        number=number,
        text=text.partition(f"-A {chain}")[2].strip(),
        matches=matches,
        target=target,
        target_options=options,
        goto=jump == "-g",
        packets=int(counters[1]) if counters else None,
        bytes=int(counters[2]) if counters else None,
    )


def _options(words: Sequence[Token]) -> Iterator[Option]:
    position = 0
    while position < len(words):
        negated = words[position] == ("!", False)
        position += negated
        if position == len(words):
            raise RuleTextError("ends with '!'")
        name = words[position].text
        if words[position].quoted or not name.startswith("-"):
            raise RuleTextError(f"{name!r} stands where an option was expected")
        position += 1
        count = _count(name, words, position)
        if position + count > len(words):
            raise RuleTextError(f"{name} lacks its value")
        yield Option(name, tuple(word.text for word in words[position : position + count]), negated)
        position += count


def _count(name: str, words: Sequence[Token], position: int) -> int:
    """How many values an option has, the first of which would be at `position`."""
    if name == "--icmp" or name in _FLAGS:
        return 0
    if name in _ONE:
        return 1
    if name in _TWO:
        return 2
    end = position
    while end < len(words) and (words[end].quoted or not (words[end].text == "!" or words[end].text.startswith("-"))):
        end += 1
    return end - position


def _split(options: list[Option]) -> tuple[tuple[Match, ...], str, str, tuple[Option, ...]]:
    """Matches; -j, -g or ""; the target and its options."""
    modules: list[tuple[str, list[Option]]] = [("", [])]
    for position, option in enumerate(options):
        if option.name in ("-j", "-g"):
            matches = tuple(Match(module, tuple(of)) for module, of in modules if module or of)
            return matches, option.name, option.values[0], tuple(options[position + 1 :])
        if option.name == "-m":
            modules.append((option.values[0], []))
        elif option.name in ("-s", "-d", "-i", "-o", "-p", "-f", "-4", "-6"):
            modules[0][1].append(option)
        else:
            modules[-1][1].append(option)
    return tuple(Match(module, tuple(of)) for module, of in modules if module or of), "", "", ()
