"""Owns how dumps of connections become counts: what is new of each since the dump before, in bounded memory. Pure.

Where there are more connections than may be remembered, a sample of them is: those whose number ends in so many zero bits.
A connection is in the sample or not for all its life, and what is counted of one stands for all that are not.
"""

from __future__ import annotations

from collections.abc import Iterable

from nodeproxy.agent.observers.traffic_series import Series
from nodeproxy.kernel.conntrack_accounting import Account, Counters, unpack_counters

FLOW_LIMIT = 65_536  # some 300 bytes each while a dump is read, two dictionaries included


class FlowMemory:
    """Adds to series what connections have carried since the last dump. The first dump only shows what is there already.

    For one thread at a time. A dump is any number of calls of `count`, then `finish`; one that broke off ends with `forget`.
    """

    def __init__(self, limit: int = FLOW_LIMIT) -> None:
        self._limit = limit
        self.forget()

    def forget(self) -> None:
        """Start anew: the next dump is a first one."""
        self._seen: dict[int, bytes] | None = None  # counters in the dump before, by connection
        self._fresh: dict[int, bytes] = {}  # the same of this dump so far
        self._counted = 0  # mask: of which connections `_seen` tells
        self._kept = 0  # mask: of which `_fresh` tells, and the next dump will count

    @property
    def sampled_one_in(self) -> int:
        """One of how many connections is counted; 1: all."""
        return self._counted + 1

    def count(self, accounts: Iterable[Account[Series]]) -> None:
        """Take connections of a dump. One that is in it twice is counted once."""
        seen, fresh, counted, kept, limit = self._seen, self._fresh, self._counted, self._kept, self._limit
        for series, number, counters in accounts:
            before = None
            if seen is not None and not number & counted:
                before = seen.pop(number, None)
                if before is None:
                    before = fresh.get(number)
                if before != counters:
                    _add(series, before, counters, counted + 1)
            if number & kept:
                continue
            # Equal bytes are kept once: most connections rest.
            fresh[number] = before if before == counters and before is not None else counters
            if len(fresh) > limit:
                kept = self._kept = kept << 1 | 1
                fresh = self._fresh = {one: carried for one, carried in fresh.items() if not one & kept}

    def finish(self) -> None:
        """The dump is complete. The sample grows again, step by step, when there is ample room."""
        self._seen, self._fresh = self._fresh, {}
        self._counted = self._kept
        if self._kept and len(self._seen) < self._limit // 4:
            self._kept >>= 1


def _add(series: Series, before: bytes | None, counters: bytes, factor: int) -> None:
    now = unpack_counters(counters)
    if before is None:
        series.connections += factor
        then = _NOTHING
    else:
        then = unpack_counters(before)
        if now.in_packets < then.in_packets or now.out_packets < then.out_packets:
            then = _NOTHING  # somebody had the kernel zero them (conntrack -L -z)
    series.in_packets += factor * (now.in_packets - then.in_packets)
    series.in_bytes += factor * (now.in_bytes - then.in_bytes)
    series.out_packets += factor * (now.out_packets - then.out_packets)
    series.out_bytes += factor * (now.out_bytes - then.out_bytes)


_NOTHING = Counters(0, 0, 0, 0)
