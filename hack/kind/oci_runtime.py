#!/usr/bin/python3 -IS
"""Owns an OCI runtime for machines that lack a capability: takes it out of what is asked for, then becomes runc.

Docker's `--privileged` asks for every capability that it knows, and runc fails with `unable to apply caps` where this
machine's bounding set lacks one (CAP_SYS_RESOURCE, in many sandboxes). dockerd runs this file in runc's place
(`--add-runtime`); it stands alone, needs nothing but the standard library, and is copied out of the repository.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

_FILE_OPTIONS = {"create": ("--bundle", "-b"), "run": ("--bundle", "-b"), "exec": ("--process", "-p")}
_NAMES = re.findall(
    r"\w+",
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE",
)


def lacking(status: str) -> set[str]:
    """The capabilities that are not in the bounding set, given the text of /proc/self/status."""
    line = next((line for line in status.splitlines() if line.startswith("CapBnd:")), None)
    if line is None:
        return set()
    mask = int(line.split()[1], 16)
    return {f"CAP_{name}" for bit, name in enumerate(_NAMES) if not mask >> bit & 1}


def document(arguments: list[str]) -> Path | None:
    """The file that tells the process of this call: the bundle's config.json, or that of `exec --process`."""
    command = next((argument for argument in arguments if argument in _FILE_OPTIONS), None)
    if command is None:
        return None
    long, short = _FILE_OPTIONS[command]
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in (long, short):
            given = value if equals else arguments[position + 1]
            return Path(given, "config.json") if long == "--bundle" else Path(given)
    return Path("config.json") if long == "--bundle" else None


def without(config: dict[str, Any], lost: set[str]) -> dict[str, Any]:
    """A bundle's configuration (or a process of its own) without the capabilities in `lost`."""
    process = config.get("process", config)
    sets = process.get("capabilities") or {}
    kept = {name: [capability for capability in held if capability not in lost] for name, held in sets.items()}
    changed = {**process, "capabilities": kept} if sets else process
    return {**config, "process": changed} if "process" in config else changed


def main(arguments: list[str]) -> None:
    """Edit the file of this call, if it has one, and become runc."""
    path = document(arguments)
    if path is not None and path.exists():
        given = json.loads(path.read_text())
        path.write_text(json.dumps(without(given, lacking(Path("/proc/self/status").read_text()))))
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
    os.execvp("runc", ["runc", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
