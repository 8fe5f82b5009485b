"""A limiter in shadow holds nobody up, and says what it would have done."""

import asyncio
import gc
import os
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import pytest

from asyncbucket import AsyncBucketError, Limiter, WouldBlock
from asyncbucket.engine.events import Event, Shadowed
from asyncbucket.engine.statistics import Statistics
from asyncbucket.testing import RateLimitedProvider, VirtualTime
from tests.conftest import python

KEY: Final = {"authorization": "Bearer test-key"}
BODY: Final = {"model": "m", "messages": [{"role": "user", "content": "salve"}]}


class Arrival(NamedTuple):
    """When a call comes, how long it takes, and the tokens that it reserves and uses."""

    at: float
    took: float
    tokens: int = 1
    used: int = 1
    child: str = ""
    priority: int = 0
    #: After how many seconds it is cancelled; and whether it is settled only when it is over.
    patience: float | None = None
    settles_late: bool = False


def arrivals(
    seed: int, calls: int, seconds: float, most: int, **more: Callable[[random.Random], Any]
) -> list[Arrival]:
    rng = random.Random(seed)
    return [
        Arrival(
            rng.uniform(0, seconds),
            rng.uniform(0.5, 3),
            rng.randrange(1, most),
            rng.randrange(1, most),
            **{name: draw(rng) for name, draw in more.items()},
        )
        for _ in range(calls)
    ]


async def play(
    limiter: Limiter, load: list[Arrival], children: Mapping[str, Any]
) -> tuple[list[float], int]:
    """Return how long calls waited, and how many failed."""
    waits, failed = [], 0
    doors = {"": limiter} | {name: limiter.child(name, **terms) for name, terms in children.items()}

    async def call(each: Arrival) -> None:
        nonlocal failed
        await asyncio.sleep(each.at)
        lease = doors[each.child].acquire(tokens=each.tokens, priority=each.priority)
        try:
            async with asyncio.timeout(each.patience), lease:
                waits.append(lease.waited)
                await asyncio.sleep(each.took)
                if not each.settles_late:
                    lease.settle(tokens=each.used)
        except AsyncBucketError:
            failed += 1
        except TimeoutError:
            pass
        else:
            lease.settle(tokens=each.used)

    await asyncio.gather(*map(call, load))
    return waits, failed


#: The limiter's terms, those of its children, and the calls.
LOADS: Final[dict[str, tuple[dict[str, Any], dict[str, Any], list[Arrival]]]] = {
    "all at once": ({"rpm": 600}, {}, [Arrival(0, 1.0)] * 500),
    "tokens": ({"rpm": 600, "tpm": 60_000}, {}, arrivals(1, 150, 120, 2_000)),
    "slots": ({"concurrency": 5}, {}, arrivals(2, 120, 30, 9)),
    "everything": (
        {"rpm": 100, "tpm": 50_000, "concurrency": 4},
        {},
        arrivals(3, 150, 60, 1_500),
    ),
    "failures": (
        {"tpm": 20_000, "timeout": 20, "max_queue": 30},
        {},
        arrivals(4, 150, 120, 1_100),
    ),
    "children": (
        {"tpm": 30_000, "max_queue": 90},
        {"chat": {"weight": 3, "rpm": 90}, "batch": {"concurrency": 9}},
        arrivals(5, 150, 60, 900, child=lambda rng: rng.choice(["", "chat", "batch"])),
    ),
    "priorities": (
        {"tpm": 40_000},
        {},
        arrivals(13, 150, 60, 2_000, priority=lambda rng: rng.randrange(3)),
    ),
    "cancelled": (
        {"rpm": 60, "concurrency": 5},
        {},
        arrivals(7, 150, 60, 9, patience=lambda rng: rng.choice([None, 0.1, 0.4])),
    ),
    "one whose time is up makes way": (
        {"tpm": 100, "timeout": 20},
        {},
        [Arrival(0, 30, 60, 60), Arrival(1, 1, 60, 60), Arrival(11, 20, 10, 10)],
    ),
    "settled late": ({"tpm": 30_000}, {}, arrivals(8, 150, 60, 900, settles_late=lambda _: True)),
}


@pytest.mark.parametrize("load", LOADS)
def test_prediction_is_what_the_same_arrivals_wait_under_the_limiter(load: str) -> None:
    """Also if it is asked long after."""
    terms, children, calls = LOADS[load]
    with VirtualTime() as time:
        real = Limiter(**terms, clock=time.clock)
        waits, failed = time.run(play(real, calls, children))
        end = time.now
    with VirtualTime() as time:
        limiter = Limiter(**terms, clock=time.clock, shadow=True)
        passed, never = time.run(play(limiter, calls, children))
        assert time.now < end
        told = limiter.statistics().shadow
        time.run(asyncio.sleep(end + 1 - time.now))
        assert limiter.child("any").statistics().shadow is None
        assert limiter.statistics().shadow == told
    assert told is not None
    assert (max(passed), never) == (0.0, 0)
    assert told.calls == len(calls)
    # A timer of the loop may be a microsecond late, and then a call misses its deadline.
    assert abs(told.would_fail - failed) <= bool(failed)
    assert told.mean_wait == pytest.approx(sum(waits) / len(calls), rel=0.05 if failed else 1e-6)
    assert told.would_wait == sum(each.count for each in told.waits.values())
    for name, each in told.waits.items():
        assert abs(real.statistics().waits[name].count - each.count) <= bool(failed)


