"""Which files go to the VM."""

import subprocess
from pathlib import Path

import pytest

from hack.vm import tree
from hack.vm.places import VmError


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("*.log\n")
    for name in ("new.py", "noise.log", "sub/deep.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("new.py")
    return tmp_path


def test_all_but_what_git_ignores(clone: Path) -> None:
    assert sorted(tree.listing(clone)) == [".gitignore", "link", "new.py", "sub/deep.txt"]


def test_a_file_that_is_gone_though_git_knows_it(clone: Path) -> None:
    subprocess.run(["git", "-C", clone, "add", "new.py"], check=True)
    (clone / "new.py").unlink()
    assert "new.py" not in tree.listing(clone)


def test_no_git_repository_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(VmError, match="git cannot list the files"):
        tree.listing(tmp_path)
