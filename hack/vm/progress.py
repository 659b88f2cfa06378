"""Progress on standard error: a line per phase with elapsed seconds; on a terminal the line of the phase counts."""

import sys
import time


class Progress:
    """The phases of one start."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._begin = self._phase_begin = time.monotonic()
        self._phase = ""
        self._quiet = quiet
        self._live = sys.stderr.isatty()

    def phase(self, what: str) -> None:
        """The next phase begins; a line tells of the last one if it took long enough to be of interest."""
        self._end_phase()
        self._phase, self._phase_begin = what, time.monotonic()
        self.tick()

    def tick(self) -> None:
        """Time passed."""
        if self._live and not self._quiet and self._phase:
            print(
                f"\r\x1b[Kvm: {self._phase} … {time.monotonic() - self._phase_begin:.1f} s",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def note(self, text: str) -> None:
        """A line of its own."""
        self._end_phase()
        print(f"vm: {text}", file=sys.stderr, flush=True)

    def done(self, text: str) -> None:
        """The end of all phases."""
        self._end_phase()
        if not self._quiet:
            print(f"vm: {text}, {time.monotonic() - self._begin:.1f} s", file=sys.stderr, flush=True)

    def _end_phase(self) -> None:
        if not self._phase:
            return
        took = time.monotonic() - self._phase_begin
        if self._live and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr)
        if took >= 0.5 and not self._quiet:
            print(f"vm: {self._phase}: {took:.1f} s", file=sys.stderr, flush=True)
        self._phase = ""
