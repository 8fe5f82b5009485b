"""Arguments that make no sense are refused at once, by name, with the value and what is expected."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from time import monotonic
from typing import Any

import pytest

from asyncbucket import (
    Cost,
    Limiter,
    TokenBucket,
    agent,
    budget,
    deadline,
    pace,
    plan,
    priority,
    telemetry,
    tenant,
)
from asyncbucket.plan import Poisson

NAN, INF = math.nan, math.inf
NO_TIMES = [NAN, True, "5", [], b""]
NO_RATES = [0, -1, NAN, INF, True, "x", None, 1e-300]
NO_SLOTS = [0, -1, 1.5, NAN, True, "5", [1, 2]]
NO_BOUNDS = [(1,), (0, 4), (1, 2, 3), (1, INF), (True, 2), (9, 2)]
SECONDS = "{name} must be a number of seconds, not {}"
WHOLE = "{name} must be a whole number of at least 0, not {}"
PRIORITY = (
    "priority must be 'interactive', 'normal', 'batch' or a whole number from -100 to 100, not {}"
)
SLOTS = '"auto" or an ascending pair of such numbers, not {}'
TTL = "slot_ttl must be a number of seconds from 0.1 to 86,400, a day, not {}"
TENANT = "a tenant must be a non-empty string, not "
CLOCK = "clock must be a callable that returns integer nano"
AMOUNT = "amount must be a whole number of at least 1 unit, not {}"
BURST = "burst must be a whole number of at least 1, not {}"
WHOLE_COST = "Cost(requests=1) is a whole cost: give no other amounts with it"
SLOT = "a call takes one slot: leave concurrency out of the cost"
UNKNOWN = "no limit counts imges: this limiter counts input_tokens, output_tokens, requests, tokens"

limiter = Limiter("5 RPM", "1k TPM")
bucket = TokenBucket(1.0, burst=5)
logging = partial(telemetry.logging, limiter)


def child(**terms: Any) -> object:
    return Limiter().child("a", **terms)


def within(context: Callable[[Any], Any]) -> Callable[[Any], None]:

    def enter(value: Any) -> None:
        with context(value):
            raise AssertionError("entered")

    return enter


def awaited(**arguments: Any) -> None:
    asyncio.run(TokenBucket(1.0, burst=5).acquire(**arguments))


def settle(tokens: Any) -> None:
    Limiter("100 TPM").acquire_nowait(tokens=50).settle(requests=0, tokens=tokens)


def items() -> Iterator[int]:
    yield 1


async def stream() -> AsyncIterator[int]:
    yield 1


def with_cost(**amounts: Any) -> object:
    return limiter.acquire(Cost(), **amounts)


#: What the error says, what is called, with which keyword if any, and with each of which values.
REFUSED: list[tuple[str, Callable[..., Any], str | None, list[Any]]] = [
    (SECONDS, limiter.acquire, "timeout", NO_TIMES),
    (SECONDS, limiter.acquire, "deadline", NO_TIMES),
    (SECONDS, awaited, "timeout", NO_TIMES),
    ("timeout must be at least 0 s, not {}; None waits for", limiter.acquire, "timeout", [-1]),
    ("a deadline must be a number of seconds, not {}", within(deadline), None, [*NO_TIMES, None]),
    ("a deadline must be at least 0 s, not {}; math.inf sets none", within(deadline), None, [-1]),
    ("a pause must be a number of seconds, not {}", limiter.pause, None, NO_TIMES),
    ("a pause must be at least 0 s, not {}; it counts from now", limiter.pause, None, [-1]),
    ("a pause must end: give a finite number of seconds", limiter.pause, None, [INF]),
    (PRIORITY, limiter.acquire, "priority", ["urgent", 101, -101, 1.0, True]),
    (PRIORITY, within(priority), None, ["urgent", 101, None]),
    (TENANT + "{}", within(tenant), None, [""]),
    (TENANT + "int", within(tenant), None, [7]),
    (TENANT + "NoneType", limiter.key, None, [None]),
    (WHOLE, limiter.per_key, "alive", [-1, None]),
    ("a child's name must be a string without a slash", limiter.child, None, ["", "a/b", "*a", 7]),
    ("name must be a string, not {}", Limiter, "name", [None, 5, b"openai"]),
    ("weight must be a number from 0.000001 to 1,000,000, not {}", child, "weight", [0, NAN, True]),
    (WHOLE, Limiter, "max_queue", [-1, 1.5, NAN, True, "5"]),
    (SLOTS, Limiter, "concurrency", [*NO_SLOTS, *NO_BOUNDS]),
    ("on_outage must be one of share, closed, open, not {}", Limiter, "on_outage", ["wait"]),
    (TTL, Limiter, "slot_ttl", [0, "5"]),
    (CLOCK, Limiter, "clock", [None, 5, "now", monotonic, str]),
    (AMOUNT, bucket.acquire_nowait, None, [0, -1, 1.0, 1.5, NAN, True, None]),
    (AMOUNT, awaited, "amount", [0, -1, 1.5, True, None]),
    ("rate must be from 1e-9 to 1e9 units a second, not {}", TokenBucket, None, NO_RATES),
    (BURST, partial(TokenBucket, 1.0), "burst", NO_RATES),
    ("a cost must be a Cost or keywords such as tokens=500, not {}", limiter.acquire, None, [5]),
    (WHOLE_COST, with_cost, "tokens", [5]),
    (WHOLE_COST, with_cost, "requests", [2]),
    (UNKNOWN, limiter.acquire, "imges", [3]),
    (UNKNOWN, limiter.acquire, None, [Cost(imges=3)]),
    ("multiple values for keyword argument 'timeout'", limiter.acquire_nowait, "timeout", [5]),
    (SLOT, Cost, "concurrency", [3]),
    (SLOT, limiter.acquire, "concurrency", [2]),
    ("a call must cost something, usually at least", Cost, "requests", [0]),
    ("tokens must be finite and not negative, not {}", settle, None, [-1, NAN, INF]),
    ("tokens must be a number, not {}", settle, None, [True]),
    ("learn() takes a Limit, such as ", limiter.learn, None, ["60 RPM"]),
    ('reason must be a string, such as "429", not {}', partial(limiter.pause, 1), "reason", [429]),
    ("paced decorates a function, not {}; amounts go by keyword", limiter.paced, None, [500]),
    ("is a generator: a call of it holds", limiter.paced, None, [items, partial(stream)]),
    ("pace() without a limit would pace nothing", partial(pace, object()), "rpm", [None]),
    ("rpm must be a whole number of at least 1", partial(pace, object()), "rpm", [0]),
    ("last must be a whole number of at least 1, not {}", limiter.trace, None, [0, 1.5]),
    ("threshold must be at least 0 s, not {}", logging, "threshold", [-1, NAN]),
    ("a rate must be a finite number of calls a second", Poisson, None, [0, INF, True]),
    ("a budget needs a cap: give e.g. usd=2.00", budget, "usd", [None]),
    ("usd must be finite and not negative, not {}", budget, "usd", [-1, NAN]),
    ("on_exceeded must be a function of", partial(budget, usd=1), "on_exceeded", [5]),
    ("an agent's name must be a non-empty string, not {}", agent, "name", [""]),
    ("an agent's kind must be a non-empty string, not int", agent, "kind", [3]),
    ("tokens must be finite and not negative, not {}", agent, "expects", [-1]),
    ("tokens must be a number, not str", agent, "expects", ["much"]),
]


@pytest.mark.parametrize(("says", "call", "name", "values"), REFUSED)
def test_invalid_argument_is_refused_with_value_and_expectation(
    says: str, call: Callable[..., Any], name: str | None, values: list[Any]
) -> None:
    for value in values:
        message = re.escape(says.replace("{name}", str(name)).replace("{}", repr(value)))
        with pytest.raises((TypeError, ValueError), match=message):
            call(value) if name is None else call(**{name: value})
    assert (limiter.statistics().admitted, limiter.children) == (0, {})


@pytest.mark.parametrize("name", ["requests", "tokens", "input_tokens", "output_tokens", "images"])
def test_invalid_amount_is_refused(name: str) -> None:
    values: list[Any] = [True, "5", [], -1, -0.1, NAN, INF]
    for value in values:
        for make in (Cost, Limiter("5 images/s").acquire):
            with pytest.raises((TypeError, ValueError), match=f"^{name} must be (a number|finite)"):
                make(**{name: value})


def test_error_does_not_show_text_given_in_place_of_number() -> None:
    """It may be a prompt passed in place of its token count."""
    prompt: Any = "a secret prompt"
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: limiter.acquire(tokens=prompt), "tokens must be a number, not str"),
        (lambda: limiter.paced(tokens=str.strip)(len)(prompt), "tokens must be a number, not str"),
        (lambda: limiter.acquire(prompt), "a cost must be a Cost or keywords .*, not str"),
        (lambda: settle(prompt), "tokens must be a number, not str"),
        (lambda: plan(latency=[prompt]), "latency, sample 1: expected a finite .*, not str"),
        (lambda: bucket.acquire_nowait(prompt), "amount must be a whole number .*, not str"),
    ]
    for refuse, says in refusals:
        with pytest.raises((TypeError, ValueError), match=f"^{says}$"):
            refuse()


def test_usual_mistakes_are_told_what_to_write() -> None:
    def ask(prompt: str, more: int = 0) -> str:
        return prompt * more

    def cost(prompt: Any) -> Any:
        return prompt + 1

    by_prompt = limiter.paced(ask, tokens=cost)
    make: Any = budget
    text: Any = "500"
    mistakes: list[tuple[Callable[[], Any], str]] = [
        (lambda: make(2.0), r"not 2.0: write e.g. budget\(usd=2.00\)"),
        (lambda: make(dollars=2), r"not dollars=: write e.g. budget\(usd=2.00\)"),
        (lambda: Limiter(rpm=text), "not '500'; a text is a limit by itself, as in Lim"),
        (lambda: by_prompt("Why?", 3), "tokens= is called with .* and does not take them .*lambda"),
        (lambda: by_prompt("Why?"), "can only concatenate str"),  # its own mistake
    ]
    for mistake, remedy in mistakes:
        with pytest.raises((TypeError, ValueError), match=remedy):
            mistake()


def test_settling_what_is_refused_changes_nothing() -> None:
    limiter = Limiter("100 TPM", "5 RPS", concurrency=2)
    lease = limiter.acquire_nowait(tokens=50)
    wrong: list[dict[str, Any]] = [{"tokens": "5"}, {"concurrency": 0}, {"token": 5}, {"images": 1}]
    for amounts in wrong:
        with pytest.raises(TypeError, match=r"must be a number|no limit counts"):
            lease.settle(requests=0, **amounts)
    assert [use.used for use in limiter.statistics().limits] == [50, 1]
