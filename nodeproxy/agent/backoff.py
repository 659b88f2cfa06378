"""Owns waiting between tries: tenacity's exponential back-off with jitter, for loops that do more than retry one call."""

from __future__ import annotations

from tenacity import RetryCallState, Retrying, wait_exponential_jitter


class Backoff:
    """Delays in seconds that grow from `initial` to `maximum` until `reset`."""

    def __init__(self, initial: float, maximum: float) -> None:
        self._policy = wait_exponential_jitter(multiplier=initial, max=maximum, jitter=initial / 2)
        self.reset()

    def reset(self) -> None:
        """Start anew: the last try succeeded."""
        self._state = RetryCallState(retry_object=Retrying(), fn=None, args=(), kwargs={})

    def next(self) -> float:
        """Seconds to wait before the next try."""
        delay = self._policy(self._state)
        self._state.attempt_number += 1
        return delay
