"""The ways in which Services are programmed: mode and variant of iptables. Every test of packets runs in each of them.

Where the kernel has no IPVS, tests of that mode are skipped; `make ipvs` runs them in a VM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pytest

from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.agent import Variant

Test = TypeVar("Test", bound=Callable[..., object])


class Way(NamedTuple):
    """A mode, and the variant of iptables that its rules are in."""

    mode: str
    variant: Variant

    def __str__(self) -> str:
        return self.variant if self.mode == "iptables" else f"{self.mode}-{self.variant}"


def lacks_ipvs() -> str:
    """Why IPVS mode cannot be tested on this kernel; "" where it can."""
    try:
        with IPVS() as ipvs:
            ipvs.require()
    except KernelError as error:
        return f"{error} (`make ipvs` runs this test in a VM)"
    return ""


def needs_ipvs(test: Test) -> Test:
    """Decorator of a test that is about IPVS mode alone."""
    reason = lacks_ipvs()
    return pytest.mark.ipvs(pytest.mark.skipif(bool(reason), reason=reason)(test))


def ipvs(*values: object, id: str | None = None) -> object:
    """A parameter set of IPVS mode: marked so, and skipped where the kernel has none."""
    reason = lacks_ipvs()
    return pytest.param(*values, id=id, marks=[pytest.mark.ipvs, pytest.mark.skipif(bool(reason), reason=reason)])


LEGACY, NFT = Way("iptables", "legacy"), Way("iptables", "nft")
IPVS_LEGACY, IPVS_NFT = Way("ipvs", "legacy"), Way("ipvs", "nft")
