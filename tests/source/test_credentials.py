"""Credentials: what is read from where, and what is said when that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nodeproxy.source.apiserver import ApiServerSource, Credentials, CredentialsError
from tests.source.fake_apiserver import Json
from tests.source.replay import Replay


def kubeconfig(server: str | None, user: Json, **changes: object) -> str:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": server} if server else {}}],
        "users": [{"name": "x", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }
    return yaml.safe_dump({k: v for k, v in {**config, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "No such file or directory"),
        ("", "file is empty"),
        ("a: [", "not a kubeconfig"),
        ("just text", "not a kubeconfig"),
        (kubeconfig("https://x", {}, **{"current-context": None}), "current-context"),
        (kubeconfig("https://x", {}, contexts=[]), "contexts"),
        (kubeconfig("https://x", {}, clusters=[]), "clusters"),
        (kubeconfig(None, {}), "names no server"),
        (kubeconfig("ftp://x", {}), "'ftp://x' is not an http:// or https:// URL"),
        (kubeconfig("https://x", {"client-certificate": "/nonexistent"}), "nonexistent"),
    ],
)
def test_bad_kubeconfig(tmp_path: Path, text: str | None, part: str) -> None:
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CredentialsError, match=str(path)) as caught:
        Credentials(path).load()
    assert part in str(caught.value)


def test_master_replaces_the_server_of_the_kubeconfig(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(kubeconfig("https://one:6443", {"token": "secret"}))
    loaded = Credentials(path, "https://two:6443/").load()
    for _ in range(2):
        assert loaded.headers() == {"authorization": "Bearer secret"}
        assert loaded.host == "https://two:6443"
    assert Credentials(master="http://[::1]:8080").load().headers() == {}
    for master in ("localhost:8080", "http://", "http://x:99999", "unix:///x"):
        with pytest.raises(CredentialsError, match="is not an http"):
            Credentials(master=master).load()


async def test_outside_of_a_cluster_without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(CredentialsError, match="in-cluster"):
        await ApiServerSource(Credentials(), "here").run(Replay())
