"""Owns the conformance runner: sends a scene's packets for real and says what differs from what was expected.

What IPVS mode may do differently is in `expected` alone.

Each flow is sent several times: often enough that every endpoint that may answer is seen to (the chance that one is
missed although all are equally likely is below one in 10^9). Before the agent is started each flow is sent once, to
show that its packets pass the node undisturbed: a DROP seen later is then the agent's doing, not a gap in the sandbox.
"""

from __future__ import annotations

import errno
import ipaddress
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Final

from nodeproxy.sandbox.agent import Variant
from nodeproxy.sandbox.client import (
    PATIENT,
    TIMEOUT,
    Answered,
    Connected,
    Dropped,
    NoListener,
    Probe,
    Rejected,
    Verdict,
    probe_many,
)
from nodeproxy.sandbox.scene import ON_NODE, OUTSIDE, Flow, Layout, Scene, lay_out, sticky
from nodeproxy.sandbox.sockets import split_host_port

FEW: Final = 6
MISSED: Final = 1e-9
CLOSED_PORT: Final = 9  # on the node, not accepted by any rule: shows that the INPUT policy is in force

StartAgent = Callable[[Layout], AbstractContextManager[object]]


@dataclass(slots=True)
class FlowResult:
    """A flow, how often each verdict was seen, and what is wrong with that (nothing: the flow is as expected)."""

    flow: Flow
    seen: Counter[str]
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        seen = ", ".join(f"{count} x {what}" for what, count in self.seen.most_common())
        return f"{self.flow}; seen {seen}" + "".join(f"\n    {problem}" for problem in self.problems)


def probes_for(choices: int) -> int:
    """How many probes show every one of so many equally likely endpoints."""
    return FEW if choices < 2 else math.ceil(math.log(choices / MISSED) / -math.log(1 - 1 / choices))


def run_scene(scene: Scene, start: StartAgent, variant: Variant, mode: str = "iptables") -> list[FlowResult]:
    """Lay a scene out, start an agent of a mode, send every flow; one result for each, the ACCEPT flows last."""
    with lay_out(scene) as layout:
        wrong = [result for flow in scene.flows if (result := check_path(layout, flow)).problems]
        if wrong:
            return wrong
        with start(layout):
            results = [check_flow(layout, flow, mode) for flow in scene.flows if flow.expect != "ACCEPT"]
            accepted = [flow for flow in scene.flows if flow.expect == "ACCEPT"]
            if accepted:
                with closed_input(layout, variant):
                    results += [check_accept(layout, flow) for flow in accepted]
    return results


def _send(layout: Layout, flow: Flow, count: int, timeout: float = PATIENT) -> list[Verdict]:
    one = Probe(flow.destination, flow.port, flow.protocol, flow.source)
    with layout.sender(flow) as where:
        return probe_many(where, [one] * count, timeout=timeout)


def _result(flow: Flow, verdicts: list[Verdict]) -> FlowResult:
    return FlowResult(flow, Counter(_short(verdict) for verdict in verdicts))


def _short(verdict: Verdict) -> str:
    return f"{verdict.name} saw {verdict.source}" if isinstance(verdict, Answered) else str(verdict)


def check_path(layout: Layout, flow: Flow) -> FlowResult:
    """Without an agent, a flow's packet must get through to whatever stands at its end, source unchanged."""
    verdicts = _send(layout, flow, 1)
    result = _result(flow, verdicts)
    through = isinstance(verdicts[0], Answered) and verdicts[0].source == flow.source
    if not through and not (flow.expect == "ACCEPT" and isinstance(verdicts[0], NoListener)):
        result.problems.append("the sandbox itself does not let this packet through")
    return result


def expected(layout: Layout, flow: Flow, mode: str) -> str | list[str]:
    """What a mode must make of a flow.

    IPVS mode has the service addresses on the node, so what no Service matches there is rejected, lest a process of the node
    gets it; and it leaves node ports on loopback alone, as kube-proxy's does.
    """
    if mode != "ipvs":
        return flow.expect
    if ipaddress.ip_address(flow.destination).is_loopback:
        return "no-match"
    if flow.expect == "no-match" and flow.destination in layout.scene.service_addresses():
        held = layout.box.is_local(flow.destination) and not layout.on_node(flow.destination)
        return "REJECT" if held else "no-match"
    return flow.expect


