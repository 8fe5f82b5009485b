"""Redis and Valkey keep the promises of every store."""

from typing import TYPE_CHECKING

import pytest

from asyncbucket.stores import Store, open_store
from conformance import StoreConformance

if TYPE_CHECKING:
    from tests.stores.conftest import RunningServer


class TestRedis(StoreConformance):
    """Run every scenario against a real server."""

    grain = 1_000
    server_url: str = ""

    @pytest.fixture(autouse=True)
    def url(self, shared_server: "RunningServer", redis: object) -> None:
        assert redis is not None
        self.server_url = shared_server.url

    def make_store(self) -> Store:
        return open_store(self.server_url)
