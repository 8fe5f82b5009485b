"""Headers lower what is available, never raise it, and can do no harm."""

import contextlib
import random
import time
import timeit
from email.utils import parsedate_to_datetime
from typing import Any

import pytest

from asyncbucket import Limiter, WouldBlock
from asyncbucket.http import ANTHROPIC, GROQ, OPENAI, Profile
from asyncbucket.nesting import HeldLease
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.testing import VirtualClock

MINUTE = 60_000_000_000


def available(limiter: Limiter) -> list[int]:
    """Return what is available of each limit now."""
    return [use.available for use in limiter.statistics().limits]


def said(**numbers: object) -> dict[str, object]:
    """Return headers as OpenAI names them."""
    return {f"x-ratelimit-{name.replace('_', '-')}": value for name, value in numbers.items()}


def test_remaining_header_lowers_available_units() -> None:
    limiter = Limiter("500 RPM burst 500", "10k TPM", clock=VirtualClock())

    HeaderReader(limiter).read(
        said(remaining_requests="40", limit_requests="500", remaining_tokens="900"), OPENAI
    )

    assert available(limiter) == [40, 900]
    assert [use.used for use in limiter.statistics().limits] == [0, 0]


def test_header_never_raises_user_limit() -> None:
    limiter = Limiter("5 RPM burst 5")

    HeaderReader(limiter).read(said(remaining_requests="9000", limit_requests="10000"), OPENAI)

    assert available(limiter) == [5]
    assert [limit.amount for limit in limiter.limits] == [5]


def test_lowest_of_several_remaining_headers_counts() -> None:
    limiter = Limiter("10k TPM")
    reader = HeaderReader(limiter)

    reader.read(said(remaining_tokens="5000", remaining_project_tokens="300"), OPENAI)
    assert available(limiter) == [300]
    reader.read(said(remaining_project_tokens="5000", remaining_tokens="200"), OPENAI)
    assert available(limiter) == [200]


def test_announced_limit_selects_window_of_headers() -> None:
    limiter = Limiter("500 RPM burst 500", "10k RPD burst 10000")

    HeaderReader(limiter).read(said(remaining_requests="70", limit_requests="10000"), OPENAI)

    assert available(limiter) == [500, 70]


def test_groq_request_headers_apply_to_day_limit() -> None:
    limiter = Limiter("30 RPM burst 30", "14,400 RPD burst 14400")

    HeaderReader(limiter).read(said(remaining_requests="70", limit_requests="14400"), GROQ)

    assert available(limiter) == [30, 70]


def test_rounded_anthropic_header_does_not_override_own_count() -> None:
    limiter = Limiter("50k ITPM")
    reader = HeaderReader(limiter)
    for tokens, remaining in ((300, "50000"), (300, "49000"), (300, "49000")):
        limiter.acquire_nowait(input_tokens=tokens).release()
        reader.read({"Anthropic-Ratelimit-Input-Tokens-Remaining": remaining}, ANTHROPIC)

    assert 49_000 <= available(limiter)[0] <= 49_100


def test_late_header_subtracts_calls_sent_since_its_request() -> None:
    clock = VirtualClock()
    limiter = Limiter("500 RPM burst 500", clock=clock)
    reader = HeaderReader(limiter)
    limiter.acquire_nowait().release()
    reader.read(said(remaining_requests="499"), OPENAI, since=clock.seconds)
    clock.advance(1)
    start = clock.seconds
    limiter.acquire_nowait().release()
    clock.advance(1)
    for _ in range(10):
        limiter.acquire_nowait().release()
    reader.read(said(remaining_requests="498"), OPENAI, since=start)

    assert available(limiter) == [488]


def test_limiter_without_limits_learns_and_follows_announced_ones() -> None:
    limiter = Limiter(concurrency=3)
    reader = HeaderReader(limiter)

    reader.read(said(limit_requests="500", remaining_requests="400", limit_tokens="30000"), OPENAI)
    assert [str(limit) for limit in limiter.limits] == [
        "500 requests per 60 s",
        "30,000 tokens per 60 s",
    ]
    assert available(limiter) == [50, 30_000]

    reader.read(said(limit_requests="1000"), OPENAI)
    assert limiter.limits[0].amount == 1_000

    limiter.reconfigure(rpm=700)
    reader.read(said(limit_requests="2000", limit_tokens="50000"), OPENAI)
    assert [limit.amount for limit in limiter.limits] == [700, 30_000]


