"""One server for the tests that leave it as it is."""

from collections.abc import Iterator

import pytest
from tests.server.serving import Address, make_predictor, running


@pytest.fixture(scope="session")
def server() -> Iterator[Address]:
    """It serves one model called "one"."""
    with running(make_predictor()) as address:
        yield address
