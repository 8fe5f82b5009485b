"""The public suite, played on the SQLite store."""

from pathlib import Path

import pytest

from asyncbucket.stores import Store, open_store
from asyncbucket.testing.store_conformance import StoreConformance

#: What stores share is the machine's clock.
pytestmark = pytest.mark.real_clock


class TestSQLite(StoreConformance):
    """A file is a store."""

    path: Path = Path()

    @pytest.fixture(autouse=True)
    def file(self, tmp_path: Path) -> None:
        self.path = tmp_path / "limits.db"

    def make_store(self) -> Store:
        return open_store(f"sqlite:///{self.path}?patience=5")
