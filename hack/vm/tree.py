"""The working tree on its way into the VM, and results on their way back.

Git says which files belong to it (committed or not, but nothing it ignores). Bytecode goes along, compiled here: a Python
that compiles under software emulation is slow.
"""

import importlib.util
import os
import py_compile
import stat
import subprocess
from pathlib import Path

from hack.vm.guest import wire
from hack.vm.instance import Vm
from hack.vm.places import REPOSITORY, VmError, cache

Facts = tuple[int, int, int]
"""Mode, time of the last change in nanoseconds, size."""


def listing(root: Path = REPOSITORY) -> dict[str, Facts]:
    """The files of a working tree, as they are now."""
    done = subprocess.run(
        ["git", "-c", f"safe.directory={root}", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise VmError(f"git cannot list the files of {root}: {done.stderr.decode(errors='replace').strip()}")
    files: dict[str, Facts] = {}
    for raw in done.stdout.split(b"\0"):
        name = os.fsdecode(raw)
        if name:
            try:
                facts = (root / name).lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode):
                files[name] = (facts.st_mode, facts.st_mtime_ns, facts.st_size)
    return files


def shared(vm: Vm, place: Path) -> bool:
    """Whether the VM has the host's own files there, not copies."""
    facts = vm.facts()
    return facts is not None and facts["kind"] == "uml" and place.resolve().is_relative_to(REPOSITORY)


def sync(vm: Vm) -> tuple[int, int]:
    """Bring the VM's copy of the working tree up to date; how many files were written there, how many removed."""
    if shared(vm, REPOSITORY):
        return 0, 0
    files = listing()
    compiled = {_bytecode_name(name): name for name in files if name.endswith(".py")}
    everything = {**files, **{name: (0o100644, *files[source][1:]) for name, source in compiled.items()}}
    stream = vm.connect("sync", root=str(REPOSITORY))
    try:
        stream.send_json(everything)
        for name in stream.receive_json():
            content = _bytecode(compiled[name], files[compiled[name]]) if name in compiled else _content(name)
            if content is None:
                stream.send(wire.END)
            else:
                stream.send(wire.DATA, content)
        answer = stream.receive_json()
        return answer["written"], answer["removed"]
    finally:
        stream.close()


def pull(vm: Vm, source: str, target: Path) -> int:
    """Copy a file or a directory's files out of the VM; how many."""
    stream = vm.connect("pull", root=source)
    count = 0
    try:
        while (facts := stream.receive_json()) is not None:
            kind, content = stream.receive()
            path = target / facts["name"]
            if kind != wire.DATA or not path.resolve().is_relative_to(target.resolve()):
                raise VmError(f"the VM sent {facts['name']!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(facts["mode"])
            os.utime(path, ns=(facts["modified"], facts["modified"]))
            count += 1
    finally:
        stream.close()
    return count


def _content(name: str) -> bytes | None:
    path = REPOSITORY / name
    try:
        return os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
    except FileNotFoundError:
        return None


def _bytecode_name(name: str) -> str:
    path = Path(importlib.util.cache_from_source(name))
    return str(path)


def _bytecode(name: str, facts: Facts) -> bytes | None:
    """Compiled bytecode of a source file, kept in the cache by what makes it valid; None for what does not compile."""
    folder = cache() / "bytecode" / str(REPOSITORY).strip("/").replace("/", "-")
    target = folder / f"{name}.{facts[1]}.{facts[2]}.pyc"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{Path(name).name}.*.pyc"):
            old.unlink(missing_ok=True)
        try:
            py_compile.compile(str(REPOSITORY / name), cfile=str(target), doraise=True)
        except (py_compile.PyCompileError, OSError):
            return None
    return target.read_bytes()
