"""Headers lower what is available, never raise it, and can do no harm."""

import contextlib
import re

import pytest

from asyncbucket import Limit, Limiter, WouldBlock
from asyncbucket.engine.events import BeliefChanged
from asyncbucket.http import ANTHROPIC, GROQ, OPENAI, Profile
from asyncbucket.levels import call_accepted
from asyncbucket.providers.learn import HeaderReader, read_reset
from asyncbucket.providers.profiles import profile_named
from asyncbucket.testing import VirtualClock

Reply = list[tuple[bytes, bytes]]
BOTH = ["500 RPM burst 500", "10k TPM burst 10k"]


def said(*claims: str, **more: str) -> Reply:
    """Return headers that say "NAME LEFT/LIMIT", or a part of that."""
    for name, left, limit in (re.split("[ /]", f"{claim}/")[:3] for claim in claims):
        more |= {f"remaining_{name}": left} if left else {}
        more |= {f"limit_{name}": limit} if limit else {}
    return pairs({f"X-RateLimit-{name.replace('_', '-')}": value for name, value in more.items()})


def pairs(headers: dict[str, str]) -> Reply:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def available(*limiters: Limiter) -> list[int]:
    return [use.available for limiter in limiters for use in limiter.statistics().limits]


@pytest.mark.parametrize(
    ("limits", "profile", "reply", "left"),
    [
        (BOTH, OPENAI, said("requests 40/500", "tokens 900"), [40, 900]),
        (["5 RPM burst 5"], OPENAI, said("requests 9000/999999999999999"), [5]),
        # Of the organization's count and the project's, the lower binds.
        (["10k TPM burst 10k"], OPENAI, said("tokens 5000", "project-tokens 300"), [300]),
        (["10k TPM burst 10k"], OPENAI, said("project-tokens 5000", "tokens 200"), [200]),
        (["500 RPM burst 500"], OPENAI, said("requests 499/30"), [30]),
        # The announced limit tells the window; Groq's requests mean the day.
        (["500 RPM burst 500", "10k RPD"], OPENAI, said("requests 70/10000"), [500, 70]),
        (["30 RPM burst 30", "14,400 RPD"], GROQ, said("requests 70/14400"), [30, 70]),
    ],
)
def test_headers_lower_what_is_available(
    clock: VirtualClock, limits: list[str], profile: Profile, reply: Reply, left: list[int]
) -> None:
    limiter, deaf = Limiter(*limits, clock=clock), Limiter(*limits, clock=clock)
    HeaderReader(limiter).read(reply, profile)
    HeaderReader(deaf, learn=False).read(reply, profile)
    assert available(limiter) == left
    assert available(deaf) == [limit.amount for limit in deaf.limits]
    assert [use.used for use in limiter.statistics().limits] == [0] * len(left)


def test_a_single_header_holds_calls_up_for_two_windows_at_most(clock: VirtualClock) -> None:
    limiter = Limiter("600 RPM", clock=clock)
    HeaderReader(limiter).read(said("requests 0/1", reset_requests="99999999h"), OPENAI)
    started, ends = clock.seconds, list[float]()
    for _ in range(600):
        clock.advance(limiter.explain().wait or 0.0)
        limiter.acquire_nowait().release()
        ends.append(clock.seconds - started)
    assert ends[0] == pytest.approx(60, abs=1)  # what it says comes back in a minute: one call
    assert ends[1] == pytest.approx(120, abs=1)
    assert ends[-1] <= 120 + 60


def test_rounded_anthropic_header_does_not_override_own_count(clock: VirtualClock) -> None:
    limiter = Limiter("50k ITPM burst 50k", clock=clock)
    reader = HeaderReader(limiter)
    for remaining in ("50000", "49000", "49000"):
        limiter.acquire_nowait(input_tokens=300).release()
        said = pairs({"Anthropic-Ratelimit-Input-Tokens-Remaining": remaining})
        reader.read(said, ANTHROPIC)
    assert 49_000 <= available(limiter)[0] <= 49_100


