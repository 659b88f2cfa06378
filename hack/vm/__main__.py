"""`python -m hack.vm`."""

import signal
import sys
from types import FrameType

from hack.vm.cli import main


def end(number: int, _: FrameType | None) -> None:
    """However we are told to end, what was begun is cleaned up. (While a command runs, signals go to it.)"""
    print(f"vm: ended by {signal.Signals(number).name}", file=sys.stderr)
    sys.exit(128 + number)


for each in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, end)
sys.exit(main())
