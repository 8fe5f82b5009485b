"""A suite for stores: does this one keep limits as `asyncbucket.stores.store` promises?

Subclass `StoreConformance` in a test module, say how the store is reached, and run pytest::

    class TestMyStore(StoreConformance):
        @pytest.fixture(autouse=True)
        def place(self, tmp_path):
            self.path = tmp_path / "limits.db"

        def make_store(self):
            return open_store(f"sqlite:///{self.path}")

Each scenario opens limiters with fresh names and several connections, as processes would. The answers
to histories of calls, refunds and debts must be those that a SQLite store gives at those instants of
the store's clock, whose grain is a microsecond at most. Scenarios run on the machine's clock, because
that is what stores share; together they take about 15 s.
"""

from .scenarios import StoreConformance

__all__ = ["StoreConformance"]
