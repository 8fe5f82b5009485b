"""Asyncio-native rate-limiting for concurrent agents: never over, never idle, in order."""

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
from asyncbucket.lease import Lease
from asyncbucket.limiter import Limiter, pace
from asyncbucket.limits import Limit
from asyncbucket.statistics import Statistics
from asyncbucket.token_bucket import TokenBucket

__all__ = [
    "AcquireTimeout",
    "AsyncBucketError",
    "Cost",
    "CostExceedsLimit",
    "Lease",
    "Limit",
    "LimitSyntaxError",
    "Limiter",
    "QueueFull",
    "Statistics",
    "StoreError",
    "TokenBucket",
    "WouldBlock",
    "pace",
]
