"""Owns reading and writing sysctls of the network namespace of the calling thread, through /proc/sys.

Names are as for the sysctl program: `net.ipv4.ip_forward`. If the first separator is a slash, dots are literal, and in a
dotted name a slash stands for a dot: an interface `eth0.100` is `net/ipv4/conf/eth0.100/rp_filter` or
`net.ipv4.conf.eth0/100.rp_filter`.

In a container without privileges /proc/sys is mounted read-only, whatever its capabilities. The environment variable
NODEPROXY_PROC_SYS names another mount of it, of which only what is used has to be there (deploy/ mounts `net`).
"""

import errno
import os
import re
from pathlib import Path
from typing import Final

from nodeproxy.kernel.errors import SysctlAbsent, SysctlReadOnly, SysctlRefused

_ROOT: Final = Path(os.environ.get("NODEPROXY_PROC_SYS") or "/proc/sys")
_SEPARATOR: Final = re.compile(r"[./]")
_SWAP: Final = str.maketrans("./", "/.")


def path_of(name: str) -> Path:
    """The file of a sysctl. Raises ValueError for a name that is no path below /proc/sys."""
    first = _SEPARATOR.search(name)
    relative = name.translate(_SWAP) if first is not None and first[0] == "." else name
    parts = relative.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"not a sysctl name: {name!r}")
    return _ROOT.joinpath(*parts)


def get(name: str) -> str:
    """The value, without the line end; several numbers are separated by tabs. Raises SysctlAbsent, SysctlRefused."""
    path = path_of(name)
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SysctlAbsent(name, str(path)) from error
    except OSError as error:  # write-only ones, and drivers that fail to read
        raise SysctlRefused(name, "(read)", error.errno or errno.EIO) from error


def set(name: str, value: str | int) -> bool:
    """Make the sysctl have this value; False if it had it already, so that a read-only one that is right is no error.

    Raises SysctlAbsent, SysctlReadOnly, SysctlRefused.
    """
    path = path_of(name)
    text = str(value)
    try:
        if path.read_text(encoding="utf-8", errors="replace").split() == text.split():
            return False
    except PermissionError:
        pass  # write-only
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise SysctlAbsent(name, str(path)) from error
    except OSError as error:
        raise SysctlRefused(name, text, error.errno or errno.EIO) from error
    try:
        path.write_text(text, encoding="utf-8")
    except FileNotFoundError as error:  # its interface went away just now
        raise SysctlAbsent(name, str(path)) from error
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise SysctlReadOnly(name, text) from error
        raise SysctlRefused(name, text, error.errno or errno.EIO) from error
    return True