@pytest.mark.parametrize("project", [100_000, 1_000_000])
def test_lowest_announced_limit_of_window_is_learned_once(project: int) -> None:
    limiter = Limiter()
    learned: list[object] = []
    limiter.observe(learned.append)
    reader = HeaderReader(limiter)
    for _ in range(3):
        reader.read(said(limit_tokens="200000", limit_project_tokens=str(project)), OPENAI)

    assert [limit.amount for limit in limiter.limits] == [min(project, 200_000)]
    assert len(learned) == 1


def passing(limiter: Limiter) -> int:
    """Return how many calls pass at once."""
    passed = 0
    with contextlib.suppress(WouldBlock):
        while passed < 1_000:
            limiter.acquire_nowait().release()
            passed += 1
    return passed


def test_first_calls_are_capped_at_half_a_slice_until_first_report() -> None:
    limiter = Limiter("600 RPM", clock=VirtualClock())
    reader = HeaderReader(limiter)
    reader.expect(OPENAI)
    assert passing(limiter) == 5

    reader.read(said(remaining_requests="595", limit_requests="600"), OPENAI)
    assert passing(limiter) == 55  # a tenth of the limit, as usual


def test_large_first_call_passes_at_once_and_next_awaits_reply() -> None:
    limiter = Limiter("30k TPM", clock=VirtualClock())
    reader = HeaderReader(limiter)
    reader.expect(OPENAI)
    assert limiter.acquire_nowait(tokens=5_000).waited == 0
    with pytest.raises(WouldBlock):
        limiter.acquire_nowait(tokens=100)

    reader.read(said(remaining_tokens="25000", limit_tokens="30000"), OPENAI)
    assert (limiter.explain(tokens=2_000).wait or 0) < 4  # the first minute is paced evenly


def test_successful_reply_without_headers_lifts_first_calls_cap() -> None:
    limiter = Limiter("600 RPM", clock=VirtualClock())
    reader = HeaderReader(limiter)
    reader.expect(OPENAI)
    reader.read({}, OPENAI, ok=False)
    assert passing(limiter) == 5  # an error page tells nothing of how a gateway counts

    reader.read({}, OPENAI)
    assert passing(limiter) == 55


def test_error_reported_by_wrapped_model_keeps_first_calls_cap() -> None:
    limiter = Limiter("600 RPM burst 600")
    reader = HeaderReader(limiter)
    reader.expect(OPENAI)
    held = HeldLease(limiter, limiter.acquire_nowait(), reader)

    held.headers_received(502, [], OPENAI)
    assert limiter.statistics().limits[0].available == 9
    held.headers_received(200, [], OPENAI)
    assert limiter.statistics().limits[0].available == 599


def test_second_transport_keeps_what_first_one_learned() -> None:
    limiter = Limiter("600 RPM burst 600", clock=VirtualClock())
    HeaderReader(limiter).expect(OPENAI)
    HeaderReader(limiter).read(said(remaining_requests="600"), OPENAI)
    HeaderReader(limiter).expect(OPENAI)

    assert available(limiter) == [600]


@pytest.mark.parametrize("learn", [True, False])
def test_first_calls_are_not_capped_for_day_limits_or_without_learning(learn: bool) -> None:  # noqa: FBT001 - a parameter
    limiter = Limiter("10k RPD", "10k TPM" if not learn else "10k ITPM", clock=VirtualClock())
    HeaderReader(limiter, learn=learn).expect(GROQ)

    assert passing(limiter) == 1_000


def test_ear_reads_at_most_one_reply_per_10_ms() -> None:
    reader = HeaderReader(Limiter("600 RPM"))
    assert reader.is_due(0.0)
    reader.read(said(remaining_requests="590"), OPENAI, since=1.0)

    assert not reader.is_due(1.009)
    assert reader.is_due(1.011)


