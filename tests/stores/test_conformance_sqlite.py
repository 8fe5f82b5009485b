"""The public conformance suite, run on the SQLite store."""

from pathlib import Path

import pytest

from asyncbucket.stores import Store, open_store
from conformance import StoreConformance

#: The stores share the machine's clock.
pytestmark = pytest.mark.real_clock


class TestSQLite(StoreConformance):
    """Run every scenario on a file."""

    path: Path = Path()

    @pytest.fixture(autouse=True)
    def file(self, tmp_path: Path) -> None:
        self.path = tmp_path / "limits.db"

    def make_store(self) -> Store:
        return open_store(f"sqlite:///{self.path}?patience=5")
