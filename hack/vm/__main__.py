"""`python -m hack.vm`."""

import signal
import sys

from hack.vm.cli import main

# However we are told to end, what was begun is cleaned up. (While a command runs, signals go to it.)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: sys.exit(128 + number))
sys.exit(main())
