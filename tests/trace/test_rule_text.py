"""Reading of iptables-save: round trips for any quoting, comparison with the kernel's own print, and bad text."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeproxy.sandbox.topology import Sandbox
from nodeproxy.trace.rule_text import Option, Rule, RuleTextError, Token, parse_rule, quote, tokens
from nodeproxy.trace.saved_tables import SavedTablesError, parse_tables

# What may be in a comment: anything that C takes for text.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
ODD = st.text("\"'\\ -!\n\tab[]:*#", max_size=20)
NAMES = st.text(string.ascii_uppercase + string.digits + "-.:/_", min_size=1, max_size=20).map(lambda text: f"K{text}")


def comment(rule: Rule | RuleTextError) -> str:
    assert isinstance(rule, Rule)
    return rule.comment


@given(TEXTS | ODD)
def test_quoting_round_trip(text: str) -> None:
    assert [token.text for token in tokens(f"a {quote(text)} b")] == ["a", text, "b"]


@given(st.lists(TEXTS | ODD, min_size=1, max_size=8), NAMES)
def test_rules_round_trip(comments: list[str], chain: str) -> None:
    """Comments with quotes, line ends and what looks like options or lines of their own stay comments."""
    lines = [f"[1:2] -A {chain} -p tcp -m comment --comment {quote(text)} -m tcp --dport 80 -j ACCEPT" for text in comments]
    found = parse_tables("\n".join(["*filter", ":INPUT ACCEPT [0:0]", f":{chain} - [0:0]", *lines, "COMMIT", ""]))
    rules = found.chain("filter", chain)
    assert rules is not None
    assert [comment(rule) for rule in rules.rules()] == comments
    for number, rule in enumerate(rules.rules(), 1):
        assert isinstance(rule, Rule)
        assert (rule.number, rule.packets, rule.bytes, rule.target) == (number, 1, 2, "ACCEPT")
        assert [match.module for match in rule.matches] == ["", "comment", "tcp"]


@given(TEXTS)
def test_any_text_is_read_or_refused(text: str) -> None:
    """No line, however bad, raises anything else."""
    try:
        parse_rule(f"-A X {text}", 1)
    except RuleTextError as error:
        assert str(error)
    try:
        for name in parse_tables(text).tables():
            assert name is not None
    except SavedTablesError as error:
        assert "line" in str(error)


def test_what_a_rule_is_made_of() -> None:
    rule = parse_rule(
        '[12:720] -A KUBE-SVC-X ! -s 10.0.0.0/8 -d 10.96.0.1/32 -p tcp -m comment --comment "a \\"b\\"" '
        "-m set ! --match-set A src,dst -m statistic --mode random --probability 0.5 -j DNAT --to-destination 1.2.3.4:80",
        3,
    )
    assert rule.matches[0].options == (
        Option("-s", ("10.0.0.0/8",), True),
        Option("-d", ("10.96.0.1/32",)),
        Option("-p", ("tcp",)),
    )
    assert rule.comment == 'a "b"'
    assert rule.matches[2].options == (Option("--match-set", ("A", "src,dst"), True),)
    assert (rule.target, rule.target_options) == ("DNAT", (Option("--to-destination", ("1.2.3.4:80",)),))
    assert (rule.packets, rule.bytes, rule.number, rule.goto) == (12, 720, 3, False)
    assert parse_rule("-A X -g Y", 1).goto
    assert parse_rule("-A X", 1).target == ""


def test_an_unquoted_comment_may_look_like_an_option() -> None:
    rule = parse_rule("-A X -m comment --comment -j -j DROP", 1)
    assert (rule.comment, rule.target) == ("-j", "DROP")
    assert tokens('"-j" -j') == [Token("-j", True), Token("-j", False)]


@pytest.mark.parametrize("text", ['-A X -m comment --comment "open', "-A X -s", "-A X !", "-A X stray", "-A", "X"])
def test_bad_rules(text: str) -> None:
    with pytest.raises(RuleTextError):
        parse_rule(text, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-A INPUT -j DROP", "line 1 comes before any table"),
        ("*nat\nhello", "line 2 is neither a table, nor a chain, nor a rule: 'hello'"),
        ("*nat\n:X", "line 2 is no chain"),
        ('*nat\n\n-A X -m comment --comment "a\nb', "line 3: a quote is not closed"),
    ],
)
def test_bad_tables(text: str, reason: str) -> None:
    with pytest.raises(SavedTablesError, match=reason):
        parse_tables(text)


@pytest.mark.kernel
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_the_kernels_own_print_is_read(variant: str) -> None:
    """Comments with everything that is hard to quote go through the kernel and iptables-save, and come out as they were."""
    comments = [
        'say "hi"',
        "it's",
        "back\\slash",
        "-j",
        "! -s",
        "two\nlines\n-A OUTPUT -j DROP",
        "*nat",
        "e\N{ACUTE ACCENT}",
    ]
    with Sandbox() as box:
        for text in comments:
            rule = ["-A", "OUTPUT", "-m", "comment", "--comment", text, "-j", "ACCEPT"]
            box.node.command([f"iptables-{variant}", "-w", "5", *rule])
        saved = box.node.command([f"iptables-{variant}-save", "-c"]).stdout
    chain = parse_tables(saved).chain("filter", "OUTPUT")
    assert chain is not None
    assert [comment(rule) for rule in chain.rules()] == comments
