"""Hostile objects, from raw JSON to rule text: 10,000 mutated ones, and no text escapes its field.

Every line of every transaction must fit a grammar that knows only the words that nodeproxy writes; what is left at the end
is also read by the real iptables-restore (in `test_rules_on_kernel.py`).
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from nodeproxy.api.objects import Kind
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.programmer.base import LocalDetector, NodePortAddresses, ProgrammerConfig
from nodeproxy.programmer.iptables.ruleset import Ruleset
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.common import Features
from nodeproxy.source.decoding import DECODE_ERRORS, explain, identify, read_json, read_object
from nodeproxy.source.events import Event, Refused, Upserted

OBJECTS = 10_000
CONFIG = ProgrammerConfig(
    families=(Family.IPV4, Family.IPV6),
    local_detector=LocalDetector(cidrs={Family.IPV4: "10.0.0.0/8", Family.IPV6: "fd00:10::/64"}),
    node_port_addresses={Family.IPV4: NodePortAddresses(loopback=True), Family.IPV6: NodePortAddresses()},
)

SERVICE: dict[str, Any] = {
    "metadata": {"name": "web", "namespace": "shop", "labels": {}, "creationTimestamp": "2026-01-01T00:00:00Z"},
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1", "fd00:96::1"],
        "externalIPs": ["192.0.2.1", "2001:db8::1"],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "loadBalancerSourceRanges": ["198.51.100.0/24", " 2001:db8:1::/48 "],
        "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Cluster",
        "healthCheckNodePort": 30999,
        "ports": [
            {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080},
            {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
        ],
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1", "ipMode": "VIP"}]}},
}
SLICE: dict[str, Any] = {
    "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "endpoints": [
        {
            "addresses": ["10.1.0.1"],
            "nodeName": "here",
            "conditions": {"ready": True, "serving": True, "terminating": False},
        },
        {"addresses": ["10.1.0.2"], "conditions": {"ready": False, "serving": True, "terminating": True}},
    ],
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
}
HOSTILE: tuple[Any, ...] = (
    "\n-A INPUT -j ACCEPT", 'x" -j ACCEPT -m comment --comment "y', "a b", "'", '"', "\\", "\x00", "\u2028", "\u0661",
    "a\tb",
    "-j", "--to-destination", "!", "", " ", "COMMIT", "*filter", "$(reboot)", "`reboot`", "%s", "ä" * 40, "x" * 300,
    "A" * 63,
    "web\n", "web.", ".", "..", "-web", "10.0.0.256", "010.0.0.1", "1.2.3", "1.2.3.4/33", "1.2.3.4 ", "0.0.0.0", "127.0.0.1",
    "224.0.0.1", "::1", "::", "fe80::1%eth0", "::ffff:10.0.0.1", "fd00::1", "10.96.0.1", "0.0.0.0/0", "::/0", "1.2.3.4/0",
    "None", "TCP", "udp", "SCTP", "ICMP", "Local", "Cluster", "local", "ClientIP", "NodePort", "ExternalName", "IPv6",
    "FQDN",
    -1, 0, 1, 53, 80, 30080, 65535, 65536, 2**31, 2**63, 2**70, 1.5, 1e400, True, False, None, [], {}, [[]], {"a": 1}, ["a"],
    [None], [""], ["10.1.0.1", "10.1.0.1"],
)  # fmt: skip

NAME = r"[A-Z][A-Za-z0-9./:-]{0,27}"
V4, V6 = r"\d{1,3}(?:\.\d{1,3}){3}", r"[0-9a-f:]*:[0-9a-f:.]*"
ADDRESS = rf"(?:{V4}|{V6})/\d{{1,3}}"
MATCHES = "|".join(
    (
        rf"(?:! )?-[sd] {ADDRESS}",
        r"-p (?:tcp|udp|sctp)",
        r"-m (?:tcp|udp|sctp) --dport \d{1,5}(?::\d{1,5})?",
        r'-m comment --comment "[a-z0-9.:/ -]{1,240}(?: IP)?"',
        r"-m addrtype --(?:src|dst)-type LOCAL",
        r"-m statistic --mode random --probability 0\.\d{11}",
        r"-m set --match-set KUBE-AFFINITY6?-[A-Z2-7]{16} src",
    )
)
TARGETS = "|".join(
    (
        r"KUBE-[A-Z]+-[A-Z2-7]{16}",
        r"KUBE-(?:MARK-MASQ|NODEPORTS|EXTERNAL-SERVICES|SVC-(?:IP-[A-Z2-7]{16}|[0-9a-f.:]+/[0-9]+|[a-z]+-[0-9-]+)|HEALTH-[a-z0-9-]+)",
        rf"DNAT --to-destination (?:{V4}|\[{V6}\]):\d{{1,5}}",
        r"REJECT --reject-with icmp6?-port-unreachable",
        r"SET --add-set KUBE-AFFINITY6?-[A-Z2-7]{16} src --exist --timeout \d{1,5}",
        r"DROP|ACCEPT",
    )
)
LINE = re.compile(
    rf"\*(?:nat|filter)|COMMIT|:{NAME} - \[0:0\]|-X {NAME}|-A {NAME} (?:(?:{MATCHES}) )*-j (?:{TARGETS})", re.ASCII
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from paths(child, (*path, key))


def mutated(base: dict[str, Any], source: random.Random) -> dict[str, Any]:
    """A copy with one to three places replaced, removed, or repeated."""
    result = copy.deepcopy(base)
    for _ in range(source.randint(1, 3)):
        places = list(paths(result))
        if not places:
            break
        *parents, last = source.choice(places)
        holder = result
        for step in parents:
            holder = holder[step]
        deed = source.random()
        if deed < 0.15:
            del holder[last]
        elif deed < 0.25 and isinstance(holder, list):
            holder.extend(copy.deepcopy(holder[last]) for _ in range(source.choice((1, 3, 1000))))
        else:
            holder[last] = copy.deepcopy(source.choice(HOSTILE))
    return result


def event_of(kind: Kind, obj: dict[str, Any]) -> Event:
    """What a source makes of an object, from its JSON text."""
    text = json.dumps(obj).encode(errors="surrogatepass")
    try:
        return Upserted(read_object(kind, text, read_json))
    except DECODE_ERRORS as error:
        return Refused(identify(kind, text, read_json), explain(error), "fuzz")


def hostile_events(source: random.Random, objects: int) -> Iterator[Event]:
    """Events of a source that reads Services and EndpointSlices, most of them mutated."""
    for _ in range(objects):
        kind = source.choice((Kind.SERVICE, Kind.ENDPOINT_SLICE))
        base = copy.deepcopy(SERVICE if kind is Kind.SERVICE else SLICE)
        number = source.randint(0, 20)
        base["metadata"]["name"] = f"web-{number}"
        if kind is Kind.SERVICE:
            base["spec"]["clusterIP"] = f"10.96.0.{number}"
            base["spec"]["clusterIPs"] = [f"10.96.0.{number}", f"fd00:96::{number:x}"]
        else:
            base["metadata"]["labels"]["kubernetes.io/service-name"] = f"web-{source.randint(0, 20)}"
            if number % 3 == 0:
                base["addressType"] = "IPv6"
                for index, endpoint in enumerate(base["endpoints"]):
                    endpoint["addresses"] = [f"fd00:1::{index + 1:x}"]
        yield event_of(kind, mutated(base, source) if source.random() < 0.6 else base)


def hostile_transactions(seed: int, objects: int) -> Iterator[tuple[Family, str, bool]]:
    """Family, transaction text, and whether the source refused the object as a whole."""
    state, tracker = ClusterState("here"), ForwardingTracker(NodeFacts(name="here", addresses=("198.51.100.7",)))
    rulesets = {family: Ruleset(family, CONFIG, Features()) for family in Family}
    for event in hostile_events(random.Random(seed), objects):
        delta = tracker.update(state, state.apply([event]))
        for family, ruleset in rulesets.items():
            rows = {key: change.after for key, change in delta.rows.items() if key.family is family}
            yield family, tx.render(tx.incremental(ruleset.change(rows).tables)), isinstance(event, Refused)


def test_no_text_escapes_its_field() -> None:
    lines = refused = forwarding = 0
    for _, text, was_refused in hostile_transactions(seed=4, objects=OBJECTS):
        refused += was_refused
        for line in text.splitlines():
            lines += 1
            forwarding += "DNAT" in line
            assert LINE.fullmatch(line), line
    # The test is worth something only if much gets through and much is refused.
    assert lines > 20_000
    assert forwarding > 1_000
    assert refused > 1_000


def test_the_grammar_is_strict() -> None:
    good = (
        '-A KUBE-SVC-10.0.0.0/8 -d 10.0.0.1/32 -p tcp -m comment --comment "ns/svc:p cluster IP" -m tcp --dport 80 -j DROP'
    )
    assert LINE.fullmatch(good)
    for bad in (
        good.replace("svc", 'svc" -j ACCEPT -m comment --comment "'),
        good + "\n-F",
        good.replace("80", "80 -j ACCEPT"),
    ):
        assert not LINE.fullmatch(bad)
