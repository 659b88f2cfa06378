"""Builds etcd and the Kubernetes programs from their Go modules, once for each version, into a cache.

The result is a directory with one static program and a symbolic link to it for each component (see gomod/main.go):
`${NODEPROXY_CACHE:-~/.cache/nodeproxy}/kubernetes-VERSION-HASH/bin`, where the hash is that of everything that goes into
the build. The first build takes about seven minutes on two cores; later ones, with Go's own cache warm, some seconds.

It needs nothing but Python and Go, so it can run before anything is installed:

    python hack/controlplane/build.py     # progress on standard error, the directory on standard output
"""

import fcntl
import hashlib
import os
import platform
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent / "gomod"
PROGRAM = "kubernetes"
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl", "kube-proxy")
"""What `KUBEBUILDER_ASSETS` has to have. Those of envtest lack the third and the last."""
_REPORT_EVERY = 15.0
_TOOLCHAINS_SINCE = (1, 21)  # from here on Go fetches the toolchain that go.mod asks for


class BuildError(Exception):
    """The programs cannot be built here; the message says what to do."""


def version() -> str:
    """The version of Kubernetes that go.mod requires, as `v1.36.2`."""
    return _from_go_mod(r"\bk8s\.io/kubernetes (v\S+)")


def cache() -> Path:
    """Where this project keeps what is costly to make, outside the repository."""
    return Path(os.environ.get("NODEPROXY_CACHE") or Path.home() / ".cache" / "nodeproxy")


def binary(name: str) -> Path:
    """The program of this name: from `KUBEBUILDER_ASSETS` if all are there, else built (or found in the cache)."""
    return binaries() / name


def binaries() -> Path:
    """The directory of the programs: `KUBEBUILDER_ASSETS` if all are there, else what `build` gives."""
    return _assets() or build()


def kube_proxy() -> Path | None:
    """The kube-proxy that `KUBE_PROXY` names, whatever is there; else that of `KUBEBUILDER_ASSETS`, or the one in the cache.

    None where there is none of these: nothing is built.
    """
    if named := os.environ.get("KUBE_PROXY"):
        return Path(named).absolute()
    if assets := _assets():
        return assets.absolute() / "kube-proxy"
    return next(iter(sorted(cache().glob(f"kubernetes-{version()}-*/bin/kube-proxy"))), None)


