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
from asyncbucket.statistics import LimitUse, Statistics, Waits
from asyncbucket.token_bucket import BucketStatistics, TokenBucket

__all__ = [
    "AcquireTimeout",
    "AsyncBucketError",
    "BucketStatistics",
    "Cost",
    "CostExceedsLimit",
    "Lease",
    "Limit",
    "LimitSyntaxError",
    "LimitUse",
    "Limiter",
    "QueueFull",
    "Statistics",
    "StoreError",
    "TokenBucket",
    "Waits",
    "WouldBlock",
    "pace",
]
