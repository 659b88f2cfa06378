"""What each proxy holds on a node when it has run there alone, and waiting until a node holds just that."""

from __future__ import annotations

import time
from functools import lru_cache

from nodeproxy.sandbox.pace import scaled
from tests.takeover.held import difference, held
from tests.takeover.proxies import Node, Theirs, made_node
from tests.ways import Way


@lru_cache(maxsize=None, typed=True)  # a mode of theirs and one of ours are equal as tuples
def held_by(proxy: Theirs | Way) -> tuple[str, ...]:
    """What a proxy holds on a node of its own, once it has come to rest."""
    with made_node() as made, made.kube_proxy(proxy) if isinstance(proxy, Theirs) else made.nodeproxy(proxy):
        seen: list[str] = []
        deadline = time.monotonic() + scaled(10)
        while (now := held(made.box.node)) != seen and time.monotonic() < deadline:
            seen = now
            time.sleep(0.5)
        return tuple(seen)


def left_over(node: Node, proxy: Theirs | Way, timeout: float = 10) -> list[str]:
    """Wait until the node holds what it does where this proxy alone has run; the lines that differ in the end."""
    deadline = time.monotonic() + min(scaled(timeout), 3 * timeout)
    while (seen := difference(held_by(proxy), held(node.box.node))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [f"held beside what {proxy} holds alone (+), or missing (-):", *seen.splitlines()] if seen else []
