"""Headers lower what is available, never raise it, and can do no harm."""

import contextlib
import re

import pytest

from asyncbucket import Limit, Limiter, WouldBlock
from asyncbucket.http import ANTHROPIC, GROQ, OPENAI, Profile
from asyncbucket.providers.learn import HeaderReader
from asyncbucket.providers.profiles import profile_named
from asyncbucket.testing import VirtualClock

Reply = list[tuple[bytes, bytes]]


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
        (
            ["500 RPM burst 500", "10k TPM"],
            OPENAI,
            said("requests 40/500", "tokens 900"),
            [40, 900],
        ),
        (["5 RPM burst 5"], OPENAI, said("requests 9000/999999999999999"), [5]),
        # Of the organization's count and the project's, the lower binds.
        (["10k TPM"], OPENAI, said("tokens 5000", "project-tokens 300"), [300]),
        (["10k TPM"], OPENAI, said("project-tokens 5000", "tokens 200"), [200]),
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


def test_rounded_anthropic_header_does_not_override_own_count(clock: VirtualClock) -> None:
    limiter = Limiter("50k ITPM", clock=clock)
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


def test_first_calls_are_capped_below_half_a_slice_until_a_reply(clock: VirtualClock) -> None:
    """How the provider counts is unknown before; a reply without headers says: as the user does."""
    for reply in (said("requests 595/600"), said()):
        limiter = Limiter("600 RPM", clock=clock)
        reader = HeaderReader(limiter)
        reader.expect(OPENAI)
        assert passing(limiter) == 3
        reader.read([], OPENAI, ok=False)  # an error page tells nothing
        assert passing(limiter) == 0
        reader.read(reply, OPENAI)
        HeaderReader(limiter).expect(OPENAI)  # a second transport keeps what the first has learned
        assert passing(limiter) == 57  # a tenth of the limit, as usual


@pytest.mark.filterwarnings("ignore:100 calls have passed limiter")
@pytest.mark.parametrize("learn", [True, False])
def test_day_limits_and_deaf_readers_cap_no_first_call(clock: VirtualClock, *, learn: bool) -> None:
    limiter = Limiter("10k RPD", "10k ITPM" if learn else "10k TPM", clock=clock)
    HeaderReader(limiter, learn=learn).expect(GROQ)
    assert passing(limiter) == 1_000


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
