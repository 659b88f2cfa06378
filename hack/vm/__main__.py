"""`python -m hack.vm`."""

import sys

from hack.vm.cli import main

sys.exit(main())
