"""What all tests share: nothing is judged by how long it takes, so hypothesis has no deadlines; logging as it was before."""

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

settings.register_profile("nodeproxy", deadline=None)
settings.load_profile("nodeproxy")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that ran within a test has set up its own logging, which may leave out what the next test looks for."""
    yield
    structlog.reset_defaults()
