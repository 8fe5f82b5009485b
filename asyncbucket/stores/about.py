"""What a Redis or Valkey server reports about itself, for people."""

import asyncio
import contextlib
import time
from typing import Any, Final

from redis.asyncio import RedisCluster

from asyncbucket.core.wording import in_seconds
from asyncbucket.stores.servers import FAILURES

#: Clocks that differ by less (s) are in step.
_TOLERANCE: Final = 0.5
#: Seconds to wait for answers; what has not been answered by then is left out.
_PATIENCE: Final = 2.0
_OR: Final = " or "


async def details(client: Any) -> dict[str, str]:
    """Return its clock, version, scripts, memory and persistence, as far as the login may ask.

    If the primaries of a cluster differ in something, all that they say is named.
    """
    nodes: list[dict[str, Any]] = [{}]
    if isinstance(client, RedisCluster):
        nodes = [{"target_nodes": node} for node in client.get_primaries()]
    reported: dict[str, str] = {}
    for node in nodes:
        for name, value in (await _details_of(client, node)).items():
            known = reported.get(name, value)
            reported[name] = known if value in known.split(_OR) else f"{known}{_OR}{value}"
    return reported


async def _details_of(client: Any, node: dict[str, Any]) -> dict[str, str]:
    reported: dict[str, str] = {}
    with contextlib.suppress(TimeoutError, *FAILURES):
        async with asyncio.timeout(_PATIENCE):
            asked = time.time()
            seconds, micros = await client.time(**node)
            reported["clock"] = _clock(seconds + micros * 1e-6 - (asked + time.time()) / 2)
            info = await client.info(**node)
            reported = _version(info) | reported | _memory(info) | _persistence(info, None)
            config = await client.config_get("save", **node)
            reported |= _persistence(info, config.get("save"))
    return reported


def _clock(ahead: float) -> str:
    if abs(ahead) < _TOLERANCE:
        return "in step"
    return f"{in_seconds(abs(ahead))} {'ahead' if ahead > 0 else 'behind'}"


def _version(info: dict[str, Any]) -> dict[str, str]:
    name = info.get("server_name", "redis")
    return {name: str(info.get(f"{name}_version", info.get("redis_version")))}


def _memory(info: dict[str, Any]) -> dict[str, str]:
    maxmemory = int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy", "unknown policy")
    return {
        "scripts": f"{info.get('number_of_cached_scripts', 0)} cached",
        "memory": f"{maxmemory:,} bytes at most and {policy}" if maxmemory else "unbounded",
    }


def _persistence(info: dict[str, Any], save: str | None) -> dict[str, str]:
    snapshots = "unknown" if save is None else "snapshots alone" if save else "none"
    return {"persistence": "append-only file" if info.get("aof_enabled") else snapshots}
