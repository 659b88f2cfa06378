"""Owns a bare HTTP client for tests: it sends bytes as they are, and reads until the server closes."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What a server said. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


async def send(request: bytes, port: int, host: str = "127.0.0.1") -> Reply:
    """Send a request, whatever it is, and read the reply. Raises OSError; IncompleteReadError where there is none."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            body = await reader.read()
    finally:
        writer.close()
    status, *lines = head.strip().splitlines()
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Reply(int(status.split()[1]), headers, body)


async def get(port: int, path: str = "/", host: str = "127.0.0.1", method: str = "GET") -> Reply:
    """Ask for a path."""
    return await send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(), port, host)


def free_port() -> int:
    """A TCP port that nobody listens on, in either family."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as made:
        return int(made.getsockname()[1])
