"""The command line of `python -m hack.vm`."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hack.vm import boot, client, docker_disk, instance, kind_content, native, tree
from hack.vm.docker_disk import Content
from hack.vm.instance import Vm
from hack.vm.places import REPOSITORY, VmError
from hack.vm.progress import Progress

BROKEN = 125
"""The exit status for what went wrong with the VM, not with the command in it."""


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="python -m hack.vm", description="Run commands of this repository on a kernel with IPVS."
    )
    verbs = top.add_subparsers(dest="verb", required=True)
    verbs.add_parser(
        "prepare", help="make what a VM needs (kernel, disk images), so that starting one takes no longer than booting"
    )
    _with_docker(verbs.add_parser("start", help="start the VM of this clone, and leave it running"))
    verb = verbs.add_parser("kind-env", help="print options for `exec` in a VM with --kind: a shell array VM_ENV")
    verb.add_argument("cluster")
    verbs.add_parser("stop", help="stop it")
    verbs.add_parser("status", help="tell whether it is running")
    verbs.add_parser("console", help="print what its kernel said")
    for name, text in (
        ("exec", "run a command in the running VM"),
        ("run", "run a command on this machine if its kernel has IPVS, else in a VM (started and stopped for it)"),
        ("shell", "a shell in the running VM"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument(
            "--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable (without VALUE: as here)"
        )
        verb.add_argument("--cwd", default=str(REPOSITORY), help="working directory")
        if name != "shell":
            if name == "run":
                verb.add_argument("--fresh", action="store_true", help="in a VM of its own, even if one is running")
                _with_docker(verb)
            verb.add_argument(
                "-i", "--stdin", action="store_true", help="pass standard input on (else the command has none)"
            )
            verb.add_argument(
                "--timeout", type=float, metavar="SECONDS", help="end the command after so long, with status 124"
            )
            verb.add_argument(
                "--results",
                metavar="DIR",
                help="copy this directory of the VM to here afterwards (relative to the repository)",
            )
            verb.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ARGUMENT...")
    return top


def _with_docker(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--docker", action="store_true", help="Docker can work in the VM: a disk for its data, enough for a kind cluster"
    )
    verb.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="REFERENCE",
        help="an image of this machine's engine that Docker in the VM has from the start (may be repeated)",
    )
    verb.add_argument(
        "--kind", metavar="CLUSTER", help="as --docker, with all that a kind cluster of this name and two nodes needs"
    )


def _docker(options: argparse.Namespace) -> Content | None:
    """What Docker's disk in the VM has to hold, or None where Docker is not asked for; commands get what kind needs."""
    if options.kind:
        content = kind_content.content(options.kind, options.image)
        options.env = [*kind_content.environment(content), *getattr(options, "env", [])]
        return content
    if options.image and not options.docker:
        raise VmError("--image is for --docker and --kind")
    return docker_disk.Content(tuple(options.image)) if options.docker else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of this tool."""
    options = parser().parse_args(argv)
    try:
        return int(_VERBS[options.verb](options))
    except VmError as error:
        print(f"vm: {error}", file=sys.stderr)
        return BROKEN
    except KeyboardInterrupt:
        return 130


def environment(pairs: Sequence[str], *, within_vm: bool) -> dict[str, str]:
    """The variables of a command: `NAME=VALUE`, or `NAME` for what it is here; the same PATH everywhere."""
    path = f"{REPOSITORY}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    values = {"PATH": path if within_vm else f"{path}:{os.environ.get('PATH', '')}"}
    if within_vm:
        values["TERM"] = os.environ.get("TERM", "dumb")
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name:
            raise VmError(f"--env {pair}: NAME=VALUE or NAME")
        if equals:
            values[name] = value
        elif name in os.environ:
            values[name] = os.environ[name]
    return values


def _prepare(_: argparse.Namespace) -> int:
    progress = Progress()
    boot.prepare(progress)
    progress.done("ready to start VMs")
    return 0


def _start(options: argparse.Namespace) -> int:
    vm = boot.start(Progress(), docker=_docker(options))
    tree.sync(vm)
    return 0


def _kind_env(options: argparse.Namespace) -> int:
    words = [f"--env {shlex.quote(pair)}" for pair in kind_content.environment(kind_content.content(options.cluster))]
    print(f"VM_ENV=({' '.join(words)})")
    return 0


def _stop(_: argparse.Namespace) -> int:
    print("vm: stopped" if instance.shared().stop() else "vm: none was running", file=sys.stderr)
    return 0


def _status(_: argparse.Namespace) -> int:
    vm = instance.shared()
    facts = vm.facts()
    if facts is None:
        print("no VM is running")
        return 1
    print(f"running: pid {facts['pid']}, {facts['kind']}, state in {vm.state}")
    return 0 if client.reachable(vm) else BROKEN


def _console(_: argparse.Namespace) -> int:
    with instance.shared().console.open(errors="replace") as file:
        shutil.copyfileobj(file, sys.stdout)
    return 0


def _exec(options: argparse.Namespace) -> int:
    return _within(instance.shared(), options)


def _shell(options: argparse.Namespace) -> int:
    vm = boot.start(Progress())
    tree.sync(vm)
    env = environment(options.env, within_vm=True)
    return client.execute(vm, ["/bin/bash", "-i"], env=env, cwd=options.cwd, terminal=sys.stdin.isatty())


def runs_here() -> tuple[bool, str]:
    """Whether commands that want IPVS run on this machine's kernel, and why or why not."""
    forced = os.environ.get("HACK_VM", "auto")
    if forced not in ("auto", "native", "vm"):
        raise VmError(f"HACK_VM={forced}: native, vm or auto")
    here = forced == "native" or (forced == "auto" and native.has_ipvs())
    return here, f"HACK_VM={forced}" if forced != "auto" else f"this machine's kernel has {'' if here else 'no '}IPVS"


def _run(options: argparse.Namespace) -> int:
    here, why = runs_here()
    print(f"vm: {why}, running {'on it' if here else 'in a VM'}: {' '.join(_command(options))}", file=sys.stderr, flush=True)
    if here:
        return native.execute(
            _command(options), env=environment(options.env, within_vm=False), cwd=options.cwd, limit=options.timeout
        )
    running = instance.shared()
    if running.facts() is not None and not options.fresh and not options.docker and not options.kind:
        return _within(running, options)
    vm = boot.start(Progress(), private=True, docker=_docker(options))
    try:
        return _within(vm, options)
    finally:
        vm.stop()
        shutil.rmtree(vm.state, ignore_errors=True)


def _within(vm: Vm, options: argparse.Namespace) -> int:
    command = _command(options)
    tree.sync(vm)
    status = client.execute(
        vm,
        command,
        env=environment(options.env, within_vm=True),
        cwd=options.cwd,
        limit=options.timeout,
        stdin=options.stdin,
    )
    if options.results:
        place = Path(REPOSITORY, options.results)
        if not tree.shared(vm, place) and not tree.pull(vm, str(place), place):
            print(f"vm: {place} has no files in the VM", file=sys.stderr)
    return status


def _command(options: argparse.Namespace) -> list[str]:
    command: list[str] = options.command
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise VmError("which command? python -m hack.vm run -- COMMAND ARGUMENT...")
    return command


_VERBS = {
    "prepare": _prepare,
    "start": _start,
    "kind-env": _kind_env,
    "stop": _stop,
    "status": _status,
    "console": _console,
    "exec": _exec,
    "run": _run,
    "shell": _shell,
}
