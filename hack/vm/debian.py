"""Packages of this machine's Debian release: fetched and unpacked into a folder, never installed."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from hack.vm.places import VmError


def resolve(meta_package: str, pattern: str) -> str:
    """What a meta package stands for now: the first dependency whose name matches."""
    found = _dependency(meta_package, pattern)
    if found is None:
        apt("update")
        found = _dependency(meta_package, pattern)
    if found is None:
        raise VmError(
            f"apt knows no {meta_package}: is there a Debian release in /etc/apt/sources.list? (apt-get update was run)"
        )
    return found


def unpack(package: str, target: Path) -> str:
    """Fetch a package and unpack it below `target`; its version."""
    folder = target.with_name(f"{target.name}.deb")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        try:
            apt("download", package, directory=folder)
        except VmError:
            apt("update")
            apt("download", package, directory=folder)
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
        done = subprocess.run(["dpkg-deb", "-f", archive, "Version"], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def need(packages: Mapping[str, str], report: Callable[[str], None]) -> None:
    """Make sure of programs: install the packages (by program) of those that are missing, as hack/setup.sh does."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted({package for program, package in packages.items() if shutil.which(program, path=path) is None})
    if not missing:
        return
    how = f"apt-get install --no-install-recommends {' '.join(missing)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise VmError(f"missing on this machine: {how}")
    report(f"installing {' '.join(missing)}")
    try:
        try:
            apt("install", "-y", "--no-install-recommends", *missing)
        except VmError:
            apt("update")
            apt("install", "-y", "--no-install-recommends", *missing)
    except VmError as error:
        raise VmError(f"missing on this machine: {how}\n{error}") from error


def apt(*arguments: str, directory: Path | None = None) -> None:
    """Run apt-get; its last words where it fails."""
    if shutil.which("apt-get") is None:
        raise VmError("no apt-get here: the VM's kernel is made of Debian packages, so a Debian machine is needed")
    done = subprocess.run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=root", *arguments],
        cwd=directory,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
        raise VmError(f"apt-get {' '.join(arguments)} failed:\n{last}")


def _dependency(package: str, pattern: str) -> str | None:
    text = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=False).stdout
    found = re.search(rf"Depends: ({pattern})$", text, flags=re.MULTILINE)
    return found.group(1) if found else None
