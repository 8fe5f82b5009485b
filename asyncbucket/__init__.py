"""Asyncio-native rate limiting for concurrent agents: never over, never idle, in order."""

from importlib import import_module
from typing import TYPE_CHECKING

from asyncbucket.context import deadline, priority, tenant
from asyncbucket.cost import Cost
from asyncbucket.errors import (
    AcquireTimeout,
    AsyncBucketError,
    CostExceedsLimit,
    LimitSyntaxError,
    QueueFull,
    StoreError,
    WouldBlock,
)
from asyncbucket.limiter import Limiter, pace
from asyncbucket.limiter.explain import Explanation
from asyncbucket.limiter.lease import Lease
from asyncbucket.limiter.statistics import LimitUse, Statistics, Waits
from asyncbucket.limits import Limit
from asyncbucket.plan import plan
from asyncbucket.token_bucket import BucketStatistics, TokenBucket

if TYPE_CHECKING:
    from asyncbucket.plan import Plan

_LAZY = frozenset({"batch", "presets", "settings", "stores", "telemetry", "testing"})


def __getattr__(name: str) -> object:
    """Import what few programs need on first use: ``asyncbucket.telemetry``, `Plan`."""
    if name in _LAZY:
        return import_module(f"asyncbucket.{name}")
    if name == "Plan":
        return import_module("asyncbucket.plan").Plan
    raise AttributeError(f"module 'asyncbucket' has no attribute {name!r}")


__all__ = [
    "AcquireTimeout",
    "AsyncBucketError",
    "BucketStatistics",
    "Cost",
    "CostExceedsLimit",
    "Explanation",
    "Lease",
    "Limit",
    "LimitSyntaxError",
    "LimitUse",
    "Limiter",
    "Plan",
    "QueueFull",
    "Statistics",
    "StoreError",
    "TokenBucket",
    "Waits",
    "WouldBlock",
    "deadline",
    "pace",
    "plan",
    "priority",
    "tenant",
]
