"""The protocol between host and VM: frames of one type byte, a length and a payload, over one TCP connection per request.

A connection begins with a JSON frame that names the operation and carries the secret of this VM. Both ends use this module.
"""

import contextlib
import json
import socket
import struct
import threading
from typing import Any, Final

PORT: Final = 7001
"""Where the agent listens in the VM."""

JSON: Final = b"j"
STDIN: Final = b"i"
STDOUT: Final = b"o"
STDERR: Final = b"e"
SIGNAL: Final = b"s"
KILL: Final = b"k"
SIZE: Final = b"w"
DATA: Final = b"d"
END: Final = b"q"
EXIT: Final = b"x"
HEARTBEAT: Final = b"h"

_HEAD: Final = struct.Struct(">cI")
_LARGEST: Final = 1 << 30


class Closed(ConnectionError):
    """The other end closed the connection, or broke the protocol."""


class Stream:
    """Frames over a connected socket; several threads may send, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._lock = threading.Lock()
        self._file = sock.makefile("rb", buffering=1 << 16)

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Send one frame."""
        with self._lock:
            self.socket.sendall(_HEAD.pack(kind, len(payload)) + payload)

    def send_json(self, value: object) -> None:
        """Send one JSON frame."""
        self.send(JSON, json.dumps(value).encode())

    def receive(self) -> tuple[bytes, bytes]:
        """The next frame."""
        kind, length = _HEAD.unpack(self._exactly(_HEAD.size))
        if length > _LARGEST:
            raise Closed(f"a frame of {length} bytes")
        return kind, self._exactly(length)

    def receive_json(self) -> Any:
        """The next frame that is no heartbeat, which must be JSON."""
        while True:
            kind, payload = self.receive()
            if kind == JSON:
                return json.loads(payload)
            if kind != HEARTBEAT:
                raise Closed(f"a frame {kind!r} where JSON was due")

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self.socket.close()

    def _exactly(self, length: int) -> bytes:
        data: bytes = self._file.read(length)
        if len(data) < length:
            raise Closed("the connection was closed")
        return data
