"""Owns asking the agent that runs in this network namespace, over its local socket (`agent.local_socket`)."""

from __future__ import annotations

import http.client
import os
import socket
import struct
from typing import Final, TypeVar

import msgspec

from nodeproxy.agent.local_socket import CREDENTIALS, NAME, SHOWN_NAME
from nodeproxy.agent.status import AgentStatus, InForce, decode_hook

_TIMEOUT_SECONDS: Final = 10.0
_LONGEST_ANSWER: Final = 16 << 20
_Answered = TypeVar("_Answered")


class AgentNotRunning(Exception):
    """No agent answers in this network namespace; the message is one line that says why not."""


def ask(path: str, *, timeout: float = _TIMEOUT_SECONDS) -> bytes:
    """The body of the agent's answer to a GET of `path`. Blocking. Raises `AgentNotRunning`.

    Any user of the node may bind the socket's name: only an answer of root, or of our own user, counts.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(NAME)
            _, uid, _ = struct.unpack(CREDENTIALS, connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (0, os.getuid()):
                raise AgentNotRunning(f"{SHOWN_NAME} is held by user {uid}, who is not trusted")
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode("ascii"))
            response = http.client.HTTPResponse(connection)
            response.begin()
            body = response.read(_LONGEST_ANSWER)
        except ConnectionRefusedError:
            raise AgentNotRunning(
                f"no nodeproxy agent runs in this network namespace (nobody listens on {SHOWN_NAME})"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = "takes connections of root and of its own user only" if _cut(error) else str(error) or repr(error)
            raise AgentNotRunning(f"the agent at {SHOWN_NAME} does not answer: {reason}") from None
    if response.status != http.client.OK:
        raise AgentNotRunning(f"the agent at {SHOWN_NAME} answers {response.status} to {path}")
    return body


def ask_status() -> AgentStatus:
    """The agent's status. Raises `AgentNotRunning`."""
    return decode_status(ask("/status"))


def decode_status(body: bytes) -> AgentStatus:
    """The answer to `/status`. Raises `AgentNotRunning` where it is not of this version."""
    return _decoded(body, AgentStatus)


def ask_in_force() -> InForce:
    """How the agent is configured. Raises `AgentNotRunning`."""
    return _decoded(ask("/config"), InForce)


def _decoded(body: bytes, kind: type[_Answered]) -> _Answered:
    try:
        return msgspec.json.decode(body, type=kind, dec_hook=decode_hook)
    except msgspec.MsgspecError as error:
        raise AgentNotRunning(f"the agent at {SHOWN_NAME} is of another version: {error}") from None


def _cut(error: Exception) -> bool:
    return isinstance(error, ConnectionResetError | BrokenPipeError | http.client.RemoteDisconnected)
