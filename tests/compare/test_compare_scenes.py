"""The cluster states of the conformance scenes through `compare`: every frontend, from every side, without a disagreement.

All of them in iptables mode; in IPVS mode, in the VM, some, chosen so that every answer and every source of it is there
(NODEPROXY_COMPARE_SCENES=all: all). The scenes' own flows are sent by tests/conformance; here `compare` makes its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from states import of_scene

from nodeproxy.compare.comparison import Options, compare
from nodeproxy.compare.one_mode import ModeRun, Work, run_mode
from nodeproxy.compare.probing import Progress
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.sandbox.scene import Scene, load_scenes
from nodeproxy.snapshot.model import Snapshot
from tests.ways import IPVS_NFT, NFT, Way, ipvs

pytestmark = pytest.mark.kernel

FILE = Path(__file__).parents[1] / "conformance" / "packet_flows.json"
SCENES = {scene.name: scene for scene in load_scenes(FILE)}
USUAL = ("scene-02", "scene-09", "scene-14", "scene-19", "scene-27")
IN_IPVS = list(SCENES) if os.environ.get("NODEPROXY_COMPARE_SCENES") == "all" else list(USUAL)


def in_both_modes() -> Iterator[object]:
    for name, scene in SCENES.items():
        yield pytest.param(scene, NFT, id=f"{name}-{NFT}")
    for number, name in enumerate(IN_IPVS, 1):
        yield ipvs(SCENES[name], IPVS_NFT, id=f"{name}-{IPVS_NFT}-{number}-of-{len(IN_IPVS)}-of-{len(SCENES)}")


def in_this_process(work: Work, snapshot: Snapshot, progress: Progress) -> ModeRun:
    return run_mode(snapshot, work, progress)


@pytest.mark.parametrize(("scene", "way"), list(in_both_modes()))
def test_a_scene_without_disagreement(scene: Scene, way: Way, tmp_path: Path) -> None:
    options = Options(modes=[Mode(way.mode)], variants=[way.variant], changes=0, connects=0)
    comparison = compare(of_scene(scene, tmp_path), options, lambda *_: None, in_this_process)
    (mode,) = comparison.modes
    assert mode.error is None
    assert not comparison.disagreements, "\n".join(map(str, comparison.disagreements))
    assert mode.probes > 10
    assert mode.frontends
