"""Asyncio-native rate limiting for concurrent agents: never over, never idle, in order."""

from importlib import import_module
from typing import TYPE_CHECKING

from asyncbucket import errors, events
from asyncbucket.core.budget import Budget, budget
from asyncbucket.core.context import agent, deadline, priority, sticky, tenant
from asyncbucket.core.cost import Cost
from asyncbucket.core.errors import (
    AcquireTimeout,
    AsyncBucketError,
    BudgetExceeded,
    CostExceedsLimit,
    LimitSyntaxError,
    QueueFull,
    StoreError,
    UnknownPrice,
    WouldBlock,
)
from asyncbucket.core.explain import Explanation
from asyncbucket.core.lease import Lease
from asyncbucket.core.limiter import Limiter, pace
from asyncbucket.core.limits import Limit
from asyncbucket.core.statistics import LimitUse, Statistics, Waits
from asyncbucket.core.token_bucket import BucketStatistics, TokenBucket
from asyncbucket.plan import plan

if TYPE_CHECKING:
    from asyncbucket import presets, prices
    from asyncbucket.core import settings
    from asyncbucket.core.pool import Pool
    from asyncbucket.plan import Plan
    from asyncbucket.providers.prices import Price

#: What few programs need, and which module has it.
_LAZY = {
    "Plan": "asyncbucket.plan",
    "Pool": "asyncbucket.core.pool",
    "Price": "asyncbucket.providers.prices",
    "batch": "asyncbucket.batch",
    "presets": "asyncbucket.presets",
    "prices": "asyncbucket.prices",
    "settings": "asyncbucket.core.settings",
    "stores": "asyncbucket.stores",
    "telemetry": "asyncbucket.telemetry",
    "testing": "asyncbucket.testing",
}


def __getattr__(name: str) -> object:
    """Import what few programs need on first use: ``asyncbucket.telemetry``, `Plan`."""
    if name not in _LAZY:
        raise AttributeError(f"module 'asyncbucket' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    return getattr(module, name) if name.istitle() else module


def __dir__() -> list[str]:
    """Show what people use, not what is needed to find it."""
    return sorted({*__all__, *_LAZY})


__all__ = [
    "AcquireTimeout",
    "AsyncBucketError",
    "BucketStatistics",
    "Budget",
    "BudgetExceeded",
    "Cost",
    "CostExceedsLimit",
    "Explanation",
    "Lease",
    "Limit",
    "LimitSyntaxError",
    "LimitUse",
    "Limiter",
    "Plan",
    "Pool",
    "Price",
    "QueueFull",
    "Statistics",
    "StoreError",
    "TokenBucket",
    "UnknownPrice",
    "Waits",
    "WouldBlock",
    "agent",
    "budget",
    "deadline",
    "errors",
    "events",
    "pace",
    "plan",
    "presets",
    "prices",
    "priority",
    "settings",
    "sticky",
    "tenant",
]
