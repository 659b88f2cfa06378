"""nodeproxy starts on a node that kube-proxy, which has ended, has programmed in each of its modes."""

from __future__ import annotations

import time

import pytest

from nodeproxy.sandbox.client import Rejected
from nodeproxy.sandbox.pace import scaled
from tests.takeover import shop
from tests.takeover.alone import left_over
from tests.takeover.held import repeated
from tests.takeover.probing import Probing, Stream, asked, wait_serving
from tests.takeover.proxies import NO_KUBE_PROXY, Node, Theirs, both_modes
from tests.ways import Way

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(bool(NO_KUBE_PROXY), reason=NO_KUBE_PROXY)]


@pytest.mark.parametrize(("theirs", "way"), list(both_modes()))
def test_nothing_is_lost_and_nothing_of_kube_proxy_is_left(node: Node, theirs: Theirs, way: Way) -> None:
    with node.kube_proxy(theirs):
        wait_serving(node.box)
    stream = Stream(node.box.pods[shop.ASKING_POD[0]], shop.WEB, 80)
    drain = min(scaled(4), 12)
    with Probing(node.box) as probing:
        time.sleep(0.3)
        with node.nodeproxy(way, "--ipvs-drain-timeout", f"{drain:.0f}s") as agent:
            time.sleep(1)
            problems = stream.problems()
            stream.close()
            left = left_over(node, way, timeout=drain + 8)
            assert isinstance(asked(node.box, shop.EMPTY), Rejected)
    problems += [*probing.problems(), *left, *repeated(node.box.node)]
    assert not problems, "\n".join([*problems, agent.log_tail()])
