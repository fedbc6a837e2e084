"""One small server for all tests that only ask."""

import pytest

from tests.serve.small import running, small_app


@pytest.fixture(scope="session")
def app():
    return small_app()


@pytest.fixture(scope="session")
def url(app):
    with running(app) as address:
        yield address