def test_late_header_subtracts_calls_sent_since_its_request(clock: VirtualClock) -> None:
    limiter = Limiter("500 RPM burst 500", clock=clock)
    reader = HeaderReader(limiter)
    limiter.acquire_nowait().release()
    reader.read(said("requests 499"), OPENAI, since=clock.seconds)
    clock.advance(1)
    start = clock.seconds
    limiter.acquire_nowait().release()
    clock.advance(1)
    for _ in range(10):
        limiter.acquire_nowait().release()
    reader.read(said("requests 498"), OPENAI, since=start)
    assert available(limiter) == [488]


def test_lower_announced_limit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    limiter, heard = Limiter("600 RPM"), list[object]()
    limiter.observe(heard.append)
    reader = HeaderReader(limiter)
    for _ in range(2):
        reader.read(said("requests 50/60"), OPENAI, since=limiter.now())
    told = "limiter 'default' is told 600 requests per 60 s, but the provider announces 60: set the lower limit"
    assert caplog.messages == [told]
    assert [event.belief for event in heard if isinstance(event, BeliefChanged)] == [
        "the provider announces 60 requests per 60 s"
    ]
    explained = str(limiter.explain())
    assert "requests allow 60 such calls a minute" in explained
    assert explained.endswith("; the provider announces 60 requests per 60 s")


def test_limiter_without_limits_learns_and_follows_announced_ones_but_not_over_its_own() -> None:
    limiter, learned = Limiter(concurrency=3), list[object]()
    limiter.observe(learned.append)
    reader = HeaderReader(limiter)

    def amounts() -> dict[str, float]:
        return {limit.resource: limit.amount for limit in limiter.limits}

    # The lowest of a window counts, once.
    for _ in range(3):
        reader.read(said("requests 400/500", "tokens /30000", "project-tokens /90000"), OPENAI)
    assert (amounts(), len(learned)) == ({"requests": 500, "tokens": 30_000}, 2)
    reader.read(said("requests /1000", "project-tokens /20000"), OPENAI)
    assert amounts() == {"requests": 1_000, "tokens": 20_000}
    limiter.reconfigure(rpm=700)
    reader.read(said("requests /2000", "tokens /50000"), OPENAI)
    assert amounts() == {"requests": 700, "tokens": 20_000}


TOGETHER = {"x-ratelimit-limit": "10", "x-tokenlimit-limit": "3000"}
FIREWORKS = ("tokens-generated /600", "tokens-cache-adjusted-prompt /15000")


@pytest.mark.parametrize(
    ("profile", "reply", "learned"),
    [
        ("azure", said("requests /20", renewalperiod_requests="10"), ["20 requests/10s"]),
        ("azure", said("requests /20"), []),
        ("azure", said("tokens /9000", renewalperiod_tokens="60"), ["9000 TPM"]),
        ("xai", said("requests /480"), ["480 RPM burst 8"]),
        ("mistral", said("req-minute /30", "tokens-minute /9000"), ["30 RPM burst 1", "9000 TPM"]),
        ("together", pairs(TOGETHER), ["600 RPM burst 10", "180k TPM burst 3000"]),
        ("fireworks", said(*FIREWORKS), ["900k ITPM", "36k OTPM"]),
        ("cerebras", said("requests-day /14400", "tokens-minute /60000"), ["14400 RPD", "60k TPM"]),
    ],
)
def test_limit_is_learned_for_its_window(profile: str, reply: Reply, learned: list[str]) -> None:
    limiter = Limiter()
    HeaderReader(limiter).read(reply, profile_named(profile))
    assert set(limiter.limits) == set(map(Limit.parse, learned))


def passing(limiter: Limiter) -> int:
    passed = 0
    with contextlib.suppress(WouldBlock):
        while passed < 1_000:
            limiter.acquire_nowait().release()
            passed += 1
    return passed


def test_a_seconds_worth_passes_at_once_until_replies_show_more(clock: VirtualClock) -> None:
    limiter, deaf = Limiter("600 RPM", clock=clock), Limiter("600 RPM", clock=clock)
    for _ in range(2):  # a second transport keeps what the first has learned
        HeaderReader(limiter).expect()
        HeaderReader(deaf, learn=False).expect()
    assert (passing(limiter), passing(deaf)) == (10, 60)


@pytest.mark.filterwarnings("ignore:10 calls of limiter .* have ended")
def test_limits_of_days_and_dollars_are_not_paced(clock: VirtualClock) -> None:
    limiter = Limiter("10k RPD", "25 USD/minute", clock=clock)
    HeaderReader(limiter).expect()
    assert passing(limiter) == 1_000


