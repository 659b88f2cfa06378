"""Owns IPVS virtual servers: adding, changing, listing and deleting them, thousands at a time, over one netlink socket.

Messages are packed, many go in one send, and each refusal is told for its operation while all others are carried out. All
calls block for as long as the kernel works (some microseconds per operation): call them in a thread where that matters.
Calls from several threads take turns.

Sources: include/uapi/linux/ip_vs.h, genetlink.h; net/netfilter/ipvs/ip_vs_ctl.c.
"""

import errno
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Self

from nodeproxy.kernel import ipvs_messages as messages
from nodeproxy.kernel.errors import FeatureMissing, ItemRefused, PermissionMissing, RequestRefused, describe_errno
from nodeproxy.kernel.ipvs_types import (
    AddRealServer,
    AddVirtualServer,
    DeleteRealServer,
    DeleteVirtualServer,
    EditRealServer,
    EditVirtualServer,
    FirewallMark,
    Flag,
    Operation,
    RealServer,
    RealServerState,
    Statistics,
    Timeouts,
    VirtualServer,
    VirtualServerSettings,
)
from nodeproxy.kernel.netlink import Message, NetlinkSocket, attribute, attributes

__all__ = [
    "IPVS",
    "AddRealServer",
    "AddVirtualServer",
    "DeleteRealServer",
    "DeleteVirtualServer",
    "EditRealServer",
    "EditVirtualServer",
    "FirewallMark",
    "Flag",
    "Operation",
    "RealServer",
    "RealServerState",
    "Statistics",
    "Timeouts",
    "VirtualServer",
    "VirtualServerSettings",
]

_NETLINK_GENERIC: Final = 16
_GENL_ID_CTRL: Final = 0x10
_CTRL_CMD_GETFAMILY: Final = 3
_CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 1, 2
_IP_VS_SO_GET_INFO: Final = 64 + 1024 + 64 + 1
_GET_INFO: Final = struct.Struct("=III")  # ip_vs_getinfo: version, connection table size, number of virtual servers
_PROBE_MARKS: Final = range(0xFFFFFFFF, 0xFFFFFFFF - 16, -1)

_OPERATION_NAMES: Final[dict[type, str]] = {
    AddVirtualServer: "add virtual server",
    EditVirtualServer: "edit virtual server",
    DeleteVirtualServer: "delete virtual server",
    AddRealServer: "add real server",
    EditRealServer: "edit real server",
    DeleteRealServer: "delete real server",
}
_WORDS: Final = {
    (AddVirtualServer, errno.EEXIST): "the virtual server is there already",
    (AddVirtualServer, errno.ENOENT): "the kernel does not have its scheduler",
    (EditVirtualServer, errno.ENOENT): "the kernel does not have its scheduler",
    (AddRealServer, errno.EEXIST): "the real server is there already",
    (AddRealServer, errno.EINVAL): "not the address of one host",
    (EditRealServer, errno.ENOENT): "there is no such real server",
    (DeleteRealServer, errno.ENOENT): "there is no such real server",
}


