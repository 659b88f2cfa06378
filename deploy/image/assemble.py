"""Owns what is in the agent's image: run by the Dockerfile, it gathers into one directory what an agent needs, and no more.

    python3 assemble.py SITE_PACKAGES ROOT

Python with the part of its library that is used, the packages in SITE_PACKAGES, iptables in both variants, and the shared
libraries of these; no shell, no package manager. Debian's packages are named for scanners, in var/lib/dpkg/status.d as in
distroless images, and their copyright files are kept. All is compiled, as the root file system is read-only.
"""

import compileall
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
SITE = Path("usr/lib/python3/dist-packages")
XTABLES = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH"), "xtables")

# Of Python's library: what is for developers, for terminals, or needs a shared library that nobody else does.
UNUSED_STDLIB = re.compile(
    r"(test|idlelib|lib2to3|tkinter|turtle\w*|ensurepip|venv|distutils|config-.*|pydoc_data|curses|dbm|sqlite3|xmlrpc)(/|\.py|$)"
    r"|lib-dynload/(_sqlite3|readline|_curses\w*|_dbm|_gdbm|_tkinter|nis|_crypt|ossaudiodev|_test\w*|_ctypes_test|_xx\w*|xx\w*)\."
)
# Of the packages: the second, asynchronous client of kubernetes, the classes of its API (100 MB, loaded only when asked for;
# the agent has its own), tests, C sources, colours for programming languages, which rich knows, and what makes network
# namespaces.
UNUSED_PACKAGES = re.compile(
    r"kubernetes/(aio|docs|test|e2e_test)(/|$)"
    r"|kubernetes/client/(api|models)/(?!__init__\.py)"
    r"|kubernetes/.*_test\.py$"
    r"|nodeproxy/(compare|sandbox)(/|$)"
    r"|pygments/(lexers|styles)/(?!__init__\.py|_mapping\.py)"
    r"|bin(/|$)"
    r"|.*\.(c|h|pyx|pxd|pyi|exe)$"
    r"|.*\.dist-info/(RECORD|INSTALLER|REQUESTED|direct_url\.json)$"
)
FILES = ("/etc/os-release", "/usr/lib/os-release", "/etc/debian_version", "/etc/nsswitch.conf", "/etc/ssl/openssl.cnf")
PLACES = ("dev", "etc/nodeproxy", "host/proc/sys/net", "proc", "run", "sys", "tmp", "root")
LAUNCHER = """#!/usr/bin/python3 -sP
from nodeproxy.cli.main import main

main()
"""
COMMANDS = [
    f"{ip}tables{variant}{what}"
    for ip in ("ip", "ip6")
    for variant in ("-nft", "-legacy")
    for what in ("", "-save", "-restore")
]


def main() -> None:
    """Make ROOT."""
    packages, root = Path(sys.argv[1]), Path(sys.argv[2])
    for folder in ("bin", "sbin", "lib", "lib64"):
        if Path("/", folder).is_symlink():
            (root / "usr" / folder).mkdir(parents=True, exist_ok=True)
            (root / folder).symlink_to(f"usr/{folder}")
    for place in PLACES:
        (root / place).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)

    taken = set(take_python(root)) | set(take_iptables(root))
    taken |= {take(Path(file), root) for file in FILES if Path(file).exists()}
    copy_tree(packages, root / SITE, UNUSED_PACKAGES)
    taken |= take_libraries(root)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/usr/sbin/nologin\n")
    (root / "etc/group").write_text("root:x:0:\n")
    launcher = root / "usr/bin/nodeproxy"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)

    name_debian_packages(root, taken)
    compile_all(root)
    check(root)


def take_python(root: Path) -> Iterator[Path]:
    """The interpreter, and its library."""
    program = Path(sys.executable).resolve()
    yield take(program, root)
    (root / "usr/bin/python3").symlink_to(program.name)
    yield from copy_tree(STDLIB, root / STDLIB.relative_to("/"), UNUSED_STDLIB)


def take_iptables(root: Path) -> Iterator[Path]:
    """Both variants with all matches and targets; plain names are the nft variant, as in Debian."""
    for variant in ("nft", "legacy"):
        yield take(Path(f"/usr/sbin/xtables-{variant}-multi"), root)
    for command in COMMANDS:
        multi = "xtables-nft-multi" if "-nft" in command else "xtables-legacy-multi"
        (root / "usr/sbin" / command).symlink_to(multi)
        if "-nft" in command:
            (root / "usr/sbin" / command.replace("-nft", "")).symlink_to(command)
    (root / "usr/sbin/xtables-monitor").symlink_to("xtables-nft-multi")
    yield from copy_tree(XTABLES, root / XTABLES.relative_to("/"), re.compile(r"lib(eb|arp)t_"))


