"""Asyncio-native rate limiting for concurrent agents: never over, never idle, in order."""

from importlib import import_module
from typing import TYPE_CHECKING

from asyncbucket import errors, events
from asyncbucket.agents import agent
from asyncbucket.budgets import Budget, budget
from asyncbucket.engine.context import deadline, priority, sticky, tenant
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.errors import (
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
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.statistics import LimitUse, Statistics, Waits
from asyncbucket.engine.token_bucket import BucketStatistics, TokenBucket
from asyncbucket.explanations import Explanation
from asyncbucket.limiter import Limiter, pace
from asyncbucket.plan import plan

if TYPE_CHECKING:
    from asyncbucket import prices, settings
    from asyncbucket.auditing import Audit, audit
    from asyncbucket.limiter import Pool
    from asyncbucket.plan import Plan
    from asyncbucket.providers.prices import Price

#: What few programs need, and which module has it.
_LAZY = {
    "Audit": "asyncbucket.auditing",
    "Plan": "asyncbucket.plan",
    "Pool": "asyncbucket.limiter",
    "Price": "asyncbucket.providers.prices",
    "audit": "asyncbucket.auditing",
    "batch": "asyncbucket.batch",
    "prices": "asyncbucket.prices",
    "settings": "asyncbucket.settings",
    "stores": "asyncbucket.stores",
    "telemetry": "asyncbucket.telemetry",
    "testing": "asyncbucket.testing",
}


def __getattr__(name: str) -> object:
    """Import what few programs need on first use: ``asyncbucket.telemetry``, `Plan`."""
    if name not in _LAZY:
        raise AttributeError(f"module 'asyncbucket' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    return getattr(module, name) if name.istitle() or name == "audit" else module


def __dir__() -> list[str]:
    """Show what people use, not what is needed to find it."""
    return sorted({*__all__, *_LAZY})


__all__ = [
    "AcquireTimeout",
    "AsyncBucketError",
    "Audit",
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
    "audit",
    "budget",
    "deadline",
    "errors",
    "events",
    "pace",
    "plan",
    "prices",
    "priority",
    "settings",
    "sticky",
    "tenant",
]
