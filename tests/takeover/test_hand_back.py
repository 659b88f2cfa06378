"""kube-proxy starts on a node that nodeproxy, which has ended, has programmed; then `nodeproxy cleanup` removes ours.

In nftables mode kube-proxy removes rules of iptables before it programs its own, whoever made them: there it is no loss of
ours when no answer comes for a moment.
"""

from __future__ import annotations

import contextlib
import time

import pytest

from nodeproxy.sandbox.agent import METRICS, AgentProcess, http_get
from nodeproxy.sandbox.client import Answered
from tests.takeover import shop
from tests.takeover.alone import left_over
from tests.takeover.held import repeated
from tests.takeover.probing import Probing, Stream, asked, wait_serving
from tests.takeover.proxies import NO_KUBE_PROXY, Node, Theirs, both_modes
from tests.ways import Way

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(bool(NO_KUBE_PROXY), reason=NO_KUBE_PROXY)]

OFTEN = ("--iptables-sync-period", "1s", "--ipvs-sync-period", "1s")


@pytest.mark.parametrize(("theirs", "way"), list(both_modes()))
def test_nothing_is_lost_and_nothing_of_ours_is_left(node: Node, theirs: Theirs, way: Way) -> None:
    with node.nodeproxy(way):
        wait_serving(node.box)
    stream = Stream(node.box.pods[shop.ASKING_POD[0]], shop.WEB, 80)
    starting, cleaning = Probing(node.box), Probing(node.box)
    with starting if theirs.mode != "nftables" else contextlib.nullcontext(), node.kube_proxy(theirs) as kube_proxy:
        wait_serving(node.box)
        problems: list[str] = []
        if way.mode == "ipvs" != theirs.mode:  # cleanup waits for connections that go through IPVS
            problems = stream.problems() if theirs.mode != "nftables" else []
            stream.close()
        with cleaning:
            time.sleep(0.5)
            node.cleanup()
            left = left_over(node, theirs, timeout=5)
            time.sleep(0.5)
        if theirs.mode == way.mode:
            problems = stream.problems()
    problems += starting.problems() if theirs.mode != "nftables" else []
    problems += [*cleaning.problems(), *left, *repeated(node.box.node)]
    assert not problems, "\n".join([*problems, *_errors(kube_proxy)])


@pytest.mark.parametrize(("theirs", "way"), list(both_modes()))
def test_kube_proxy_goes_on_from_there(node: Node, theirs: Theirs, way: Way) -> None:
    """A Service goes, one gets its first endpoint, the source ranges of one change.

    In the same variant of iptables mode that takes no cleanup: nothing that we leave may stop kube-proxy from programming.
    Of IPVS mode the fence of source ranges, which is in the mangle table, stays as we left it until the cleanup.
    """
    with node.nodeproxy(way):
        wait_serving(node.box)
    with node.kube_proxy(theirs, *OFTEN) as kube_proxy:
        wait_serving(node.box)
        if theirs != tuple(way) or way.mode == "ipvs":
            node.cleanup()
        node.api.delete("Service", "shop", "remote")
        node.api.delete("EndpointSlice", "shop", "remote-ipv4")
        node.api.apply(shop.endpoints("empty", [shop.POD_A[0]]))
        node.api.apply(shop.fenced("198.51.100.0/24"))
        deadline = time.monotonic() + 20
        while (wrong := _wrong(node)) and time.monotonic() < deadline:
            time.sleep(0.2)
        errors = _errors(kube_proxy)
        _, metrics = http_get(node.box.node, f"http://{METRICS}/metrics")
    failures = [
        line for line in metrics.splitlines() if "restore_failures_total" in line and not line.endswith((" 0", "counter"))
    ]
    assert not wrong, "\n".join([*wrong, *failures, *errors])


def _errors(kube_proxy: AgentProcess) -> list[str]:
    """What it said went wrong, but for accounting objects that nobody misses."""
    return [line for line in kube_proxy.log_text().splitlines() if line.startswith("E") and "nfacct" not in line][:10]


def _wrong(node: Node) -> list[str]:
    refused, client = node.box.clients[shop.REFUSED_CLIENT], node.box.clients[shop.CLIENT[0]]
    verdicts = {
        "the deleted Service": (asked(node.box, shop.REMOTE_WEB), False),
        "the Service with its first endpoint": (asked(node.box, shop.EMPTY), True),
        "a source that is allowed now": (asked(node.box, shop.FENCED_IP, refused), True),
        "a source that is not allowed any more": (asked(node.box, shop.FENCED_IP, client), False),
    }
    return [
        f"{what}: {verdict}" for what, (verdict, answered) in verdicts.items() if isinstance(verdict, Answered) != answered
    ]
