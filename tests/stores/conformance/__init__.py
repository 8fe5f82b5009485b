"""A suite for stores: does this one keep limits as `asyncbucket.stores.store` promises?

Subclass `StoreConformance` in a test module, say how the store is reached, and run pytest::

    class TestMyStore(StoreConformance):
        @pytest.fixture(autouse=True)
        def place(self, tmp_path):
            self.path = tmp_path / "limits.db"

        def make_store(self):
            return open_store(f"sqlite:///{self.path}")

Each scenario opens limiters with fresh names and several connections, as processes would. Histories
of calls, refunds and debts are compared with `asyncbucket.core.meters`: each start must be what the
meters say at that instant of the store's clock. Scenarios run on the machine's clock, because that
is what stores share; together they take about half a minute.
"""

from .arithmetic import Arithmetic
from .oracle import Oracle
from .slots import Slots
from .steering import Steering

__all__ = ["Oracle", "StoreConformance"]


class StoreConformance(Arithmetic, Slots, Steering):
    """Test a store: override `make_store`, and `grain` if its clock is coarser than 1 ns."""
