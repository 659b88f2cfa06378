"""What the documents quote is what the programs say and take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from hack.kind import agent_image
from hack.kind.cli import main as kind
from nodeproxy.programmer.base import Programmer

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "deploy" / "Dockerfile", *(REPOSITORY / "deploy").rglob("*.md")]
COMMANDS = sorted({
    (found[1], found[2].strip())
    for path in DOCUMENTS
    for found in re.finditer(r"python -m (hack\.kind(?:\.agent_image)?)\b([^`#&\n]*)", path.read_text())
})  # fmt: skip
SOURCES = "\n".join(path.read_text() for path in (REPOSITORY / "nodeproxy").rglob("*.py"))


def taken(command: click.Command, words: list[str]) -> None:
    """Read a command line to its end and run nothing. Raises `UsageError`."""
    context = command.make_context("command", words)
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, chosen, others = command.resolve_command(context, rest)
        assert name is not None and chosen is not None
        taken(chosen, others)


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_a_command_that_makes_the_image_is_taken_as_it_is_written(module: str, arguments: str) -> None:
    taken(agent_image.main if module.endswith("agent_image") else kind, shlex.split(arguments))


def test_there_are_such_commands() -> None:
    assert ("hack.kind", "image agent") in COMMANDS
    assert ("hack.kind.agent_image", "DIRECTORY") in COMMANDS


def test_lines_of_the_log_that_the_runbook_explains_are_logged() -> None:
    runbook = (REPOSITORY / "deploy" / "docs" / "operations.md").read_text()
    lines = re.findall(r"^\*\*`([^`]+)`\*\*", runbook, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        assert f'"{line}"' in SOURCES, line


def test_architecture_counts_what_a_mode_has_to_have() -> None:
    members = [name for name in vars(Programmer) if not name.startswith("_")]
    words = {6: "six", 7: "seven", 8: "eight", 9: "nine"}
    text = (REPOSITORY / "deploy" / "docs" / "architecture.md").read_text()
    assert f"the {words[len(members)]} members of `Programmer`" in text
