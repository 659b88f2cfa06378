"""Notification of nft transactions, against the real kernel."""

import asyncio
import os
import socket
import subprocess

import pytest

from nodeproxy.kernel.nft_monitor import NftChangeMonitor, NftTransaction
from nodeproxy.kernel.xtables import Variant, XTables
from nodeproxy.kernel.xtables_stamp import NftStamp
from tests.kernel.conftest import NetworkNamespace

pytestmark = pytest.mark.kernel


def test_every_transaction_is_told_with_its_process(netns: NetworkNamespace) -> None:
    async def work() -> tuple[list[NftTransaction], int, object]:
        with NftChangeMonitor() as monitor:
            transactions = monitor.transactions()
            tables = XTables(Variant.NFT, 4)
            await tables.restore("*nat\n:AAA - [0:0]\n-A AAA -j RETURN\nCOMMIT\n*filter\n:BBB - [0:0]\nCOMMIT\n")
            first = await asyncio.wait_for(anext(transactions), 5)
            second = await asyncio.wait_for(anext(transactions), 5)
            waiting = asyncio.ensure_future(anext(transactions))
            process = await asyncio.create_subprocess_exec("nft", "add", "table", "inet", "mine")
            await process.wait()
            third = await asyncio.wait_for(waiting, 5)
            return [first, second, third], process.pid, await tables.stamp()

    found, pid, stamp = netns.run_async(work)
    assert [one.process for one in found] == ["iptables-nft-re", "iptables-nft-re", "nft"]
    assert found[2].pid == pid
    assert found[1].generation > found[0].generation
    assert stamp == NftStamp(found[2].generation)
    assert not any(one.lost for one in found)


def test_large_transactions_do_not_overrun_the_buffer(netns: NetworkNamespace) -> None:
    rules = "".join(f"-A BIG -d 10.{i >> 8}.{i & 255}.1 -j RETURN\n" for i in range(20_000))

    async def work() -> list[NftTransaction]:
        with NftChangeMonitor() as monitor:
            await XTables(Variant.NFT, 4).restore(f"*nat\n:BIG - [0:0]\n{rules}COMMIT\n")
            return monitor.pending()

    assert [one.lost for one in netns.run_async(work)] == [False]


def test_lost_notifications_are_told(netns: NetworkNamespace) -> None:
    def work() -> list[NftTransaction]:
        with NftChangeMonitor() as monitor:
            text = "".join(f"add table ip t{i}\ndelete table ip t{i}\n" for i in range(2))
            # one transaction is one process: rather than thousands of them, a buffer that holds few
            with socket.socket(fileno=os.dup(monitor.fileno())) as same:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            for _ in range(12):
                subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
            return monitor.pending()

    found = netns.run(work)
    assert any(one.lost for one in found)
    assert len(found) < 13


def test_other_namespaces_are_not_told(netns: NetworkNamespace) -> None:
    monitor = netns.run(NftChangeMonitor)
    name = f"{netns.name}-other"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "netns", "exec", name, "nft", "add", "table", "ip", "elsewhere"], check=True)
        assert monitor.pending() == []
        netns.command("nft", "add", "table", "ip", "here")
        assert len(monitor.pending()) == 1
    finally:
        monitor.close()
        subprocess.run(["ip", "netns", "del", name], check=True)