def available_of_each(*limiters: Limiter) -> list[int]:
    """Return what is available of each limiter's only limit."""
    return [available(limiter)[0] for limiter in limiters]


def test_tenant_reply_headers_apply_to_shared_parent_limit() -> None:
    root = Limiter("450 RPM burst 450")
    tenant = root.child("acme", "100 RPM burst 100")

    HeaderReader(tenant).read(said(remaining_requests="70", limit_requests="500"), OPENAI)
    assert available_of_each(root, tenant) == [70, 100]
    HeaderReader(tenant).read(said(remaining_requests="60"), OPENAI)
    assert available_of_each(root, tenant) == [60, 100]


def test_announced_limit_tells_whether_headers_mean_parent_or_child() -> None:
    root = Limiter("5000 RPM burst 5000")
    model = root.child("gpt-4o", "450 RPM burst 450")

    HeaderReader(model).read(said(remaining_requests="70", limit_requests="500"), OPENAI)
    assert available_of_each(root, model) == [5000, 70]
    HeaderReader(model).read(said(remaining_requests="60", limit_requests="5000"), OPENAI)
    assert available_of_each(root, model) == [60, 70]
    HeaderReader(model).read(said(remaining_requests="50", limit_requests="90"), OPENAI)
    assert available_of_each(root, model) == [60, 50]


def test_child_learns_limits_only_if_no_parent_has_any() -> None:
    root = Limiter("450 RPM")
    tenant = root.child("acme")
    alone = Limiter().child("acme")
    for limiter in (tenant, alone):
        HeaderReader(limiter).read(said(remaining_requests="70", limit_requests="500"), OPENAI)

    assert tenant.limits == ()
    assert [limit.amount for limit in alone.limits] == [500]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nan",
        "inf",
        "-1",
        "1_0",
        "1e3",
        "²",
        "٣",
        "0x10",
        "1" * 16,
        "9" * 10_000,
        "5 5",
        "5\n",
        None,
        5.5,
        b"\xff",
    ],
)
def test_hostile_value_is_ignored_and_counted(value: Any) -> None:
    limiter = Limiter("500 RPM burst 500")
    reader = HeaderReader(limiter)

    reader.read(said(remaining_requests=value), OPENAI)

    assert available(limiter) == [500]
    assert reader.ignored == 1


def headers_by(chance: random.Random, profile: Profile) -> list[tuple[bytes, bytes]]:
    """Return headers of a reply as a hostile server might write them."""
    names = [name for told in profile.tells for name in (told.remaining, told.limit or "x")]
    pieces = [
        b"0",
        b"7",
        b"500",
        b"1_0",
        b"-",
        b"nan",
        b"inf",
        b" ",
        b"\xff",
        b"\x00",
        b"e9",
        b"9" * 70,
    ]
    return [
        (
            chance.choice([str.upper, str.lower])(chance.choice(names)).encode(),
            chance.choice([b"", chance.randbytes(chance.randrange(9))]).join(
                chance.choices(pieces, k=chance.randrange(4))
            ),
        )
        for _ in range(chance.randrange(8))
    ]


@pytest.mark.heavy
@pytest.mark.parametrize("profile", [OPENAI, ANTHROPIC, GROQ], ids=lambda p: p.name)
def test_fuzzed_headers_raise_nothing_and_are_cheap_to_read(profile: Profile) -> None:
    chance = random.Random(profile.name)
    replies = [headers_by(chance, profile) for _ in range(20_000)]
    limiter = Limiter("500 RPM", "100k TPM", "50k ITPM", "8k OTPM", "14k RPD")
    readers = HeaderReader(limiter), HeaderReader(Limiter())
    start = time.process_time()

    for reply in replies:
        for reader in readers:
            reader.read(reply, profile, since=time.monotonic())

    ours = (time.process_time() - start) / (2 * sum(map(len, replies)))
    date = "Sat, 31 Jan 2026 12:01:00 GMT"
    theirs = timeit.timeit(lambda: parsedate_to_datetime(date), number=1000) / 1000
    assert ours < 5 * theirs
    assert readers[0].ignored > 10_000
    for use in limiter.statistics().limits:
        assert use.used == 0
        assert use.available <= use.limit.amount
