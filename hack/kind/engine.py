"""Owns the Docker engine: takes the one that answers, else installs Debian's and starts it.

Where this machine lacks a capability that `docker run --privileged` asks for, containers are run by oci_runtime.py.
`NODEPROXY_DOCKER_DATA_ROOT` sets the data-root of an engine that is started here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.kind import oci_runtime
from hack.kind.command import environment, run, succeeds
from hack.kind.places import HERE, KindError, cache, locked, state
from hack.kind.progress import say, step
from hack.vm.debian import need
from hack.vm.places import VmError
from nodeproxy.sandbox.pace import scaled

_RUNTIME: Final = "nodeproxy"
_START_LIMIT: Final = 60.0
_STOP_LIMIT: Final = 30.0
_FOREIGN_START: Final = 10.0  # what installing the package may have started by itself


@dataclass(frozen=True)
class Engine:
    """An engine that answers; `started` tells whether this call started it."""

    version: str
    data_root: Path
    cgroup_version: str
    started: bool = False

    def __str__(self) -> str:
        how = "started" if self.started else "answers"
        return f"Docker {self.version} {how} (cgroup v{self.cgroup_version}, data in {self.data_root})"


def answering() -> Engine | None:
    """The engine that answers at DOCKER_HOST or the usual socket."""
    if shutil.which("docker", path=environment()["PATH"]) is None:
        return None
    try:
        info = json.loads(run(["docker", "info", "--format", "{{json .}}"], timeout=scaled(20)))
    except (KindError, ValueError):
        return None
    if not info.get("ServerVersion"):
        return None
    return Engine(info["ServerVersion"], Path(info["DockerRootDir"]), info.get("CgroupVersion") or "1")


def ensure() -> Engine:
    """An engine that answers; started, and before that installed, where there is none."""
    if engine := answering():
        return engine
    if host := os.environ.get("DOCKER_HOST"):
        raise KindError(f"no Docker engine answers at DOCKER_HOST={host}: start it, or unset DOCKER_HOST")
    if os.geteuid() != 0:
        raise KindError("no Docker engine answers: start one (systemctl start docker), or run this as root")
    with locked(state() / "engine.lock"):
        if engine := answering():
            return engine
        if _install() and (engine := _await(_FOREIGN_START)):
            return engine  # the package's service started it
        return _start()


def stop() -> bool:
    """Stop the engine that we started, unless containers run in it; whether it was stopped."""
    pidfile = state() / "dockerd.pid"
    with contextlib.suppress(OSError, ValueError):
        pid = int(pidfile.read_text())
        if b"dockerd" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False
        if running := run(["docker", "ps", "--format", "{{.Names}}"], timeout=scaled(20)).split():
            say(f"the engine is left running, because containers run in it: {' '.join(running)}")
            return False
        with step("stopping the engine"):
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + scaled(_STOP_LIMIT)
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
        return True
    return False


def _install() -> bool:
    programs = {"dockerd": "docker.io", "docker": "docker.io"}
    path = environment()["PATH"]
    if all(shutil.which(program, path=path) for program in programs):
        return False
    try:
        with step("installing Docker from Debian"):
            need(programs, say)
    except VmError as error:
        raise KindError(f"no Docker engine answers, and none can be installed: {error}") from error
    return shutil.which("systemctl") is not None and Path("/run/systemd/system").exists()


def _start() -> Engine:
    log = state() / "dockerd.log"
    command = [*_namespaces(), "dockerd", "--pidfile", str(state() / "dockerd.pid"), *_runtime_options()]
    if root := os.environ.get("NODEPROXY_DOCKER_DATA_ROOT"):
        command += ["--data-root", root]
    with step("starting Docker's engine"), log.open("ab") as output:
        # In a session of its own: Ctrl-C is for us, and it outlives us.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment(),
            cwd="/",
        )
        engine = _await(_START_LIMIT, process)
    if engine is None:
        process.terminate()
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise KindError(f"dockerd does not start (its log is {log}):\n{last}")
    return Engine(engine.version, engine.data_root, engine.cgroup_version, started=True)


def _await(seconds: float, process: subprocess.Popen[bytes] | None = None) -> Engine | None:
    deadline = time.monotonic() + scaled(seconds)
    while time.monotonic() < deadline:
        if engine := answering():
            return engine
        if process is not None and process.poll() is not None:
            return None
        time.sleep(0.1)
    return None


def _namespaces() -> list[str]:
    """Into the machine's own namespaces: from within `ip netns exec`, dockerd would see neither links nor cgroups."""
    enter = ["nsenter", "--target", "1", "--net", "--mount"]
    with contextlib.suppress(OSError):
        here, main = (Path(f"/proc/{process}/ns/net").readlink() for process in ("self", "1"))
        if here != main and succeeds([*enter, "true"]):
            return enter
    return []


def _runtime_options() -> list[str]:
    """dockerd's options for our runtime, where a capability is missing."""
    if not oci_runtime.lacking(Path("/proc/self/status").read_text()):
        return []
    runtime = cache() / "oci-runtime"  # outlives the clone
    runtime.parent.mkdir(parents=True, exist_ok=True)
    fresh = runtime.with_name(f"oci-runtime.{os.getpid()}")
    shutil.copyfile(HERE / "oci_runtime.py", fresh)
    fresh.chmod(0o755)
    fresh.replace(runtime)
    return ["--add-runtime", f"{_RUNTIME}={runtime}", "--default-runtime", _RUNTIME]