def check_flow(layout: Layout, flow: Flow, mode: str) -> FlowResult:
    """Send a flow and compare."""
    expect = expected(layout, flow, mode)
    choices = len(expect) if isinstance(expect, list) else 1
    verdicts = _send(layout, flow, probes_for(choices), TIMEOUT if expect == "DROP" else PATIENT)
    result = _result(flow, verdicts)
    if isinstance(expect, list):
        result.problems += _endpoint_problems(layout, flow, verdicts)
    elif expect == "no-match":
        result.problems += _untouched_problems(flow, verdicts)
    else:
        wanted = {"REJECT": Rejected, "DROP": Dropped}[expect]
        if not all(isinstance(verdict, wanted) for verdict in verdicts):
            result.problems.append(f"not always {wanted.__name__}")
    return result


def _endpoint_problems(layout: Layout, flow: Flow, verdicts: list[Verdict]) -> Iterator[str]:
    answers = [verdict for verdict in verdicts if isinstance(verdict, Answered)]
    expected = set(flow.expect)
    names = {answer.name for answer in answers}
    if len(answers) < len(verdicts):
        yield f"{len(verdicts) - len(answers)} of {len(verdicts)} not answered"
    if names - expected:
        yield f"answered by {sorted(names - expected)}"
    if sticky(layout.scene, flow):
        if len(names) > 1:
            yield "affinity, but more than one endpoint answered one client"
    elif expected - names:
        yield f"never answered by {sorted(expected - names)}"
    yield from sorted({problem for answer in answers if (problem := _source_problem(layout, flow, answer))})


def _source_problem(layout: Layout, flow: Flow, answer: Answered) -> str | None:
    """What is wrong with the source that arrived.

    A hairpin (who sends is who answers) is masqueraded in any case. An endpoint on the node itself is reached by INPUT,
    where the kernel masquerades nothing: there the source may stay.
    """
    if answer.name not in flow.expect:
        return None
    endpoint = split_host_port(answer.name)[0]
    rewritten = answer.source != flow.source and answer.source in layout.box.owned_addresses()
    if not flow.masquerade and endpoint != flow.source:
        return None if answer.source == flow.source else f"masqueraded: source {answer.source} arrived"
    unchanged = answer.source == flow.source and layout.on_node(endpoint)
    return None if rewritten or unchanged else f"not masqueraded: source {answer.source} arrived"


def _untouched_problems(flow: Flow, verdicts: list[Verdict]) -> Iterator[str]:
    for verdict in verdicts:
        untouched = isinstance(verdict, Answered) and verdict.name in (ON_NODE, OUTSIDE)
        if not untouched or not isinstance(verdict, Answered) or verdict.source != flow.source:
            yield f"not left alone: {_short(verdict)}"


@contextmanager
def closed_input(layout: Layout, variant: Variant) -> Iterator[None]:
    """A node whose own firewall lets nothing new in, except what the agent's rules accept."""
    tools = [f"iptables-{variant}", f"ip6tables-{variant}"]
    rules = [
        ["-i", "lo", "-j", "ACCEPT"],
        ["-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT"],
    ]
    for tool in tools:
        discovery = [["-p", "ipv6-icmp", "-j", "ACCEPT"]] if tool.startswith("ip6") else []
        for rule in [*rules, *discovery]:
            layout.box.node.command([tool, "-w", "5", "-A", "INPUT", *rule])
        layout.box.node.command([tool, "-w", "5", "-P", "INPUT", "DROP"])
    try:
        yield
    finally:
        for tool in tools:
            layout.box.node.command([tool, "-w", "5", "-P", "INPUT", "ACCEPT"])


def check_accept(layout: Layout, flow: Flow) -> FlowResult:
    """The packet must reach a listener although the node's INPUT policy is DROP, and a port beside it must not."""
    node = layout.box.node
    for port, name in ((flow.port, ON_NODE), (CLOSED_PORT, "closed")):
        try:
            layout.box.serve(node, flow.destination, port, protocol=flow.protocol, name=name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # in use: the agent's own health check server listens there
                raise
    verdicts = _send(layout, flow, FEW)
    result = _result(flow, verdicts)
    for verdict in verdicts:
        reached = isinstance(verdict, Answered) and (verdict.name, verdict.source) == (ON_NODE, flow.source)
        if not reached and not isinstance(verdict, Connected):
            result.problems.append(f"not accepted: {_short(verdict)}")
    if layout.from_node(flow):
        return result  # what comes in by loopback is let in in any case, as on every node
    with layout.sender(flow) as where:
        beside = Probe(flow.destination, CLOSED_PORT, flow.protocol, flow.source)
        control = probe_many(where, [beside])[0]
    if not isinstance(control, Dropped):
        result.problems.append(f"the node's policy is not in force: port {CLOSED_PORT} gave {_short(control)}")
    return result
