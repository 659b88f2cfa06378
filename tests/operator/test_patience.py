"""`nodeproxy rollout` goes on where the API server does not answer for a while, and says what it does not know."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from nodeproxy.cli import rollout as command
from nodeproxy.cli.patience import patiently
from nodeproxy.cli.rollout_view import follow
from nodeproxy.operator.api import ProxyRollout
from nodeproxy.operator.client import RolloutClient
from nodeproxy.sandbox.pace import scaled

NODEPROXY = Path(sys.executable).with_name("nodeproxy")


def rollout(phase: str) -> dict[str, Any]:
    status = {"phase": phase, "message": "as it is"}
    spec = {"target": {"mode": "ipvs"}, "nodes": {"names": ["n1"]}}
    return {"metadata": {"name": "spring"}, "spec": spec, "status": status}


Answer = dict[str, Any] | int | None
"""A roll-out, a status, or None: the connection is closed."""


@contextmanager
def serving(answers: list[Answer]) -> Iterator[str]:
    """A server that answers so, one after another, the last one again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer is None:
                self.close_connection = True
                return
            body = json.dumps(answer if isinstance(answer, dict) else {"kind": "Status", "message": "not now"}).encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Path:
    """One that says nothing: the address is given."""
    path = tmp_path / "kubeconfig"
    path.write_text(
        "{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: 'http://unused'}}],"
        " users: [{name: c, user: {}}], contexts: [{name: c, context: {cluster: c, user: c}}]}"
    )
    return path


def test_reads_that_fail_are_made_again_and_it_is_said_once(kubeconfig: Path) -> None:
    going, done = rollout("Progressing"), rollout("Completed")
    with serving([going, going, None, 503, going, 403, done]) as url:
        whole = [NODEPROXY, "rollout", f"--kubeconfig={kubeconfig}", f"--master={url}", "status", "spring", "--watch"]
        found = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=scaled(60))
    assert found.returncode == 0, found.stderr
    first, second = found.stderr.splitlines()
    assert first.startswith("nodeproxy: the API server does not answer: ") and first.endswith("; trying again")
    assert second == "nodeproxy: 403: not now; trying again"
    assert [line.partition(" ")[2] for line in found.stdout.splitlines()] == [
        "spring: Progressing: as it is",
        "spring: Completed: as it is",
    ]


def test_where_nobody_answers_it_is_not_known_how_it_ends(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_GIVE_UP_SECONDS", 0.5)
    with serving([rollout("Progressing"), rollout("Progressing"), 500]) as url:
        arguments = [f"--kubeconfig={kubeconfig}", f"--master={url}", "status", "spring", "--watch"]
        result = CliRunner().invoke(command.rollout, arguments)
    assert result.exit_code == 3
    assert "no answer for 0.5 s: 500: not now; it goes on: nodeproxy rollout status spring --watch" in result.stderr


def test_what_cannot_be_read_at_all_or_is_gone_is_not_waited_for(kubeconfig: Path) -> None:
    for answers in ([503], [403], [rollout("Progressing"), rollout("Progressing"), 404]):
        with serving([*answers]) as url:
            arguments = [f"--kubeconfig={kubeconfig}", f"--master={url}", "status", "spring", "--watch"]
            assert CliRunner().invoke(command.rollout, arguments).exit_code == 1


def test_a_token_that_ran_out_is_read_again(tmp_path: Path, kubeconfig: Path) -> None:
    with serving([rollout("Progressing"), 401, rollout("Completed")]) as url:
        client = RolloutClient(kubeconfig, url)
        read = patiently(lambda: client.get("spring"), lambda _: None, seconds=60)
        console = Console(file=io.StringIO(), width=160, force_terminal=True)

        def ended(one: ProxyRollout) -> bool:
            return one.finished

        assert follow(console, read, ended, poll=0).status.phase == "Completed"
