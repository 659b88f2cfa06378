"""Builds Kubernetes' end-to-end tests, and what they run in pods, from the module k8s.io/kubernetes, once, into the cache.

Both directories are keyed by everything that goes into the build (see hack/controlplane/build.py, which does the work):
the tests take six minutes on two cores with an empty Go cache, the programs for pods half a minute.
"""

import time
from pathlib import Path

from hack.controlplane import build

SOURCES = Path(__file__).parent / "gomod"
_E2E_TESTS = "k8s.io/kubernetes/test/e2e"
_GINKGO = "github.com/onsi/ginkgo/v2/ginkgo"
_IN_PODS = ("k8s.io/kubernetes/test/images/agnhost", "k8s.io/kubernetes/test/images/regression-issue-74839")


def tests() -> Path:
    """The directory of `e2e.test`, and of `ginkgo`, which runs it in several processes."""
    return build.once(build.cache() / f"e2e-tests-{build.version()}-{fingerprint()}", _build_tests)


def programs() -> Path:
    """The directory of `agnhost` and `regression-issue-74839`: static programs for the images that tests use."""
    return build.once(build.cache() / f"pod-programs-{build.version()}-{fingerprint()}", _build_programs)


def fingerprint() -> str:
    """Of everything that goes into the programs."""
    return build.fingerprint(SOURCES)


def _build_tests(target: Path) -> None:
    build.say(
        f"building Kubernetes' end-to-end tests {build.version()}: six minutes on two cores, less if Go's cache is warm"
    )
    started = time.monotonic()
    build.compile_go(["build", "-v", *build.flags(), _E2E_TESTS], SOURCES)  # as `go test` below, but it tells its progress
    build.compile_go(["test", "-c", *build.flags(), "-o", str(target / "e2e.test"), _E2E_TESTS], SOURCES)
    build.compile_go(["build", "-v", *build.flags(), "-o", f"{target}/", _GINKGO], SOURCES)
    build.say(f"built in {time.monotonic() - started:.0f} s")


def _build_programs(target: Path) -> None:
    build.say(f"building agnhost {build.version()}: half a minute")
    build.compile_go(["build", "-v", *build.flags(), "-o", f"{target}/", *_IN_PODS], SOURCES)
