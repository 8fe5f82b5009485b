from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket import Cost, Limiter, TokenBucket, plan
from asyncbucket.core.wording import rounded

amounts = st.none() | st.integers(0, 10**6) | st.floats(0, 1e6)


def test_cost_maps_resources_to_whole_amounts() -> None:
    """One request is the default, fractions are rounded up, and only zeros are left out."""
    cost = Cost(tokens=10.1, images=3)
    assert isinstance(cost, Mapping)
    assert dict(cost) == {
        "requests": 1, "tokens": 11, "input_tokens": 11, "output_tokens": 11, "images": 3
    }  # fmt: skip
    assert cost["tokens"] == 11
    assert len(cost) == 5
    assert repr(Cost(images=0)) == "Cost(requests=1)"
    assert cost == Cost(tokens=11, images=3)
    assert "concurrency" not in cost


def test_numpy_numbers_and_fractions_are_accepted_as_amounts() -> None:
    """Token counts may come from data frames; they are kept as plain ints."""
    numpy = pytest.importorskip("numpy")
    fraction: Any = Fraction(7, 2)
    cost = Cost(tokens=numpy.int64(800), input_tokens=numpy.float32(2.5), images=fraction)
    assert cost == Cost(tokens=800, input_tokens=3, images=4)
    assert {type(amount) for amount in cost.values()} == {int}
    limiter = Limiter("1k TPM")
    limiter.acquire_nowait(tokens=numpy.int32(700)).settle(tokens=numpy.uint8(7))
    assert limiter.statistics().limits[0].used == 7
    bucket = TokenBucket(1.0, 5)
    bucket.acquire_nowait(numpy.int64(5))
    assert bucket.statistics().available == 0
    with pytest.raises(ValueError, match="tokens must be finite and not negative"):
        Cost(tokens=numpy.float32("nan"))
    with pytest.raises(TypeError, match="tokens must be a number, not bool"):
        Cost(tokens=numpy.bool_(True))


def test_tokens_default_to_sum_of_input_and_output_tokens() -> None:
    """If both parts are given, their sum counts; a missing part counts as zero."""
    assert dict(Cost(input_tokens=900, output_tokens=300)) == {
        "requests": 1, "tokens": 1200, "input_tokens": 900, "output_tokens": 300
    }  # fmt: skip
    assert dict(Cost(input_tokens=5)) == {"requests": 1, "tokens": 5, "input_tokens": 5}
    assert dict(Cost(tokens=9, output_tokens=5)) == {"requests": 1, "tokens": 9, "output_tokens": 5}


@given(amounts, amounts, amounts)
def test_amounts_of_cost_are_whole_positive_and_never_less_than_given(
    tokens: float | None, inputs: float | None, outputs: float | None
) -> None:
    cost = Cost(tokens=tokens, input_tokens=inputs, output_tokens=outputs)
    assert all(type(amount) is int and amount > 0 for amount in cost.values())
    assert cost.get("tokens", 0) >= (tokens if tokens is not None else (inputs or 0))


@pytest.mark.parametrize("name", ["requests", "tokens", "input_tokens", "output_tokens", "images"])
@pytest.mark.parametrize("value", [True, False, "", "5", [], b"5", -1, -0.1, "nan", "inf"])
def test_invalid_amount_is_refused(name: str, value: object) -> None:
    """For each resource: bools, strings, negative numbers, NaN and infinity."""
    if value in {"nan", "inf"} if isinstance(value, str) else False:
        value = float(str(value))
    with pytest.raises((TypeError, ValueError)):
        Cost(**{name: value})  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises((TypeError, ValueError)):
        Limiter("5 images/s").acquire(**{name: value})  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def test_error_names_resource_and_value() -> None:
    """They say what is expected, and what was given."""
    with pytest.raises(TypeError, match=r"^tokens must be a number, not True$"):
        Cost(tokens=True)
    with pytest.raises(ValueError, match=r"^requests must be finite and not negative, not -1$"):
        Cost(requests=-1)
    with pytest.raises(ValueError, match=r"^images must be finite and not negative, not nan$"):
        Cost(images=float("nan"))


def test_error_does_not_show_text_given_in_place_of_number() -> None:
    """It may be a prompt passed in place of its token count."""
    prompt: Any = "a secret prompt"
    limiter = Limiter("5 RPM", "1k TPM")
    with pytest.raises(TypeError, match=r"^tokens must be a number, not str$"):
        limiter.acquire(tokens=prompt)
    with pytest.raises(TypeError, match=r"^tokens must be a number, not str$"):
        limiter.paced(tokens=str.strip)(len)(prompt)
    with pytest.raises(TypeError, match=r"^a cost must be a Cost or keywords .*, not str$"):
        limiter.acquire(prompt)
    with pytest.raises(ValueError, match=r"^latency, sample 1: expected a number, not str$"):
        plan(calls=1, rpm=5, latency=[prompt])
    with pytest.raises(ValueError, match=r"^amount must be a whole number .*, not str$"):
        TokenBucket(rate=1.0).acquire_nowait(prompt)


def test_zero_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="a call must cost something: requests=1 is the usual"):
        Cost(requests=0)
    assert dict(Cost(requests=0, tokens=1))["tokens"] == 1


def test_concurrency_is_refused_in_cost() -> None:
    """Each call takes exactly one slot."""
    with pytest.raises(
        TypeError, match="a call takes one slot: concurrency is no part of its cost"
    ):
        Cost(concurrency=3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (12.34, "12.3"),
        (99.6, "99.6"),
        (3_600, "3,600"),
        (1e6, "1,000,000"),
    ],
)
def test_rounded_number_is_shown_without_exponent(value: float, text: str) -> None:
    """It has three digits, or all those before the point, and is never shown as 3.6e+03."""
    assert rounded(value) == text
