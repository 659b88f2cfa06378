"""Owns a source in a process of its own, so that its memory can be measured: `python -m tests.source.agent_probe ARGS`.

Arguments are a kubeconfig (or a URL without credentials) and a node name. Each line on standard input is answered with one
line of JSON: what has been delivered so far, and the resident memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from nodeproxy.api.objects import ApiObject
from nodeproxy.source.apiserver import ApiServerSource, Credentials
from tests.source.replay import Replay


def digest(objects: Iterable[ApiObject]) -> str:
    """The same for the same objects."""
    texts = sorted(f"{obj.key} ".encode() + msgspec.json.encode(obj) for obj in objects)
    return hashlib.sha256(b"\n".join(texts)).hexdigest()


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def main(target: str, node_name: str) -> None:
    """Run until standard input ends."""
    credentials = Credentials(master=target) if target.startswith("http") else Credentials(Path(target))
    replay = Replay()
    running = asyncio.create_task(ApiServerSource(credentials, node_name).run(replay))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        answer = {
            "complete": sum(replay.complete.values()),
            "upserts": replay.upserts.total(),
            "redundant": len(replay.redundant),
            "rss": resident_bytes(),
            "digest": digest(replay.objects.values()),
        }
        print(json.dumps(answer), flush=True)
    running.cancel()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
