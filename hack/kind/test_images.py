"""Owns the images that end-to-end tests run in pods: agnhost, and the few others that Kubernetes' own tests name.

Where they cannot be pulled, what is built here stands in for the original under the original's name: agnhost from its Go
module on a Debian base, with the programs that tests call in it. The tags are those of Kubernetes v1.36.2
(test/utils/image/manifest.go; `e2e.test --list-images` prints them, and hack/conformance compares).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hack.conformance import build as programs
from hack.kind import base_image, parts
from hack.kind.images import Image, build, ensure, key
from hack.kind.places import HERE, cache

_REGISTRY: Final = "registry.k8s.io/e2e-test-images"
AGNHOST: Final = f"{_REGISTRY}/agnhost:2.63.0"
BUSYBOX: Final = f"{_REGISTRY}/busybox:1.37.0-1"
GLIBC_DNS: Final = f"{_REGISTRY}/glibc-dns-testing:2.0.0"
NGINX: Final = f"{_REGISTRY}/nginx:1.15-4"
IPTABLES: Final = "registry.k8s.io/build-image/distroless-iptables:v0.9.3"
REGRESSION: Final = f"{_REGISTRY}/regression-issue-74839:1.4"

_AGNHOST: Final = (HERE / "agnhost.Dockerfile").read_text()
# What tests use of the images of GLIBC_DNS and IPTABLES is in it: Debian's dig, CoreDNS; iptables, conntrack.
_SHELL: Final = f'FROM {AGNHOST}\nENTRYPOINT []\nCMD ["bash"]\n'
# Tests only ask that something runs in it, that answers on port 80.
_NGINX: Final = f'FROM {AGNHOST}\nENTRYPOINT ["/agnhost", "netexec", "--http-port=80"]\nCMD []\n'
_BUSYBOX: Final = """ARG BASE
FROM $BASE AS packages
RUN apt-get update && apt-get install -y --no-install-recommends busybox-static \\
 && mkdir -p /root/bin /root/tmp /root/etc && cp /bin/busybox /root/bin/ && chmod 1777 /root/tmp \\
 && for name in $(busybox --list | grep -vx busybox); do ln -s busybox /root/bin/$name; done \\
 && echo root:x:0:0:root:/:/bin/sh >/root/etc/passwd && echo root:x:0: >/root/etc/group
FROM scratch
COPY --from=packages /root /
CMD ["sh"]
"""
_REGRESSION: Final = 'FROM scratch\nCOPY regression-issue-74839 /\nENTRYPOINT ["/regression-issue-74839"]\n'


def agnhost() -> str:
    """The reference of the image that most tests run, which is in the engine."""
    coredns = parts.COREDNS_PART.build() / "coredns"
    made_of = key([_AGNHOST, programs.fingerprint(), coredns.parent.name])
    return ensure(
        Image(AGNHOST, made_of),
        lambda: _build(AGNHOST, made_of, _AGNHOST, [programs.programs() / "agnhost", coredns]),
        pull=True,
    )


def all_images() -> tuple[str, ...]:
    """The references of all images, which are in the engine."""
    first = agnhost()
    busybox, regression = key([_BUSYBOX]), key([_REGRESSION, programs.fingerprint()])
    return (
        first,
        ensure(Image(BUSYBOX, busybox), lambda: _build(BUSYBOX, busybox, _BUSYBOX), pull=True),
        ensure(Image(REGRESSION, regression), lambda: _build_regression(regression), pull=True),
        # Without a key: no archive of what takes a second to derive, and an older one serves as well.
        ensure(Image(GLIBC_DNS), lambda: _build(GLIBC_DNS, "", _SHELL), pull=True),
        ensure(Image(IPTABLES), lambda: _build(IPTABLES, "", _SHELL), pull=True),
        ensure(Image(NGINX), lambda: _build(NGINX, "", _NGINX), pull=True),
    )


def _build_agnhost(made_of: str, coredns: Path) -> None:
    _build(AGNHOST, made_of, _AGNHOST, [programs.programs() / "agnhost", coredns])


def _build_regression(made_of: str) -> None:
    _build(REGRESSION, made_of, _REGRESSION, [programs.programs() / "regression-issue-74839"])


def _build(reference: str, made_of: str, dockerfile: str, files: Sequence[Path] = ()) -> None:
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".context-") as directory:
        context = Path(directory)
        (context / "Dockerfile").write_text(dockerfile)
        for file in files:
            _link(file, context / file.name)
        arguments = {"BASE": base_image.base_image()} if "$BASE" in dockerfile else {}
        build(context, reference, key=made_of, arguments=arguments)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
