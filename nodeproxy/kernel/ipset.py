"""Owns ipsets: creating, filling, listing and removing them, thousands at a time, over one netlink socket.

Nothing is run and no generic encoder is used: messages are packed, many go in one send, and each refusal is told for its
item while all others are carried out. All calls block for as long as the kernel works (some microseconds per item): call
them in a thread where that matters. Calls from several threads take turns.
"""

import errno
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, Self

from nodeproxy.kernel import ipset_messages as messages
from nodeproxy.kernel.errors import FeatureMissing, ItemRefused, RequestRefused, describe_errno
from nodeproxy.kernel.ipset_messages import Entry, SetContents, SetSize, SetSpec
from nodeproxy.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, NLM_F_EXCL, Message, NetlinkSocket, attribute, attributes

__all__ = ["Entry", "IPSets", "SetContents", "SetSpec"]

_OUR_PROTOCOL: Final = 7
_BUSY: Final = 4100  # IPSET_ERR_BUSY
_FIND_TYPE: Final = 4098  # IPSET_ERR_FIND_TYPE
_ATTEMPTS: Final = 3  # of a listing under which sets come and go


class IPSets:
    """The sets of the network namespace of the thread that makes this object.

    Making it does not need ipset in the kernel; the first call then raises FeatureMissing. Any call raises PermissionMissing
    without CAP_NET_ADMIN, and AnswerLost if the kernel did not answer.
    """

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)
        self._protocol_version: int | None = None
        self._revisions: dict[tuple[str, int], int | ItemRefused] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._netlink.close()

    def create(self, sets: Iterable[SetSpec]) -> list[ItemRefused]:
        """Create sets; returns those refused, `item` being the name. A set that exists just so is left as it is.

        "Just so" is the kernel's judgement: it compares type, timeout and max_elements, not the family, nor hash_size. So
        do not use one name for both families.
        """
        protocol = self._protocol()
        batch: list[Message] = []
        names: list[str] = []
        refused: list[ItemRefused] = []
        kind = messages.message_type(messages.CMD_CREATE)
        for spec in sets:
            revision = self._revision(spec.type, spec.family)
            if isinstance(revision, ItemRefused):
                refused.append(ItemRefused("create set", spec.name, revision.errno, revision.message))
                continue
            try:
                batch.append((kind, 0, messages.create_body(protocol, spec, revision)))
            except ValueError as error:
                refused.append(ItemRefused("create set", spec.name, errno.EINVAL, str(error)))
                continue
            names.append(spec.name)
        return refused + self._send(batch, "create set", names)

    def destroy(self, names: Iterable[str]) -> list[ItemRefused]:
        """Destroy sets; returns those refused, EBUSY (16) for one that rules or other sets use. Absent ones are no error."""
        return self._by_name(messages.CMD_DESTROY, "destroy set", names, ignore=errno.ENOENT)

    def flush(self, names: Iterable[str]) -> list[ItemRefused]:
        """Remove all entries of sets; returns those refused, ENOENT for one that does not exist."""
        return self._by_name(messages.CMD_FLUSH, "flush set", names)

    def rename(self, name: str, new_name: str) -> None:
        """Give a set that nothing uses a new name. Raises ItemRefused, ValueError for a name that cannot be one."""
        self._two_names(messages.CMD_RENAME, "rename set", name, new_name)

    def swap(self, name: str, other: str) -> None:
        """Exchange the contents of two sets of the same type, atomically for the rules that use them.

        Raises ItemRefused, ValueError for a name that cannot be one.
        """
        self._two_names(messages.CMD_SWAP, "swap set", name, other)

    def add(self, name: str, entries: Iterable[str | Entry]) -> list[ItemRefused]:
        """Add entries to a set; returns those refused, `item` being the entry. One that is there gets its timeout anew."""
        return self._change(messages.CMD_ADD, f"add to set {name}", name, entries)

    def remove(self, name: str, entries: Iterable[str | Entry]) -> list[ItemRefused]:
        """Remove entries from a set; returns those refused, `item` being the entry. Absent entries are no error."""
        return self._change(messages.CMD_DEL, f"remove from set {name}", name, entries)

    def list_names(self, prefix: str = "") -> list[str]:
        """Names of all sets that begin with `prefix`, sorted. Raises RequestRefused if sets kept coming and going."""
        flags = attribute(messages.ATTR_FLAGS, messages.FLAG_LIST_SETNAME.to_bytes(4, "big"))
        names = set()
        for message in self._dump(messages.CMD_LIST, NLM_F_DUMP, "list sets", flags):
            for kind, start, end in attributes(message, 4, len(message)):
                if kind == messages.ATTR_SETNAME:
                    names.add(messages.decode_name(message[start:end]))
        return sorted(name for name in names if name.startswith(prefix))

    def sizes(self, prefix: str = "") -> list[SetSize]:
        """How full the sets whose names begin with `prefix` are; their entries are not read. Raises RequestRefused."""
        flags = attribute(messages.ATTR_FLAGS, messages.FLAG_LIST_HEADER.to_bytes(4, "big"))
        found = [messages.decode_size(part) for part in self._dump(messages.CMD_LIST, NLM_F_DUMP, "list sets", flags)]
        return [size for size in found if size.name.startswith(prefix)]

    def contents(self, name: str) -> SetContents:
        """A set with its settings and entries, in no order. Raises ItemRefused (ENOENT) if there is none of that name."""
        try:
            parts = self._dump(
                messages.CMD_LIST, NLM_F_DUMP, "list set", messages.name_attribute(messages.ATTR_SETNAME, name)
            )
        except RequestRefused as error:
            raise ItemRefused("list set", name, error.errno, _words(error.errno)) from error
        listings = [messages.decode_listing(part) for part in parts]
        if not listings:
            raise ItemRefused("list set", name, errno.ENOENT)
        return replace(listings[0], entries=tuple(entry for listing in listings for entry in listing.entries))

    def _by_name(self, command: int, operation: str, names: Iterable[str], ignore: int = 0) -> list[ItemRefused]:
        protocol = self._protocol()
        kind = messages.message_type(command)
        batch: list[Message] = []
        items: list[str] = []
        refused: list[ItemRefused] = []
        for name in names:
            try:
                wanted = messages.name_attribute(messages.ATTR_SETNAME, name)
            except ValueError as error:
                refused.append(ItemRefused(operation, name, errno.EINVAL, str(error)))
                continue
            batch.append((kind, 0, messages.request(protocol, wanted)))
            items.append(name)
        return refused + self._send(batch, operation, items, ignore)

    def _change(self, command: int, operation: str, name: str, entries: Iterable[str | Entry]) -> list[ItemRefused]:
        """Add or remove. Without NLM_F_EXCL the kernel takes what is so already as done."""
        kind = messages.message_type(command)
        head = messages.request(self._protocol(), messages.name_attribute(messages.ATTR_SETNAME, name))
        batch: list[Message] = []
        items: list[str] = []
        refused: list[ItemRefused] = []
        for entry in entries:
            text = entry if isinstance(entry, str) else entry.text
            try:
                batch.append((kind, 0, head + messages.entry_data(entry)))
            except ValueError as error:
                refused.append(ItemRefused(operation, text, errno.EINVAL, str(error)))
                continue
            items.append(text)
        return refused + self._send(batch, operation, items)

    def _two_names(self, command: int, operation: str, first: str, second: str) -> None:
        body = messages.request(
            self._protocol(),
            messages.name_attribute(messages.ATTR_SETNAME, first),
            messages.name_attribute(messages.ATTR_TYPENAME, second),
        )
        refused = self._send([(messages.message_type(command), NLM_F_EXCL, body)], operation, [f"{first} {second}"])
        if refused:
            raise refused[0]

    def _send(self, batch: Sequence[Message], operation: str, items: Sequence[str], ignore: int = 0) -> list[ItemRefused]:
        refused = self._netlink.batch(batch, operation)
        return [
            ItemRefused(operation, items[index], errno.EBUSY if number == _BUSY else number, text or _words(number))
            for index, (number, text) in sorted(refused.items())
            if number != ignore
        ]

    def _dump(self, command: int, flags: int, operation: str, *asked: bytes) -> list[bytes]:
        """All messages of an answer. A listing that sets came or went under is asked for again."""
        body = messages.request(self._protocol(), *asked)
        kind = messages.message_type(command)
        for attempt in range(_ATTEMPTS):
            try:
                return [*self._netlink.dump(kind, body, flags, operation)]
            except RequestRefused as error:
                if error.errno != errno.EINTR or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _protocol(self) -> int:
        """The protocol version to speak, agreed with the kernel once: ours, or the kernel's if that is older."""
        if self._protocol_version is None:
            body = messages.request(_OUR_PROTOCOL)
            try:
                answers = [*self._netlink.dump(messages.message_type(messages.CMD_PROTOCOL), body, 0, "ipset protocol")]
            except RequestRefused as error:
                raise FeatureMissing("ipset", f"the module ip_set is not there ({describe_errno(error.errno)})") from error
            values = messages.values_of(answers[0], 4, len(answers[0]))
            newest = values[messages.ATTR_PROTOCOL][0]
            oldest = values.get(messages.ATTR_PROTOCOL_MIN, values[messages.ATTR_PROTOCOL])[0]
            if oldest > _OUR_PROTOCOL:
                raise FeatureMissing(f"ipset protocol {_OUR_PROTOCOL}", f"it speaks {oldest} to {newest}")
            self._protocol_version = min(newest, _OUR_PROTOCOL)
        return self._protocol_version

    def _revision(self, set_type: str, family: int) -> int | ItemRefused:
        """The revision of a type to create: the highest that the kernel and this encoder both know. Asked once."""
        found = self._revisions.get((set_type, family))
        if found is None:
            found = self._revisions[set_type, family] = self._ask_revision(set_type, family)
        return found

    def _ask_revision(self, set_type: str, family: int) -> int | ItemRefused:
        known = messages.KNOWN_REVISIONS.get(set_type)
        if known is None:
            return ItemRefused("create set of type", set_type, errno.EINVAL, f"set type {set_type!r} is not one of ours")
        number = 10 if family == 6 else 2
        asked = (
            messages.name_attribute(messages.ATTR_TYPENAME, set_type),
            attribute(messages.ATTR_FAMILY, bytes((number,))),
        )
        try:
            answer = self._dump(messages.CMD_TYPE, 0, "ipset type", *asked)[0]
        except RequestRefused as error:
            return ItemRefused("create set of type", set_type, error.errno, _words(error.errno))
        values = messages.values_of(answer, 4, len(answer))
        newest, oldest = values[messages.ATTR_REVISION][0], values[messages.ATTR_PROTOCOL_MIN][0]
        if oldest > known:
            text = f"the kernel has revisions {oldest} to {newest} of {set_type}, we know up to {known}"
            return ItemRefused("create set of type", set_type, _FIND_TYPE, text)
        return min(newest, known)


def _words(number: int) -> str:
    return messages.ERROR_TEXTS.get(number, describe_errno(number))