def test_what_waits_is_told_while_it_waits(virtual_time: VirtualTime) -> None:
    events: list[Event] = []
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock, shadow=True, name="openai")
    off = limiter.observe(events.append)

    async def main() -> None:
        child = limiter.child("chat", "2 requests/60s burst 2")
        leases = [child.acquire_nowait() for _ in range(4)]
        assert (limiter.statistics().in_flight, limiter.statistics().waiting) == (4, 0)
        told = limiter.statistics().shadow
        assert told is not None
        assert str(told) == (
            "3 of 4 calls would have waited, 30.7 s per call on average; 0 of 0 refusals would "
            "have been prevented"
        )
        await asyncio.sleep(2)
        for lease in leases:
            lease.release()
        assert limiter.statistics().shadow is not None
        for lease in leases:
            lease.settle(requests=1)

    virtual_time.run(main())
    would = [each.would_wait for each in events if isinstance(each, Shadowed)]
    assert would == [0.0, 1.0]
    assert "in shadow: 3 of 4 calls" in str(limiter.statistics())
    off()


def test_refusals_that_pacing_would_prevent_are_counted(virtual_time: VirtualTime) -> None:
    """The transport retries nothing and pauses nobody: it is as if there were no limiter."""

    async def refused(*, shadow: bool) -> tuple[int, Any]:
        provider = RateLimitedProvider(rpm=60, latency=0.5, clock=virtual_time.clock)
        limiter = Limiter("60 RPM burst 60", clock=virtual_time.clock, shadow=shadow)
        transport = limiter.transport(provider.mock_transport(), retries=0, learn=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x/v1") as client:
            calls = (client.post("/chat/completions", json=BODY, headers=KEY) for _ in range(100))
            replies = await asyncio.gather(*calls)
        return sum(reply.status_code == 429 for reply in replies), limiter.statistics().shadow

    without, told = virtual_time.run(refused(shadow=True))
    assert virtual_time.now < 2
    within, _ = virtual_time.run(refused(shadow=False))
    assert abs(told.prevented - (without - within)) <= 1
    assert told.refusals == without > 30


def test_prediction_follows_the_bucket_by_which_a_provider_counts() -> None:
    """Its replies prove it, in shadow as otherwise; the meter itself would see only unpaced calls."""
    rng = random.Random(1)
    load = [rng.uniform(0, 60) for _ in range(150)]

    async def played(time: VirtualTime, *, shadow: bool) -> tuple[int, Statistics]:
        provider = RateLimitedProvider(rpm=60, latency=1, clock=time.clock)
        limiter = Limiter("60 RPM", clock=time.clock, shadow=shadow)
        transport = limiter.transport(provider.mock_transport(), retries=0)
        async with httpx.AsyncClient(transport=transport, base_url="http://x/v1") as client:

            async def call(at: float) -> int:
                await asyncio.sleep(at)
                return (await client.post("/chat/completions", json=BODY, headers=KEY)).status_code

            statuses = await asyncio.gather(*map(call, load))
        return statuses.count(429), limiter.statistics()

    with VirtualTime() as time:
        without, now = time.run(played(time, shadow=True))
    with VirtualTime() as time:
        within, real = time.run(played(time, shadow=False))
    waited = sum(each.seconds for each in real.waits.values()) / len(load)
    assert now.shadow is not None
    assert now.shadow.mean_wait == pytest.approx(waited, rel=0.05)
    assert now.shadow.prevented == without - within > 30


def test_pacing_begins_when_the_shadow_ends(virtual_time: VirtualTime) -> None:
    limiter = Limiter("2 requests/60s burst 2", clock=virtual_time.clock, shadow=True)

    async def main() -> None:
        for _ in range(2):
            limiter.acquire_nowait().release()
        limiter.pause(100, reason="429")
        limiter.child("chat").leave_shadow()
        async with limiter.acquire() as lease:
            assert 60 <= lease.waited < 61

    virtual_time.run(main())
    assert limiter.statistics().shadow is None
    assert limiter.statistics().upstream_429 == 1


def test_calls_that_would_wait_book_nothing_once_pacing_begins(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock, shadow=True)

    async def main() -> None:
        leases = [limiter.acquire_nowait() for _ in range(5)]
        limiter.leave_shadow()
        await asyncio.sleep(10)
        for lease in leases:
            lease.settle(tokens=1)
            lease.release()

    virtual_time.run(main())
    now = limiter.statistics()
    assert (now.limits[0].used, now.in_flight) == (1, 0)


def test_pacing_begins_for_children_of_which_only_they_are_called(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter(concurrency=1, clock=virtual_time.clock, shadow=True)
    child = limiter.child("chat").child("fast")
    with child.acquire_nowait(), child.acquire_nowait():
        limiter.leave_shadow()
        with pytest.raises(WouldBlock):
            child.acquire_nowait()


def test_limit_that_is_lowered_holds_for_calls_that_would_wait(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", "10k TPM", clock=virtual_time.clock, shadow=True)

    async def main() -> None:
        for tokens in 1, 2_000, 100:
            limiter.acquire_nowait(tokens=tokens).release()
        limiter.reconfigure("1k TPM")
        limiter.acquire_nowait(tokens=2_000).release()

    virtual_time.run(main())
    told = limiter.statistics().shadow
    assert told is not None
    assert (told.calls, told.would_wait, told.would_fail) == (4, 1, 2)


def test_what_cannot_be_in_shadow_is_refused() -> None:
    with pytest.raises(ValueError, match="a limiter in shadow cannot use a store"):
        Limiter("1 RPM", shadow=True, store="sqlite:///x.db")
    wrong: Any = "yes"
    with pytest.raises(TypeError, match="shadow must be True or False, not 'yes'"):
        Limiter("1 RPM", shadow=wrong)


def test_file_and_environment_may_say_it(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("[asyncbucket]\nrpm = 1\nshadow = true\n")
    assert Limiter.from_toml(file).statistics().shadow is not None
    environ = {"ASYNCBUCKET_RPM": "1", "ASYNCBUCKET_SHADOW": "true"}
    assert Limiter.from_env(environ=environ).statistics().shadow is not None


def test_limiter_says_at_its_end_what_would_have_happened() -> None:
    script = """
import sys
from asyncbucket import Limiter
def main():
    limiter = Limiter("60 RPM burst 1", name="openai", shadow=True)
    unused = Limiter("60 RPM", name="unused", shadow=True)
    for _ in range(3):
        limiter.acquire_nowait().release()
main()
print("end", file=sys.stderr)
last = Limiter("60 RPM", name="last", shadow=True)
last.acquire_nowait().release()
"""
    said = re.sub(r"[0-9][.][0-9] s", "N s", python("-c", script).stderr)  # a busy machine is slow
    assert said == (
        "limiter 'openai' in shadow: 2 of 3 calls would have waited, N s per call on average; 0 of "
        "0 refusals would have been prevented\n"
        "end\n"
        "limiter 'last' in shadow: 0 of 1 calls would have waited, N s per call on average; 0 of "
        "0 refusals would have been prevented\n"
    )


def test_call_that_the_garbage_collector_ends_is_over() -> None:
    limiter = Limiter("60 RPM burst 1", concurrency=3, shadow=True)
    cycle: list[Any] = [limiter.acquire_nowait()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert limiter.statistics().in_flight == 0


def test_looking_ahead_holds_no_call_up(virtual_time: VirtualTime) -> None:
    """Under the lock it is only copied; calls that come meanwhile are not in it."""
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock, shadow=True)
    events: list[Event] = []
    limiter.observe(events.append)
    for _ in range(5):
        limiter.acquire_nowait().release()
    shadow: Any = limiter._node.bystander
    with limiter._node.pacer.lock:
        ahead = shadow.copied_locked()
    for _ in range(5):
        limiter.acquire_nowait().release()
    told = limiter.statistics().shadow
    assert told is not None
    with limiter._node.pacer.lock:
        assert (ahead.look_ahead().would_wait, told.would_wait) == (4, 9)
    assert sum(isinstance(each, Shadowed) for each in events) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_child_process_begins_with_an_empty_line() -> None:
    script = """
import os
from asyncbucket import Limiter
limiter = Limiter("60 RPM burst 1", shadow=True)
leases = [limiter.acquire_nowait() for _ in range(5)]
if os.fork() == 0:
    before = limiter.statistics().shadow
    for lease in leases:
        lease.release()
    limiter.acquire_nowait().release()
    after = limiter.statistics().shadow
    print(before.calls, before.would_wait, after.calls, flush=True)
    os._exit(0)
os.wait()
print(limiter.statistics().shadow.would_wait)
"""
    assert python("-c", script).stdout.split() == ["5", "0", "6", "4"]


def test_line_in_shadow_has_an_end(time: VirtualTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing slows the callers down, so the line would grow for as long as they are too many."""
    monkeypatch.setattr("asyncbucket.shadow._MOST_WAIT", 3)
    limiter = Limiter("1 RPM", clock=time.clock, shadow=True)
    for _ in range(9):
        limiter.acquire_nowait().release()
    told = limiter.statistics().shadow
    assert told is not None
    assert (told.calls, told.would_wait, told.would_fail) == (9, 3, 5)
