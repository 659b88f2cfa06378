"""`nodeproxy compare` as a command: usage, what is missing, JSON, a table, exit status; and many Services."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from states import NODE, every_sort, snapshot, very_many, write

from nodeproxy.cli.main import main_group
from nodeproxy.compare import comparison as joining
from nodeproxy.compare import running
from nodeproxy.compare.comparison import CompareError, Options, compare
from nodeproxy.compare.one_mode import ModeRun, Work
from nodeproxy.compare.probing import Fault, Progress
from nodeproxy.compare.results import Comparison, ModeResult
from nodeproxy.compare.table import show
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.snapshot.model import Snapshot
from nodeproxy.source.events import Refused
from tests.ways import IPVS_NFT, Way, ipvs

REPOSITORY = Path(__file__).parents[2]
NODE_FLAGS = ("--hostname-override", NODE, "--cluster-cidr", "10.0.0.0/8,fd00:10::/32")


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main_group, ["compare", *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--modes", "iptables,nftables"), "--modes: 'nftables' is none of iptables, ipvs"),
        (("--variants", "ebtables"), "--variants: 'ebtables' is none of legacy, nft"),
        (("--limit", "0"), "--limit"),
        (("--output", "yaml"), "--output"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_make_compare_says_before_the_help_of_the_command_what_it_takes_itself() -> None:
    program = [sys.executable, "-m", "hack.compare", "--help"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    said, _, rest = done.stdout.partition("\n")
    assert said.startswith("Takes 2,000 made-up Services unless ")
    assert rest.strip().startswith("Usage: nodeproxy compare")


@pytest.mark.kernel
def test_a_directory_that_is_not_there() -> None:
    result = command("--snapshot", "/nowhere/at/all")
    assert result.exit_code == 1
    assert result.output == "nodeproxy: /nowhere/at/all: no such file or directory\n"


@pytest.mark.kernel
def test_a_state_without_services(tmp_path: Path) -> None:
    result = command("--manifests", str(write(every_sort()[:1], tmp_path)), *NODE_FLAGS)
    assert result.exit_code == 1
    assert "no Service port to compare (1 objects)" in result.output
    assert "Traceback" not in result.output


def test_the_agent_does_not_import_what_only_people_need() -> None:
    heavy = ("rich.progress", "pygal", "jinja2", "kopf", "nodeproxy.compare", "nodeproxy.sandbox")
    code = f"import sys, nodeproxy.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "repository", lambda: None)
    monkeypatch.setattr(running, "_lacks_ipvs", lambda: "the kernel has no IPVS")


def nothing(work: Work, _: Snapshot, progress: Progress) -> ModeRun:
    progress("nothing", 1, 1)
    return ModeRun(ModeResult(str(work.mode), work.variant, "nowhere"))


def test_ipvs_mode_is_left_out_only_where_it_was_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_repository(monkeypatch)
    taken = snapshot(every_sort(), tmp_path)
    by_default = compare(taken, Options(list(Mode), ["nft"], default_modes=True), lambda *_: None, nothing)
    assert [mode.mode for mode in by_default.modes] == ["iptables"]
    assert by_default.not_run == {
        "ipvs": "the kernel has no IPVS; a clone of nodeproxy's repository has hack/vm, a VM for that"
    }
    assert not by_default.failed
    asked = compare(taken, Options([Mode.IPVS], ["nft"]), lambda *_: None)
    assert asked.failed
    assert asked.modes[0].error == "the kernel has no IPVS; a clone of nodeproxy's repository has hack/vm, a VM for that"


def test_a_program_that_fails_is_an_error_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = running.Where((sys.executable, "-c", "import sys; sys.exit('out of luck')"), "this machine")
    monkeypatch.setattr(running, "where", lambda _: dying)
    result = compare(snapshot(every_sort(), tmp_path), Options([Mode.IPTABLES], ["nft"]), lambda *_: None)
    assert result.failed
    assert result.modes[0].error == "the program for it ended with status 1: out of luck"


def test_a_disagreement_tells_what_other_modes_did(tmp_path: Path) -> None:
    def run_one(work: Work, _: Snapshot, progress: Progress) -> ModeRun:
        found = nothing(work, _, progress)
        fault = Fault(
            "shop/[red]web\x1b[0m", "10.96.0.10:80/TCP", "cluster IP", None, "reject", "3 x drop", "should be rejected"
        )
        return msgspec.structs.replace(found, faults=(fault,)) if work.mode is Mode.IPVS else found

    found = compare(snapshot(every_sort(), tmp_path), Options(list(Mode), ["nft"]), lambda *_: None, run_one)
    assert found.failed
    assert [one.mode for one in found.disagreements] == ["ipvs (nft)"]
    out = io.StringIO()
    show(found, Console(file=out, width=160))
    assert "shop/[red]web\\x1b[0m" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "1 disagreement" in out.getvalue()


def test_what_cannot_be_read_is_counted_apart_from_what_cannot_be_programmed(tmp_path: Path) -> None:
    taken = snapshot(every_sort(), tmp_path)
    taken = msgspec.structs.replace(taken, refused=(Refused(None, "cut short", "a.json"),), origin="from \x1b[31m")
    found = compare(taken, Options([Mode.IPTABLES], ["nft"]), lambda *_: None, nothing)
    assert (found.refused[0], found.left_out) == ("a.json: cut short", 1)
    found = msgspec.structs.replace(found, refused=(*found.refused, "Service a/b: spec.ports: broken"))
    out = io.StringIO()
    show(found, Console(file=out, width=160))
    assert "1 objects or files cannot be read, and are left out" in out.getvalue()
    assert "1 parts of objects cannot be programmed, such as: Service a/b: spec.ports: broken" in out.getvalue()
    assert "a.json" not in out.getvalue()  # named already, on standard error
    assert "from \\x1b[31m, node" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_places_that_cannot_be_found_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise joining.PlacesError("no room")

    monkeypatch.setattr(joining, "find_places", full)
    with pytest.raises(CompareError, match="no room"):
        compare(snapshot(every_sort(), tmp_path), Options([Mode.IPTABLES], ["nft"]), lambda *_: None, nothing)


def test_a_report_that_cannot_be_written_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeproxy.cli.compare.snapshot_of", None)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    (tmp_path / "file").touch()
    result = command("--manifests", str(tmp_path), "--html", str(tmp_path / "file" / "report.html"))
    assert result.exit_code == 1
    assert f"--html {tmp_path}/file: File exists" in result.output


@pytest.mark.kernel
def test_json_html_and_table_of_a_real_run(tmp_path: Path) -> None:
    manifests, html = write(every_sort(), tmp_path / "manifests"), tmp_path / "report.html"
    arguments = ("--manifests", str(manifests), *NODE_FLAGS, "--modes", "iptables", "--variants", "nft", "--changes", "2")
    result = command(*arguments, "--connects", "20", "--output", "json", "--html", str(html))
    assert result.exit_code == 0, result.output
    found = msgspec.json.decode(result.stdout, type=Comparison)
    assert not found.disagreements
    assert found.modes[0].probes > 300
    assert "shop/web:main" in html.read_text()
    out = io.StringIO()
    show(found, Console(file=out, width=160))
    assert "iptables (nft) does what the forwarding table says." in out.getvalue().replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.kernel
@pytest.mark.parametrize("way", [Way("iptables", "nft"), ipvs(IPVS_NFT)], ids=str)
def test_a_sample_of_2000_services(way: Way, tmp_path: Path) -> None:
    manifests = write(very_many(2000), tmp_path / "manifests")
    arguments = ("--manifests", str(manifests), *NODE_FLAGS, "--modes", way.mode, "--variants", way.variant)
    result = command(*arguments, "--limit", "40", "--changes", "3", "--connects", "50", "--output", "json")
    assert result.exit_code == 0, result.output[-3000:]
    found = msgspec.json.decode(result.stdout, type=Comparison)
    assert "a sample of 40 of 2000 Service ports is probed" in found.scope.words
    counts = {one.what: one.number for one in found.modes[0].figures.counts}
    assert counts["virtual servers" if way.mode == "ipvs" else "rules"] > 2000
    assert found.modes[0].figures.change is not None
