"""`make e2e MODE=ipvs`: the suite on this machine where its kernel has IPVS, else the short one in a VM.

E2E_ALL=1 runs all of it in the VM, too. Arguments are those of `python -m e2e`.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from hack.vm import cli, native
from hack.vm.places import REPOSITORY, VmError

CLUSTER: Final = "nodeproxy-e2e"
_NODES: Final = ("--nodes", "1", "--parallel", "3")  # besides the control plane; the VM has one processor
_PASSED_ON: Final = ("E2E_PROXY", "E2E_KEEP")


def main(arguments: Sequence[str]) -> int:
    """Run the suite; its exit status."""
    if {"-h", "--help"} & set(arguments):  # no machine is made ready for that
        return subprocess.run([sys.executable, "-m", "e2e", "--help"], cwd=REPOSITORY, check=False).returncode
    os.environ["E2E_MODE"] = "ipvs"
    try:
        here, why = cli.runs_here()
    except VmError as error:
        print(f"vm: {error}", file=sys.stderr)
        return cli.BROKEN
    if here:
        print(f"vm: {why}, the suite runs on it", file=sys.stderr, flush=True)
        return native.execute([sys.executable, "-m", "e2e", *arguments], env={}, cwd=str(REPOSITORY), limit=None)
    return cli.main(in_vm(arguments, everything=os.environ.get("E2E_ALL") == "1"))


def in_vm(arguments: Sequence[str], *, everything: bool) -> list[str]:
    """The arguments for `hack.vm`."""
    passed_on = [word for name in ("E2E_MODE", *_PASSED_ON) for word in ("--env", name)]
    short = [] if everything else ["--smoke"]
    return ["run", "--kind", CLUSTER, *passed_on, "--", "python", "-m", "e2e", *short, *_NODES, *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
