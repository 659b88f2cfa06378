"""Owns running Python in a namespace without any privilege over it."""

import sys

from tests.kernel.conftest import NetworkNamespace


def python_without_privilege(netns: NetworkNamespace, code: str) -> str:
    """What the code prints, and its traceback if it fails, when run as root of a user namespace that does not own netns."""
    command = ("unshare", "--user", "--map-root-user", sys.executable, "-c", code)
    return netns.command("sh", "-c", 'exec "$@" 2>&1', "sh", *command, check=False)
