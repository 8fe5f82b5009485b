import asyncio
import functools
import re
import time
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Cost, Lease, Limit, Limiter, Statistics, TokenBucket
from asyncbucket.core.levels import observe_remaining
from asyncbucket.core.statistics import LimitUse, Waits, shares_used
from asyncbucket.testing import VirtualTime


async def test_acquire_can_be_awaited_or_entered(virtual_time: VirtualTime) -> None:
    limiter = Limiter("10 RPS burst 10", concurrency=2, clock=virtual_time.clock)
    kept = await limiter.acquire(tokens=5)
    async with limiter.acquire() as lease:
        assert limiter.statistics().in_flight == 2
        assert not lease.released
    assert lease.released
    async with kept as same:
        assert same is kept
    assert kept.released
    with limiter.acquire_nowait() as lease:
        assert not lease.released
    assert lease.released
    assert limiter.statistics().in_flight == 0


async def test_lease_takes_nothing_until_it_is_awaited_and_serves_one_call(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter("10 RPS burst 10", clock=virtual_time.clock)
    asked = limiter.acquire()
    limiter.acquire().close()
    assert limiter.statistics().admitted == 0
    lease = await asked
    for _ in "held", "over":
        with pytest.raises(RuntimeError, match=r"used already: call acquire\(\) for another"):
            await asked
        lease.release()
    assert limiter.statistics().admitted == 1


async def test_leaving_acquisition_that_was_not_entered_is_harmless(
    virtual_time: VirtualTime,
) -> None:
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    acquisition = limiter.acquire()
    await acquisition.__aexit__(None, None, None)
    acquisition.close()
    assert limiter.statistics().admitted == 0


async def test_acquisition_never_awaited_causes_warning(virtual_time: VirtualTime) -> None:
    """The warning names the caller's line; there is none if it was closed, or the limiter used."""
    limiter = Limiter("5 RPM", clock=virtual_time.clock)
    for timeout in (None, 5.0):
        with pytest.warns(RuntimeWarning, match=r"never awaited.*`await limiter\.acquire") as told:
            limiter.acquire(timeout=timeout)
        assert told[0].filename == __file__
    limiter.acquire().close()
    unborn = asyncio.create_task(limiter.acquire())
    unborn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unborn
    acquisition = limiter.acquire()
    (await acquisition).release()
    del acquisition
    limiter.acquire()


async def test_timeout_counts_from_entering(virtual_time: VirtualTime) -> None:
    limiter = Limiter("60 RPM burst 1", clock=virtual_time.clock)
    asked = limiter.acquire(timeout=1)
    await asyncio.sleep(5)
    limiter.acquire_nowait().release()
    async with asked:
        assert virtual_time.now == 6


async def test_lease_is_entered_by_one_task(virtual_time: VirtualTime) -> None:
    """A second task is refused, whether the first waits, holds the lease or has left it."""
    limiter = Limiter("1 RPS burst 1", concurrency=1, clock=virtual_time.clock)
    lease = limiter.acquire()

    async def call() -> None:
        async with lease:
            await asyncio.sleep(3)

    limiter.acquire_nowait().release()
    first = asyncio.ensure_future(call())
    for _ in "waiting", "held", "over":
        await asyncio.sleep(0.6)
        with pytest.raises(RuntimeError, match="used already"):
            await call()
        await asyncio.sleep(1)
    await first
    assert limiter.statistics().in_flight == 0


async def test_acquisition_can_be_wrapped_in_one_task_only() -> None:
    """Awaiting it in a second task fails, as with any coroutine, and gives no lease."""
    limiter = Limiter(concurrency=2)
    acquisition = limiter.acquire()
    task = asyncio.create_task(acquisition)
    assert "coro=<acquire" in repr(task)
    lease = await task
    with pytest.raises(RuntimeError, match="call acquire\\(\\) for another lease"):
        await asyncio.create_task(acquisition)
    lease.release()
    assert limiter.statistics().admitted == 1


@pytest.mark.parametrize("debug", [False, True])
def test_acquisition_is_accepted_by_asyncio_as_coroutine(*, debug: bool) -> None:
    """create_task, gather, wait_for, shield and TaskGroup take it, in debug mode, too."""
    with VirtualTime(debug=debug) as time:

        async def main() -> None:
            limiter = Limiter("1/s", clock=time.clock)
            tasks = [asyncio.create_task(limiter.acquire()) for _ in range(2)]
            await asyncio.gather(*tasks, limiter.acquire())
            await asyncio.shield(limiter.acquire())
            await asyncio.wait_for(limiter.acquire(), 5)
            async with asyncio.TaskGroup() as group:
                group.create_task(limiter.acquire())
            assert limiter.statistics().admitted == 6
            assert time.now == pytest.approx(5 * 515 / 512)

        time.run(main())


async def test_waiting_call_holds_neither_slot_nor_request(virtual_time: VirtualTime) -> None:
    limiter = Limiter("5 RPS burst 5", "100 TPM", concurrency=2, clock=virtual_time.clock)
    (await limiter.acquire(tokens=100)).release()
    waiting = asyncio.ensure_future(limiter.acquire(tokens=1))
    await virtual_time.all_blocked()
    now = limiter.statistics()
    assert (now.in_flight, now.waiting) == (0, 1)
    assert now.limits[0].used == 1
    lease = await waiting
    assert lease.waited == pytest.approx(60 * 515 / 512)
    assert lease.bound_by == "tokens"


async def test_lease_tells_what_it_waited_for(virtual_time: VirtualTime) -> None:
    """It may be requests, slots or nothing; the statistics count the waits by what bound them."""
    limiter = Limiter("1 requests/2s", concurrency=1, clock=virtual_time.clock)
    first = await limiter.acquire()
    assert (first.waited, first.bound_by) == (0.0, None)
    second = asyncio.ensure_future(limiter.acquire())
    await asyncio.sleep(5)
    first.release()
    assert (await second).bound_by == "concurrency"
    (await second).release()
    third = await limiter.acquire()
    assert (third.waited, third.bound_by) == (2 * 515 / 512, "requests")
    assert limiter.statistics().waits == {
        "concurrency": Waits(1, 5.0),
        "requests": Waits(1, pytest.approx(2 * 515 / 512)),  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    }


async def test_call_that_passes_before_pacer_looks_still_names_what_bound_it(
    virtual_time: VirtualTime,
) -> None:
    """The slot comes back in the same iteration of the loop in which the call began to wait."""
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    first = await limiter.acquire()
    second = asyncio.ensure_future(limiter.acquire())
    await asyncio.sleep(0)
    assert limiter.statistics().bound_by == "concurrency"
    first.release()
    assert (await second).bound_by == "concurrency"
    assert limiter.statistics().waits == {"concurrency": Waits(1, 0.0)}


def test_cost_object_works_in_every_kind_of_acquire(virtual_time: VirtualTime) -> None:
    limiter = Limiter("10 images/s", "500 TPM", clock=virtual_time.clock)
    cost = Cost(tokens=100, images=2)
    assert limiter.acquire_nowait(cost).cost == cost
    assert limiter.acquire_sync(cost).cost == cost
    assert virtual_time.run(keep(limiter, cost)).cost == cost
    assert [use.used for use in limiter.statistics().limits] == [6, 300]
    with pytest.raises(TypeError, match="no limit counts audio"):
        limiter.acquire(Cost(audio=2))


async def keep(limiter: Limiter, cost: Cost) -> Lease:
    """Acquire, and keep the lease."""
    return await limiter.acquire(cost)


def test_input_and_output_tokens_are_limited_separately(virtual_time: VirtualTime) -> None:
    """Where only their sum is known, each limit counts all of it."""
    limiter = Limiter("1k ITPM", "1k OTPM", "2k TPM", clock=virtual_time.clock)
    limiter.acquire_nowait(input_tokens=100, output_tokens=30)
    assert [use.used for use in limiter.statistics().limits] == [100, 30, 130]
    limiter.acquire_nowait(tokens=50)
    assert [use.used for use in limiter.statistics().limits] == [150, 80, 180]


async def test_statistics_are_frozen_snapshot(virtual_time: VirtualTime) -> None:
    """All its values are of one instant, and later calls do not change it."""
    limiter = Limiter("100 TPM", concurrency=3, name="openai", clock=virtual_time.clock)
    lease = await limiter.acquire(tokens=60)
    waiting = asyncio.ensure_future(limiter.acquire(tokens=60))
    await virtual_time.all_blocked()
    before = limiter.statistics()
    lease.settle(tokens=15)
    await waiting
    assert before == Statistics(
        name="openai",
        admitted=1,
        refused=0,
        cancelled=0,
        waiting=1,
        in_flight=1,
        concurrency=3,
        paused=0,
        upstream_429=0,
        overridden=0,
        waits={},
        refunded={},
        limits=(LimitUse(Limit("tokens", 100), used=60, available=40),),
        bound_by="tokens",
    )
    after = limiter.statistics()
    assert after.refunded == {"tokens": 45}
    assert (after.admitted, after.waiting, after.in_flight) == (2, 0, 2)
    assert after.limits[0] == LimitUse(Limit("tokens", 100), used=75, available=25)


def test_limiter_without_limits_admits_and_counts_every_call(virtual_time: VirtualTime) -> None:
    limiter = Limiter(clock=virtual_time.clock)
    for _ in range(100):
        limiter.acquire_nowait(tokens=10**9).release()
    assert limiter.statistics().admitted == 100


async def test_limiter_works_with_default_clock() -> None:
    import time

    limiter = Limiter("10 RPS")
    async with limiter.acquire(deadline=time.monotonic() + 5) as lease:
        assert lease.waited == 0


def test_limits_are_read_from_env_or_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may be in environment variables, or in a file."""
    monkeypatch.setenv("PACE_RPM", "60")
    assert Limiter.from_env("PACE_").limits == (Limit("requests", 60),)
    file = tmp_path / "asyncbucket.toml"
    file.write_text("rpm = 30\n", "utf-8")
    assert Limiter.from_toml(file).limits == (Limit("requests", 30),)


async def test_aclose_without_store_does_nothing() -> None:
    """So code need not know where its limits are kept."""
    limiter = Limiter("10 RPS")
    await limiter.aclose()
    (await limiter.acquire()).release()
    await limiter.aclose()


async def test_limiter_or_lease_entered_wrongly_is_refused_with_remedies() -> None:
    """The errors say what to write instead, where there is an event loop and where there is none."""
    limiter = Limiter("5 RPM")
    with pytest.raises(TypeError, match=r"write `async with limiter\.acquire\(\):`"):
        async with limiter:
            pass  # pragma: no cover - never entered
    both = r"write `async with limiter\.acquire.*limiter\.acquire_sync"
    with pytest.raises(TypeError, match=both), limiter.acquire():
        pass  # pragma: no cover - never entered
    assert limiter.statistics().admitted == 0


@pytest.mark.parametrize("clock", [None, 5, "now", time.monotonic, str])
def test_clock_that_does_not_return_integer_nanoseconds_is_refused(clock: Any) -> None:
    """With a clock of seconds, a minute would last for years."""
    for kind in (Limiter, functools.partial(TokenBucket, 1.0)):
        with pytest.raises(TypeError, match="clock must be a callable that returns integer nano"):
            kind(clock=clock)


@pytest.mark.parametrize("name", [None, 5, b"openai"])
def test_name_that_is_no_text_is_refused(name: Any) -> None:
    """It is shown in messages and metrics, which cannot write half a character."""
    with pytest.raises(TypeError, match=f"name must be a string, not {name!r}"):
        Limiter("5 RPM", name=name)
    told = r"text that UTF-8 can write, for logs and metrics, not '\\ud800x'$"
    with pytest.raises(ValueError, match=told):
        Limiter("5 RPM", name="\ud800x")
    with pytest.raises(ValueError, match=told):
        Limiter("5 RPM").child("\ud800x")


@pytest.mark.parametrize("parts", [{"tokens": 5}, {"requests": 2}, {"images": 3}])
def test_cost_object_together_with_amounts_is_refused(parts: dict[str, Any]) -> None:
    """One of the two would be ignored."""
    limiter = Limiter("10 images/s")
    with pytest.raises(
        TypeError, match=r"Cost\(requests=1\) is a whole cost: give no other amounts with it"
    ):
        limiter.acquire(Cost(), **parts)


@pytest.mark.parametrize(
    ("heard", "message"),
    [
        ({"remaining": float("nan")}, "remaining must be a whole number of at least 0, not nan"),
        ({"remaining": -1}, "remaining must be a whole number of at least 0, not -1"),
        ({"limit": "600"}, "limit must be a whole number of at least 0, not '600'"),
        ({"rounding": None}, "rounding must be a whole number of at least 0, not None"),
        ({"since": float("nan")}, "since must be a number of seconds, not nan"),
    ],
)
def test_observe_remaining_refuses_invalid_numbers(heard: dict[str, Any], message: str) -> None:
    """Anything else is refused before it has any effect."""
    limiter = Limiter("60 RPM")
    with pytest.raises(ValueError, match=re.escape(message)):
        observe_remaining(limiter, resource="requests", per=60, **{"remaining": 0, **heard})
    assert limiter.acquire_nowait().waited == 0


def test_learn_refuses_limit_given_as_string() -> None:
    """Texts are for people; what is learned comes from headers."""
    with pytest.raises(TypeError, match=r"learn\(\) takes a Limit, such as .*, not '60 RPM'"):
        Limiter().learn("60 RPM")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def test_repr_of_limiter_shows_name_limits_slots_and_waiting_calls(
    virtual_time: VirtualTime,
) -> None:
    clock = virtual_time.clock
    limiter = Limiter("14,400 RPD", "40k ITPM", concurrency=2, name="groq", clock=clock)
    held = [await limiter.acquire() for _ in range(2)]
    waiting = asyncio.ensure_future(limiter.acquire())
    await virtual_time.all_blocked()
    assert repr(limiter) == (
        "<Limiter 'groq', 14,400 requests per 86,400 s, 40,000 input tokens per 60 s, "
        "concurrency 2/2, 1 waiting>"
    )
    for lease in held:
        lease.release()
    (await waiting).release()
    assert repr(Limiter()) == "<Limiter 'default', 0 waiting>"


async def test_repr_of_lease_shows_state_cost_and_wait(virtual_time: VirtualTime) -> None:
    limiter = Limiter("1/s", clock=virtual_time.clock)
    await limiter.acquire()
    lease = limiter.acquire(tokens=5)
    cost = "Cost(requests=1, tokens=5, input_tokens=5, output_tokens=5)"
    assert repr(lease).startswith(f"<Lease asked {cost}")
    waiting = asyncio.ensure_future(lease)
    await virtual_time.all_blocked()
    assert repr(lease).startswith(f"<Lease waiting {cost}")
    await waiting
    assert repr(lease) == f"<Lease open {cost} waited=1.006 s bound_by=requests>"
    lease.release()
    assert repr(lease).startswith(f"<Lease released {cost}")


async def test_notebook_shows_use_waits_and_pause(virtual_time: VirtualTime) -> None:
    """Names are escaped; what does not apply is left out."""
    limiter = Limiter("2 RPS burst 1", concurrency=3, name="<key>", clock=virtual_time.clock)
    assert limiter._repr_html_().startswith("<b>&lt;key&gt;</b><br>0 admitted")
    held = [await limiter.acquire() for _ in range(2)]
    waiting = asyncio.ensure_future(limiter.acquire())
    await virtual_time.all_blocked()
    assert limiter._repr_html_() == (
        "<b>&lt;key&gt;</b><br>2 admitted · 1 waiting (requests bind) · 2 of 3 in flight · "
        "0 refused · 0 cancelled · 0 upstream 429s · waited so far: 1 for requests (0.5 s)"
        '<table><tr><td>2 requests per 1 s</td><td><meter value="1.000"></meter></td>'
        "<td>2 used, 0 available</td></tr></table>"
    )
    limiter.pause(90, reason="429")
    await virtual_time.all_blocked()
    assert "1 waiting · 2 of 3 in flight" in limiter._repr_html_()
    assert "1 upstream 429s · paused for 90 s more" in limiter._repr_html_()
    assert shares_used(limiter.statistics()) == {"rps": 1.0, "concurrency": pytest.approx(2 / 3)}
    assert shares_used(Limiter().statistics()) == {}
    waiting.cancel()
    del held


def test_lease_cannot_be_settled_before_its_call_was_admitted() -> None:
    lease = Limiter("5 RPM").acquire()
    with pytest.raises(RuntimeError, match="has not been admitted yet: await it, or enter it"):
        lease.settle(tokens=5)
    lease.close()


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"on_outage": "wait"}, "on_outage must be one of share, closed, open, not 'wait'"),
        ({"slot_ttl": 0}, "slot_ttl must be a number of seconds from 0.1 to 86,400, a day, not 0"),
        ({"slot_ttl": "5"}, "slot_ttl must be .* a day, not '5'"),
        ({"concurrency": (9, 2)}, r"concurrency=\(9, 2\) has its bounds in the wrong order"),
    ],
)
def test_invalid_terms_are_refused(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limiter("5 RPM", **terms)


def test_state_of_limiter_has_no_attributes_made_up_on_demand() -> None:
    node: Any = Limiter()._node
    assert node.meters == ()
    with pytest.raises(AttributeError, match="limit_"):
        _ = node.limit_
