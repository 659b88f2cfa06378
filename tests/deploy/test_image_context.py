"""What goes into the agent's image of the lock file."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from hack.kind.agent_image import parse_lock, requirements

REPOSITORY = Path(__file__).parents[2]

LOCK = """\
aaa==1.0 \\
    --hash=sha256:01 \\
    --hash=sha256:02
    # via
    #   ours (pyproject.toml)
    #   bbb
b.b-b==2.0 ; sys_platform == 'win32' \\
    --hash=sha256:03
    # via aaa
"""


def test_a_lock_file_is_read_with_who_needs_what() -> None:
    found = parse_lock(LOCK)
    assert found["aaa"].text == "aaa==1.0 \\\n    --hash=sha256:01 \\\n    --hash=sha256:02\n"
    assert {"ours", "bbb"} <= found["aaa"].needed_by
    assert found["b.b-b"].needed_by == {"aaa"}


def test_the_image_has_what_an_agent_imports_and_no_tools_of_ours() -> None:
    names = set(re.findall(r"^([a-z0-9._-]+)==", requirements(), re.MULTILINE))
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = {re.match(r"[a-z0-9-]+", line)[0] for line in project["dependencies"]}  # type: ignore[index]
    tools = {re.match(r"[A-Za-z0-9-]+", line)[0].lower() for line in project["optional-dependencies"]["dev"]}  # type: ignore[index]
    extra = {re.match(r"[a-z0-9-]+", line)[0] for line in project["optional-dependencies"]["operator"]}  # type: ignore[index]
    assert wanted | extra <= names
    assert not names & (tools - wanted - {"aiohttp"})  # which kopf needs
    assert all(re.search(rf"^{re.escape(name)}==\S+ .*\n    --hash=sha256:", requirements(), re.MULTILINE) for name in names)


def test_only_modules_of_the_lock_file_are_imported() -> None:
    """At the top of a module or within a function: what is imported is Python's own, ours, or in the image."""
    import sys

    modules = {"yaml": "pyyaml", "prometheus_client": "prometheus-client"}
    names = set(re.findall(r"^([a-z0-9._-]+)==", requirements(), re.MULTILINE))
    found = set()
    # `nodeproxy compare` makes network namespaces, which no pod of ours may; it says so there.
    for path in (REPOSITORY / "nodeproxy").rglob("*.py"):
        if {"sandbox", "compare"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
                out = node.module.startswith(("nodeproxy.sandbox", "nodeproxy.compare"))
                assert not out or path.name == "compare.py", path
    packages = {modules.get(name, name) for name in found - set(sys.stdlib_module_names) - {"nodeproxy"}}
    assert packages <= names