def build() -> Path:
    """Builds the programs unless the cache has them, and returns their directory.

    Two that build at once wait for each other, and nobody sees half a build.
    """
    return once(cache() / f"kubernetes-{version()}-{fingerprint(SOURCES)}", _build) / "bin"


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """The directory `target`, made by `make` (given an empty directory to fill) unless it is there.

    Two that ask at once wait for each other, and nobody sees half a directory.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f"{target.name}.lock")):
        if not target.is_dir():  # else somebody made it while we waited
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                make(scratch)
                scratch.chmod(0o755)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def _build(scratch: Path) -> None:
    say(f"building Kubernetes {version()}: seven minutes on two cores, seconds if Go's cache is warm")
    started = time.monotonic()
    bin_ = scratch / "bin"
    bin_.mkdir()
    compile_go(["build", "-v", *flags(), "-o", str(bin_ / PROGRAM), "."], SOURCES)
    components = subprocess.run([bin_ / PROGRAM, "--list"], check=True, capture_output=True, text=True).stdout
    for component in components.split():
        (bin_ / component).symlink_to(PROGRAM)
    say(f"built in {time.monotonic() - started:.0f} s")


def flags() -> list[str]:
    """Of `go build`: a stripped program that does not depend on where it was built, with the version of Kubernetes in it."""
    major, minor, _ = version().removeprefix("v").split(".", 2)
    values = {"gitVersion": version(), "gitMajor": major, "gitMinor": minor, "gitTreeState": "archive", "gitCommit": ""}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    stamps = " ".join(f"-X {package}.{name}={value}" for package in packages for name, value in values.items())
    return ["-trimpath", "-buildvcs=false", "-ldflags", f"-s -w {stamps}"]


def compile_go(arguments: list[str], sources: Path) -> None:
    """Runs `go` in the module at `sources`, telling now and then how far it has come (-v names each package compiled)."""
    command = [_go(), *arguments]
    env = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"}
    started = reported = time.monotonic()
    compiled, other = 0, []
    with (
        subprocess.Popen(command, cwd=sources, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stderr is not None
        selector.register(process.stderr, selectors.EVENT_READ)
        pending = b""
        while True:
            if selector.select(_REPORT_EVERY):
                chunk = os.read(process.stderr.fileno(), 1 << 16)
                if not chunk:
                    break
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    if re.fullmatch(rb"[\w.~/+-]+", line):
                        compiled += 1
                    else:
                        other.append(line.decode(errors="replace"))
            if time.monotonic() - reported >= _REPORT_EVERY:
                reported = time.monotonic()
                say(f"  {reported - started:4.0f} s: {compiled} packages compiled")
    if process.returncode:
        message = "\n".join([*other[-40:], pending.decode(errors="replace")])
        raise BuildError(f"{' '.join(command[:2])} in {sources} failed:\n{message}")


def _go() -> str:
    """Finds Go, and checks that it can build what go.mod asks for."""
    wanted = _numbers(_from_go_mod(r"^go (\S+)"))
    advice = (
        f"Building Kubernetes {version()} needs Go {_dotted(wanted)}, or any from {_dotted(_TOOLCHAINS_SINCE)} on that may "
        "fetch it (GOTOOLCHAIN=auto). On Debian 12 `apt-get install golang` gives 1.19, which is too old: unpack a release "
        "from Go's download page into /usr/local and put /usr/local/go/bin on PATH. To build nothing, set "
        f"KUBEBUILDER_ASSETS to a directory with all of {', '.join(COMPONENTS)} in it (envtest's are not all), or "
        "NODEPROXY_TEST_KUBECONFIG to the kubeconfig of a cluster for tests."
    )
    go = shutil.which("go")
    if go is None:
        raise BuildError(f"There is no `go` on PATH. {advice}")
    env = os.environ | {"GOTOOLCHAIN": "local"}
    output = subprocess.run([go, "version"], cwd="/", env=env, capture_output=True, text=True, check=False).stdout
    found = re.search(r"\bgo(\d+(?:\.\d+)+)", output)
    have = _numbers(found.group(1)) if found else (0,)
    fetches = have >= _TOOLCHAINS_SINCE and os.environ.get("GOTOOLCHAIN", "auto") != "local"
    if have < wanted and not fetches:
        raise BuildError(f"{go} is Go {_dotted(have)}. {advice}")
    return go


def _assets() -> Path | None:
    given = os.environ.get("KUBEBUILDER_ASSETS")
    if not given:
        return None
    missing = [name for name in COMPONENTS if not (Path(given) / name).exists()]
    if missing:
        say(f"KUBEBUILDER_ASSETS={given} has no {' and no '.join(missing)}: passed over")
        return None
    return Path(given)


def fingerprint(sources: Path) -> str:
    """Of everything that goes into programs built from the module at `sources`: its files, the machine, the flags."""
    digest = hashlib.sha256(platform.machine().encode())
    digest.update("\0".join(flags()).encode())
    for path in sorted(path for path in sources.iterdir() if path.suffix in (".mod", ".sum", ".go")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _from_go_mod(pattern: str) -> str:
    match = re.search(pattern, (SOURCES / "go.mod").read_text(), re.MULTILINE)
    if match is None:
        raise BuildError(f"{SOURCES / 'go.mod'} has nothing like {pattern}")
    return match.group(1)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another build holds {path}: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """A line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(binaries())
    except BuildError as error:
        sys.exit(str(error))
