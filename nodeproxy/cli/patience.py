"""Owns reading a roll-out while the API server comes and goes: again for some minutes, and said once."""

from __future__ import annotations

from collections.abc import Callable

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from nodeproxy.operator.api import ProxyRollout
from nodeproxy.operator.client import Unanswered

Read = Callable[[], ProxyRollout]


def patiently(read: Read, say: Callable[[str], None], *, seconds: float) -> Read:
    """`read`, again and again while it raises `Unanswered`, which is let through after so many seconds of that.

    `say` is told why, once for each time that the answers stop.
    """

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            say(str(state.outcome.exception()))

    def again() -> ProxyRollout:
        retrying = Retrying(
            retry=retry_if_exception_type(Unanswered),
            wait=wait_exponential_jitter(multiplier=0.5, max=10, jitter=0.5),
            stop=stop_after_delay(seconds),
            before_sleep=tell,
            reraise=True,
        )
        return retrying(read)

    return again
