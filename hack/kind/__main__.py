"""`python -m hack.kind`."""

from hack.kind.cli import main

main()
