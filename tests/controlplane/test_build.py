"""Where the programs of Kubernetes come from, and what is said where they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from hack.controlplane import build

ENVTEST = ("etcd", "kube-apiserver", "kubectl")


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory that KUBEBUILDER_ASSETS names, on a machine without Go and where nothing was built yet."""
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setenv("NODEPROXY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KUBE_PROXY", raising=False)
    (tmp_path / "assets").mkdir()
    return tmp_path / "assets"


def test_what_envtest_has_is_not_all_that_tests_need(assets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ENVTEST:
        (assets / name).touch()
    with pytest.raises(build.BuildError, match="There is no `go` on PATH") as failure:
        build.binaries()
    assert f"KUBEBUILDER_ASSETS={assets} has no kube-controller-manager and no kube-proxy" in capfd.readouterr().err
    assert all(name in str(failure.value) for name in build.COMPONENTS)
    assert build.kube_proxy() is None


def test_where_all_are_nothing_is_built(assets: Path) -> None:
    for name in build.COMPONENTS:
        (assets / name).touch()
    assert build.binaries() == assets
    assert build.binary("kubectl") == assets / "kubectl"
    assert build.kube_proxy() == assets / "kube-proxy"
