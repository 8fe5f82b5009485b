"""Our stores keep the promises of every store."""

from pathlib import Path

import pytest

from asyncbucket.stores import Store, open_store
from tests.stores.conformance import StoreConformance


class TestRedis(StoreConformance):
    """Run every scenario against a real server."""

    _url: str = ""

    @pytest.fixture(autouse=True)
    def _empty_server(self, url: str) -> None:
        self._url = url

    def make_store(self) -> Store:
        return open_store(self._url)


@pytest.mark.real_clock
class TestSQLite(StoreConformance):
    """Run every scenario on a file; stores share the machine's clock."""

    _path = Path()

    @pytest.fixture(autouse=True)
    def _new_file(self, path: Path) -> None:
        self._path = path

    def make_store(self) -> Store:
        return open_store(f"sqlite:///{self._path}?patience=5")
