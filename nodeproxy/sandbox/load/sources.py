"""Owns making the sockets of a load: non-blocking, from the source addresses in turn, each target from ports of its own.

No client port is used for two targets. On the way back, IPVS finds a connection by backend and client alone: where one
client port has connections to two of its addresses that lead to the same backend, the older of them gets no more answers
until the younger has left the table, two minutes after its end. (Conntrack in iptables mode tells them apart.) No agent can
help that, and a kernel that picks the ports would make it happen every few thousand connections.
"""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Iterator, Sequence
from typing import Final

from nodeproxy.sandbox.load.plan import Target
from nodeproxy.sandbox.sockets import family_of

_FIRST_PORT, _END_PORT = 33_000, 65_000  # above node ports
_TRIES: Final = 50


class Sources:
    """The source addresses of a place, by family, and the ports of each of the targets of one protocol.

    Without an address of the family, the kernel chooses one.
    """

    def __init__(self, addresses: Sequence[str], targets: Sequence[Target]) -> None:
        self._turns: dict[socket.AddressFamily, Iterator[str]] = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            of_family = [address for address in addresses if family_of(address) == family]
            self._turns[family] = itertools.cycle(of_family or ["::" if family == socket.AF_INET6 else "0.0.0.0"])
        titles = list(dict.fromkeys(target.title for target in targets))
        each = (_END_PORT - _FIRST_PORT) // max(len(titles), 1)
        self._ports = {
            title: itertools.cycle(range(_FIRST_PORT + place * each, _FIRST_PORT + (place + 1) * each))
            for place, title in enumerate(titles)
        }

    def socket(self, target: Target, kind: socket.SocketKind) -> tuple[socket.socket, str]:
        """A socket for a target, bound to the next source address, which is returned too, and to the target's next port."""
        family = family_of(target.address)
        source = next(self._turns[family])
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of connections that have ended (TIME_WAIT)
        for port in itertools.islice(self._ports[target.title], _TRIES):
            try:
                sock.bind((source, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    sock.close()
                    raise
            else:
                return sock, source
        sock.close()
        raise OSError(errno.EADDRINUSE, f"no free port for {target.title} at {source}")
