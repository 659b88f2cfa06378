"""`make conformance MODE=ipvs`: on this machine where its kernel has IPVS, else in a VM.

Arguments are those of `python -m hack.conformance`.
"""

import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from hack.kind import engine, test_images
from hack.kind.places import KindError
from hack.vm import cli, native
from hack.vm.places import REPOSITORY, VmError

CLUSTER: Final = "conformance"
# The VM has one processor and what two nodes need: tests want two that they may use, so the control plane's is one.
_IN_VM: Final = ("--workers", "1", "--all-nodes", "--procs", "3")


def main(arguments: Sequence[str]) -> int:
    """Run the tests; their exit status."""
    command = ["python", "-m", "hack.conformance", "--mode", "ipvs"]
    if {"-h", "--help"} & set(arguments):  # no machine is made ready for that
        return subprocess.run([sys.executable, *command[1:], "--help"], cwd=REPOSITORY, check=False).returncode
    try:
        here, why = cli.runs_here()
        if here:
            print(f"vm: {why}, the tests run on it", file=sys.stderr, flush=True)
            return native.execute([sys.executable, *command[1:], *arguments], env={}, cwd=str(REPOSITORY), limit=None)
        engine.ensure()
        images = [word for image in test_images.all_images() for word in ("--image", image)]
    except (KindError, VmError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return cli.BROKEN
    return cli.main(["run", "--kind", CLUSTER, *images, "--", *command, *_IN_VM, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
