"""Run the calls of several tenants: through real limiters, on virtual time.

Who goes next among tenants does not follow from one line, so here the whole machine runs: children
of a limiter, queues, pacers and leases, on an event loop whose clock jumps. That takes some 50 µs a
call. It runs in a thread of its own, because the caller may be on an event loop, and may have a
priority or a tenant that must not leak in.

Calls are handed over a few hundred ahead for each tenant: more than a pacer admits in one pass, so
a tenant that wants more is always seen to want it.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from asyncbucket.core.errors import CostExceedsLimit
from asyncbucket.plan.bounds import Bounds, cost_for
from asyncbucket.plan.drive import Call, Record

if TYPE_CHECKING:
    from asyncbucket.core.lease import Lease
    from asyncbucket.core.limiter import Limiter
    from asyncbucket.plan.load import Load

_LOOK_AHEAD: Final = 512
_NANOSECONDS: Final = 1_000_000_000


def drive_fair(bounds: Bounds, loads: "Mapping[str, Load]") -> tuple[Record, dict[str, Record]]:
    """Run every tenant's calls to their end; return what happened, in total and to each tenant."""
    result: list[tuple[Record, dict[str, Record]]] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(_run(bounds, loads))
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            failed.append(error)

    thread = threading.Thread(target=run, name="asyncbucket plan", daemon=True)
    thread.start()
    thread.join()
    for error in failed:
        raise error
    return result[0]


def _run(bounds: Bounds, loads: "Mapping[str, Load]") -> tuple[Record, dict[str, Record]]:
    from asyncbucket.testing.virtual_time import VirtualClock, VirtualTimeLoop

    clock = VirtualClock()
    root = bounds.limiter(clock)
    recorder = _Recorder(loads)
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(clock)) as runner:

        async def main() -> None:
            await asyncio.gather(
                *(
                    _Tenant(name, root.child(name), clock, recorder).run(load)
                    for name, load in loads.items()
                )
            )

        runner.run(main())
    return recorder.total, recorder.tenants


class _Recorder:
    """Record what happens, in total and to each tenant."""

    def __init__(self, names: Iterable[str]) -> None:
        self.total = Record()
        self.tenants = {name: Record() for name in names}
        self._in_flight = 0

    def admitted(self, name: str, call: Call, now: int, waited: int, bound_by: str | None) -> None:
        """Note an admission."""
        self._in_flight += 1
        self.total.peak = max(self.total.peak, self._in_flight)
        for record in (self.total, self.tenants[name]):
            record.admitted.append(now)
            record.waited.append(waited)
            record.busy += call.latency
            for resource, amount in {**call.amounts, **(call.used or {})}.items():
                record.used[resource] = record.used.get(resource, 0) + amount
            if waited and bound_by is not None:
                record.held_up[bound_by] = record.held_up.get(bound_by, 0) + waited

    def refused(self, name: str, call: Call) -> None:
        """Note a call that can never pass."""
        for record in (self.total, self.tenants[name]):
            record.refused.append(call)

    def ended(self, name: str, now: int) -> None:
        """Note the end of a call that was admitted."""
        self._in_flight -= 1
        self.total.end = self.tenants[name].end = now


class _Tenant:
    """Let the calls of one tenant come, pass and end."""

    def __init__(
        self, name: str, limiter: "Limiter", clock: Callable[[], int], recorder: _Recorder
    ) -> None:
        self._name = name
        self._limiter = limiter
        self._clock = clock
        self._recorder = recorder
        self._in_flight = 0
        self._idle = asyncio.Event()

    async def run(self, load: "Load") -> None:
        """Run all calls, and return when the last one has ended."""
        source = _Source(load)
        await asyncio.gather(*(self._serve(source) for _ in range(min(_LOOK_AHEAD, load.calls))))
        if self._in_flight:
            await self._idle.wait()

    async def _serve(self, source: "_Source") -> None:
        """Admit one call after the other; each waits for its admission in line."""
        while (upcoming := await source.next()) is not None:
            arrived, call = upcoming
            if arrived > self._clock():
                await asyncio.sleep((arrived - self._clock()) / _NANOSECONDS)
            try:
                lease = await self._limiter.acquire(cost_for(self._limiter, call))
            except CostExceedsLimit:
                self._recorder.refused(self._name, call)
                source.ended(call, self._clock())
            else:
                self._admit(lease, call, arrived, source)

    def _admit(self, lease: "Lease", call: Call, arrived: int, source: "_Source") -> None:
        now = self._clock()
        self._recorder.admitted(self._name, call, now, now - arrived, lease.bound_by)
        self._in_flight += 1
        self._idle.clear()
        loop = asyncio.get_running_loop()
        loop.call_at((now + call.latency) / _NANOSECONDS, self._end, lease, call, source)

    def _end(self, lease: "Lease", call: Call, source: "_Source") -> None:
        if call.used is not None:
            lease.settle(**call.used)
        lease.release()
        now = self._clock()
        self._recorder.ended(self._name, now)
        source.ended(call, now)
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()


class _Source:
    """Hand out calls in order of arrival, including those that follow other calls."""

    def __init__(self, load: "Load") -> None:
        self._arrivals, self._follow = load.arrivals()
        self._followers: asyncio.Queue[tuple[int, Call]] = asyncio.Queue()
        self._left = load.calls

    async def next(self) -> tuple[int, Call] | None:
        """Return the next call and when it comes; None if all have come."""
        if not self._left:
            return None
        self._left -= 1
        upcoming = next(self._arrivals, None)
        return await self._followers.get() if upcoming is None else upcoming

    def ended(self, call: Call, now: int) -> None:
        """Note that a call has ended, so that others may follow."""
        for follower in self._follow(call) if self._follow is not None else ():
            self._followers.put_nowait((now, follower))
