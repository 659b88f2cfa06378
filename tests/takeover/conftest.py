"""A node on which no proxy has run, for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.takeover.proxies import Node, made_node


@pytest.fixture
def node() -> Iterator[Node]:
    with made_node() as made:
        yield made