def take_libraries(root: Path) -> set[Path]:
    """The shared libraries that programs and libraries below root need."""
    programs = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and is_elf(path)]
    found = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    if missing := re.findall(r"(\S+) => not found", found):
        raise SystemExit(f"shared libraries are missing: {missing}")
    names = set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", found, re.MULTILINE))
    # glibc opens it when a thread is ended.
    names |= set(
        re.findall(
            r"=> (/\S*libgcc_s\.so\.1)$",
            subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout,
            re.M,
        )
    )
    return {take(Path(name), root) for name in names if not Path(name).is_relative_to(root)}


def take(source: Path, root: Path) -> Path:
    """Copy a file to its place below root; what is a link to it, under that name, too. Returns where it really is."""
    real = source.resolve()
    target = root / real.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(real, target)
    named = source.parent.resolve() / source.name
    if named != real:
        link = root / named.relative_to("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(real, named.parent))
    return real


def copy_tree(source: Path, target: Path, unused: re.Pattern[str]) -> Iterator[Path]:
    """Copy a directory without what is unused (relative paths) and without compiled code. Returns what was copied."""
    copied = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_dir() or "__pycache__" in relative.parts or unused.match(relative.as_posix()):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / relative)
        copied.append(path.resolve())
    return iter(copied)


def is_elf(path: Path) -> bool:
    """Whether it is a program or a shared library."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def name_debian_packages(root: Path, taken: set[Path]) -> None:
    """Name the packages that the files are of, and keep their copyright files."""
    owners = set()
    for listing in Path("/var/lib/dpkg/info").glob("*.list"):
        for line in listing.read_text().splitlines():
            path = Path(line)
            if path.name and (path in taken or path.parent.resolve() / path.name in taken):
                owners.add(listing.name.removesuffix(".list").partition(":")[0])
                break
    status = root / "var/lib/dpkg/status.d"
    status.mkdir(parents=True)
    for paragraph in Path("/var/lib/dpkg/status").read_text().split("\n\n"):
        name = re.match(r"Package: (\S+)", paragraph)
        if name is None or name[1] not in owners:
            continue
        (status / name[1]).write_text(paragraph.strip() + "\n")
        copyright_file = Path("/usr/share/doc", name[1], "copyright")
        if copyright_file.exists():
            target = root / copyright_file.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(copyright_file.resolve(), target)


def compile_all(root: Path) -> None:
    """Compile everything once and for all: it is never looked whether a source is newer."""
    for folder in (STDLIB.relative_to("/"), SITE):
        done = compileall.compile_dir(
            root / folder,
            stripdir=str(root),
            prependdir="/",
            quiet=1,
            workers=0,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        if not done:
            raise SystemExit(f"{folder} does not compile")


def check(root: Path) -> None:
    """Run what was made, with nothing else in sight."""
    modules = "nodeproxy.agent.agent, nodeproxy.source.apiserver.source, nodeproxy.agent.cleanup, nodeproxy.source.manifests"
    operator = "nodeproxy.operator.operator, nodeproxy.operator.watch, nodeproxy.operator.probe"
    people = "nodeproxy.cli.status, nodeproxy.trace.text, rich.live, rich.table, rich.console"
    client = "from kubernetes import config; from kubernetes.client.rest import RESTClientObject; config.load_kube_config"
    for command in (
        ["/usr/bin/nodeproxy", "--version"],
        ["/usr/bin/python3", "-P", "-c", f"import {modules}; {client}"],
        ["/usr/bin/python3", "-P", "-c", f"import {operator}, {people}"],
        *([f"/usr/sbin/{name}", "--version"] for name in COMMANDS),
        *(
            [f"/usr/sbin/{name}", "-m", "bpf", "-m", "set", "-j", "MARK", "--help"]
            for name in ("iptables-nft", "ip6tables-nft")
        ),
    ):
        done = subprocess.run(
            ["chroot", root, *command], env={"PATH": "/usr/sbin:/usr/bin"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} fails in the image:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
