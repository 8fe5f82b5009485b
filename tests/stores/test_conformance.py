"""Our stores keep the promises of every store."""

import pytest

from asyncbucket.stores import Store, open_store
from tests.stores.conformance import StoreConformance


@pytest.mark.real_clock
class TestStores(StoreConformance):
    """Run every scenario on a real server, and on a file; stores share the machine's clock."""

    _where = ""

    @pytest.fixture(autouse=True)
    def _place(self, where: str) -> None:
        self._where = where

    def make_store(self) -> Store:
        return open_store(self._where)
