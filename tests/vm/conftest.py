"""Fixtures of the VM harness's tests: a cache of its own for each test."""

from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vm: starts a VM (hack/vm), whose kernel is built if the cache has none")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing of HACK_VM_* from outside."""
    for name in ("HACK_VM", "HACK_VM_ACCEL", "HACK_VM_KERNEL", "HACK_VM_MEMORY", "HACK_VM_CPUS", "HACK_VM_BOOT_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HACK_VM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
