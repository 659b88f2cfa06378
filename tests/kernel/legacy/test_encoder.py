"""What the encoder takes, and that it takes nothing else; that it encodes as iptables does is shown in test_patch."""

import struct

import pytest

from nodeproxy.kernel.legacy.encoder import NotEncodable, RuleEncoder


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "-j",
        "-p tcp",
        "-p icmp -j RETURN",
        "! -p tcp -j RETURN",
        "-p 6 -j RETURN",
        "-o eth0 -j RETURN",
        "-s 10.0.0.0/33 -j RETURN",
        "-s 10.0.0.300/32 -j RETURN",
        "-s 10.0.0.1 -j RETURN",
        "-s 10.0.0.1/32 -s 10.0.0.2/32 -j RETURN",
        "-i a-name-of-sixteen -j RETURN",
        "-i + -j RETURN",
        "-m tcp --dport 80 -j RETURN",
        "-p udp -m tcp --dport 80 -j RETURN",
        "-p tcp -m tcp --sport 80 -j RETURN",
        "-p tcp -m tcp --dport 65536 -j RETURN",
        "-p tcp -m tcp ! --dport 80 -j RETURN",
        "-p tcp -m tcp --dport 80 --syn -j RETURN",
        "-m statistic --mode nth --probability 0.5 -j RETURN",
        "-m statistic --mode random --probability half -j RETURN",
        "-m addrtype --dst-type UNICAST -j RETURN",
        "-m addrtype ! --dst-type LOCAL -j RETURN",
        '-m comment --comment "a \\"quoted\\" one" -j RETURN',
        f'-m comment --comment "{"x" * 256}" -j RETURN',
        "-m set --match-set X src -j RETURN",
        "-j DNAT",
        "-j DNAT --to-destination 10.0.0.1",
        "-j DNAT --to-destination 10.0.0.1-10.0.0.2:80",
        "-j DNAT --to-destination 10.0.0.1:80 --random",
        "-j REJECT",
        "-j REJECT --reject-with tcp-reset",
        "-j MARK --set-xmark 0x1/0x1",
        "-j MASQUERADE",
        "-j RETURN --now",
        "-j KUBE-A-CHAIN-WITH-THIRTY-LETTERS",
        "-g KUBE-SVC-A",
    ],
)
def test_other_forms_are_refused(rule: str) -> None:
    with pytest.raises((NotEncodable, ValueError)):
        RuleEncoder(4).encode(rule)


def test_addresses_of_the_other_family_are_refused() -> None:
    for family, rule in ((4, "-d fd00::1/128 -j RETURN"), (6, "-d 10.0.0.1/32 -j RETURN")):
        with pytest.raises(NotEncodable):
            RuleEncoder(family).encode(rule)
    with pytest.raises(NotEncodable):
        RuleEncoder(6).encode("-j DNAT --to-destination fd00::1:80")


def test_a_jump_is_left_to_be_led() -> None:
    rule = RuleEncoder(4).encode("-d 10.0.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A")
    assert rule.chain == "KUBE-SVC-A"
    assert struct.unpack_from("=i", rule.entry, rule.verdict_at) == (0,)
    assert rule.parts == {"-d", "-p tcp", "tcp --dport", "-j jump"}
    target_offset, size = struct.unpack_from("=HH", rule.entry, 88)
    assert (size, rule.verdict_at) == (len(rule.entry), target_offset + 32)