class IPVS:
    """The virtual servers of the network namespace of the thread that makes this object.

    Making it does not need IPVS in the kernel; the first call (or `require`) loads the module, and raises FeatureMissing
    where there is none. Any call raises PermissionMissing without CAP_NET_ADMIN, AnswerLost if the kernel did not answer.
    """

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(_NETLINK_GENERIC)
        self._options = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._kind: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._netlink.close()
        self._options.close()

    def require(self) -> None:
        """Raises FeatureMissing where the kernel has no IPVS; loads the module ip_vs where it can."""
        self._family()

    def has_scheduler(self, name: str) -> bool:
        """Whether the kernel has a scheduler (its module is loaded where there is one).

        Asked by adding a virtual server for a mark that no packet has, and deleting it. Raises ItemRefused for another
        failure, such as a name that cannot be one.
        """
        for mark in _PROBE_MARKS:
            server = FirewallMark(4, mark)
            refused = self.change([AddVirtualServer(server, VirtualServerSettings(name))]).get(0)
            if refused is None:
                self.change([DeleteVirtualServer(server)])
                return True
            if refused.errno == errno.ENOENT:
                return False
            if refused.errno != errno.EEXIST:
                raise refused
        raise RequestRefused(f"look for scheduler {name}", errno.EEXIST, "no firewall mark is free to try it with")

    def change(self, operations: Sequence[Operation]) -> dict[int, ItemRefused]:
        """Carry out operations in this order, whatever happens to the others; returns the refused ones by index.

        Nothing is hidden: adding what is there is refused (EEXIST), and so is changing or deleting what is not there (ESRCH
        for a virtual server, ENOENT for a real one).
        """
        kind = self._family()
        encode = messages.Encoder().body
        batch: list[Message] = []
        places: list[int] = []
        refused: dict[int, ItemRefused] = {}
        for place, operation in enumerate(operations):
            try:
                batch.append((kind, 0, encode(operation)))
            except ValueError as error:
                refused[place] = _refusal(operation, errno.EINVAL, str(error))
                continue
            places.append(place)
        for index, (number, text) in self._netlink.batch(batch, "change IPVS").items():
            refused[places[index]] = _refusal(operations[places[index]], number, text)
        return refused

    def virtual_servers(self) -> dict[VirtualServer, VirtualServerSettings]:
        """All virtual servers but those by firewall mark. What comes or goes during the call may make others be missed."""
        decode = messages.Decoder().virtual_server
        listed = (decode(*message) for message in self._dump(messages.CMD_GET_SERVICE, "list virtual servers"))
        return dict(found for found in listed if found is not None)

    def statistics(self) -> dict[VirtualServer, Statistics]:
        """The counters of all virtual servers that `virtual_servers` lists. The kernel sums them up every two seconds."""
        decode = messages.Decoder().virtual_server
        counters = {}
        for message in self._dump(messages.CMD_GET_SERVICE, "list virtual servers"):
            found = decode(*message)
            if found is not None:
                counters[found[0]] = messages.decode_statistics(*message)
        return counters

    def real_servers(self, server: VirtualServer | FirewallMark) -> list[RealServerState]:
        """The real servers of a virtual server, in no order; none where there is no such virtual server."""
        kind = self._family()
        body = messages.real_servers_request(server)
        decode = messages.Decoder.real_server
        return [decode(*message) for message in self._netlink.dump_in_place(kind, body, request="list real servers")]

    def all_real_servers(self, servers: Iterable[VirtualServer]) -> dict[VirtualServer, list[RealServerState]]:
        """`real_servers` of each. The kernel has no listing of all: each virtual server costs a request."""
        return {server: self.real_servers(server) for server in servers}

    def count_ipv4(self) -> int:
        """How many IPv4 virtual servers (those by mark, too) there are, in constant time. IPv6 ones are not counted by the
        kernel in a way that it tells."""
        self._family()
        try:
            answer = self._options.getsockopt(socket.IPPROTO_IP, _IP_VS_SO_GET_INFO, _GET_INFO.size)
        except PermissionError as error:
            raise PermissionMissing("count virtual servers", "CAP_NET_ADMIN is needed") from error
        except OSError as error:
            raise RequestRefused("count virtual servers", error.errno or errno.EIO) from error
        count: int = _GET_INFO.unpack(answer)[2]
        return count

    def timeouts(self) -> Timeouts:
        """How long idle connections are remembered. A protocol that the kernel's IPVS does not have: 0."""
        body = messages.request(messages.CMD_GET_CONFIG)
        [answer] = self._netlink.dump(self._family(), body, 0, "read IPVS timeouts")
        return messages.decode_timeouts(answer)

    def set_timeouts(self, *, tcp: int = 0, tcp_fin: int = 0, udp: int = 0) -> None:
        """In whole seconds; 0 leaves one as it is. Raises RequestRefused (EINVAL) if one is out of the kernel's range."""
        self._command(messages.timeouts_request(tcp, tcp_fin, udp), "set IPVS timeouts")

    def flush(self) -> None:
        """Delete all virtual servers of this network namespace, whoever made them."""
        self._command(messages.request(messages.CMD_FLUSH), "flush IPVS")

    def _command(self, body: bytes, request: str) -> None:
        for number, text in self._netlink.batch([(self._family(), 0, body)], request).values():
            raise RequestRefused(request, number, text)

    def _dump(self, command: int, request: str) -> Iterator[tuple[bytes, int, int]]:
        return self._netlink.dump_in_place(self._family(), messages.request(command), request=request)

    def _family(self) -> int:
        """The nlmsg_type of IPVS messages, which the kernel gives out as modules come. Asking makes it load the module."""
        if self._kind is None:
            name = attribute(_CTRL_ATTR_FAMILY_NAME, messages.FAMILY_NAME.encode() + b"\0")
            body = messages.request(_CTRL_CMD_GETFAMILY) + name
            try:
                [answer] = self._netlink.dump(_GENL_ID_CTRL, body, 0, "find IPVS")
            except RequestRefused as error:
                hint = f"the module ip_vs is not there or cannot be loaded ({describe_errno(error.errno)})"
                raise FeatureMissing("IPVS", hint) from error
            for kind, start, end in attributes(answer, messages.GENL_HEADER_SIZE, len(answer)):
                if kind == _CTRL_ATTR_FAMILY_ID:
                    self._kind = struct.unpack("=H", answer[start:end])[0]
        if self._kind is None:
            raise FeatureMissing("IPVS", "the kernel does not tell its netlink family")
        return self._kind


def _refusal(operation: Operation, number: int, text: str) -> ItemRefused:
    kind = type(operation)
    name = _OPERATION_NAMES[kind]
    item: object = operation.server
    if isinstance(operation, AddRealServer | EditRealServer | DeleteRealServer):
        name = f"{name} of {operation.server}"
        item = operation.real
    words = "there is no such virtual server" if number == errno.ESRCH else _WORDS.get((kind, number), "")
    return ItemRefused(name, item, number, text or words)
