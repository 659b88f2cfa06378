"""Running on this machine's own kernel, where it has IPVS."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

TIMED_OUT: Final = 124
NOT_FOUND: Final = 127
_GRACE: Final = 5.0


def has_ipvs() -> bool:
    """Whether ip_vs is in this kernel, or its module could be loaded."""
    if Path("/proc/net/ip_vs").exists():
        return True
    modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if modprobe and os.geteuid() == 0:
        subprocess.run([modprobe, "-q", "ip_vs"], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Path("/proc/net/ip_vs").exists()


def execute(argv: Sequence[str], *, env: Mapping[str, str], cwd: str, limit: float | None) -> int:
    """Run a command here; its exit status, as a shell gives it. Without a time limit this process becomes the command."""
    environment = {**os.environ, **env}
    sys.stdout.flush()
    try:
        if limit is None:
            os.chdir(cwd)
            os.execvpe(argv[0], list(argv), environment)
        process = subprocess.Popen(argv, env=environment, cwd=cwd)
    except OSError as error:
        print(f"vm: {argv[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND
    try:
        return _status(process.wait(limit))
    except subprocess.TimeoutExpired:
        print(f"vm: time is up after {limit:g} s, ending the command", file=sys.stderr, flush=True)
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return TIMED_OUT


def _status(code: int) -> int:
    return 128 - code if code < 0 else code