WALL = 1_796_083_200.0  # midnight at Greenwich, December 2026


@pytest.mark.parametrize(
    ("value", "seconds", "off"),
    [
        (b"12", 12, 1),
        (b"0.25", 0.25, 0.01),
        (b"20ms", 0.02, 0.01),
        (b"8.64s", 8.64, 0.01),
        (b"6m0s", 360, 0.01),
        (b"1h0m2.5s", 3_602.5, 0.01),
        (b"2026-12-01T00:00:30Z", 29.5, 1.5),
        (b"2026-12-01T01:00:00+01:00", 0, 1.5),
        *((odd, None, 0) for odd in (b"", b"soon", b"-1", b"nan", b"1e3", b"2026-02-31T00:00:00Z")),
    ],
)
def test_time_until_all_is_back_is_read(value: bytes, seconds: float | None, off: float) -> None:
    expected = None if seconds is None else (round(seconds * 1e9), round(off * 1e9))
    assert read_reset(value, WALL) == expected
    assert (read_reset(b"2126-12-01T00:00:00Z") or (0, 0))[0] > 0  # by this machine's clock


def test_what_replies_prove_is_told_and_becomes_the_law(clock: VirtualClock) -> None:
    """Of a minute's sixty, a bucket of thirty: that many at once, and no window beside it."""
    limiter, heard = Limiter("60 RPM", clock=clock), list[str]()
    limiter.observe(lambda event: heard.append(getattr(event, "belief", "")))
    reader = HeaderReader(limiter)
    reader.expect()
    used = 0
    while used < 30:
        with limiter.acquire_nowait() as lease:
            used += 1
        left = {"remaining_requests": str(30 - used), "reset_requests": f"{used}000ms"}
        own = {"requests": used}  # all are answered
        reader.read(said("requests /60", **left), OPENAI, since=clock.seconds, own=own)
        call_accepted(lease)
    assert passing(limiter) == 0
    clock.advance(30)
    assert passing(limiter) == 30
    sentence = (
        "the provider counts by a bucket of 30 requests, refilled at 60 per 60 s; learned from"
    )
    assert [each[: len(sentence)] for each in heard if each] == [sentence]
    assert sentence in str(limiter.explain())
    belief = limiter.statistics().limits[0].belief
    assert belief is not None
    assert (belief.kind, belief.size, belief.rate) == ("bucket", 30, 60)
    for more in range(60, 50, -1):
        reader.read(said(f"requests {more}/60", reset_requests="1s"), OPENAI)
    assert heard[-1] == "it is not known how the provider counts"


@pytest.mark.parametrize(
    ("reply", "left"),
    [
        (said("requests 70/5000"), [70, 450]),
        (said("requests 70/500"), [5000, 70]),
        (said("requests 70"), [70, 450]),
        (said("requests 50/90"), [5000, 50]),
    ],
)
def test_amount_tells_parent_from_child(clock: VirtualClock, reply: Reply, left: list[int]) -> None:
    """A provider knows no tenants, but may have a limit of its own for each model."""
    root = Limiter("5000 RPM burst 5000", clock=clock)
    child = root.child("gpt-4o", "450 RPM burst 450")
    HeaderReader(child).read(reply, OPENAI)
    assert available(root, child) == left


def test_child_learns_limits_only_if_no_parent_has_any() -> None:
    """A limit announced for the key would otherwise become a second one for each tenant."""
    tenant, alone = Limiter("450 RPM").child("acme"), Limiter().child("acme")
    for limiter in (tenant, alone):
        HeaderReader(limiter).read(said("requests 70/500"), OPENAI)
    assert tenant.limits == ()
    assert [limit.amount for limit in alone.limits] == [500]


ODD = ["", "nan", "inf", "-1", "1_0", "1e3", "²", "٣", "0x10", "1" * 16, "9" * 10_000, "5 5", "5\n"]


@pytest.mark.parametrize("value", [*ODD, "\xff"])
def test_hostile_value_is_ignored(value: str) -> None:
    limiter = Limiter("500 RPM burst 500")
    HeaderReader(limiter).read(said(remaining_requests=value), OPENAI)
    assert available(limiter) == [500]
