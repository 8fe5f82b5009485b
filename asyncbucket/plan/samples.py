"""What a call costs and how long it takes: a number, samples, a file of them, or a function."""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeAlias

from asyncbucket.core.cost import Cost
from asyncbucket.core.wording import is_number, plain, shown

Sample: TypeAlias = float | str | Cost | Mapping[str, Any]
"""A number; a text, whose tokens are counted; a cost; or an object, as in a line of JSONL."""

Samples: TypeAlias = (
    float | str | PathLike[str] | Iterable[Sample] | Callable[[random.Random], float]
)
"""A number for every call, samples, the path of a JSONL file of them, or a function that draws one."""

Read: TypeAlias = Callable[[object], float | Cost]

_TOKENS: Final = frozenset({"tokens", "input_tokens", "output_tokens"})
_SECONDS: Final = ("latency", "seconds", "duration")


class Series:
    """Return a value for each call, the same for the same seed.

    Samples are taken in order if there are as many as calls, else drawn with replacement.
    """

    def __init__(self, given: Samples | None, name: str, read: Read) -> None:
        """Read what was ``given`` as ``name``; ``read`` turns a sample into a number or a cost."""
        self._name = name
        self._function: Callable[[random.Random], float | Cost] | None = None
        self._values: list[float | Cost | None] = [None]
        #: Whether there is anything to draw from.
        self.given = given is not None
        #: The number of samples; 0 if any number of calls may be drawn.
        self.samples = 0
        if callable(given):
            self._function = lambda rng: _checked(given(rng), name, read)
        elif isinstance(given, (str, PathLike)):
            self._take(f"{name}: {given}", "line", _lines(Path(given)), read)
        elif isinstance(given, Iterable) and not isinstance(given, (Mapping, bytes)):
            self._take(name, "sample", enumerate(given, 1), read)
        elif given is not None:
            self._values = [_checked(given, name, read)]

    def _take(
        self, name: str, each: str, samples: Iterable[tuple[int, object]], read: Read
    ) -> None:
        self._values = [_checked(sample, f"{name}, {each} {n}", read) for n, sample in samples]
        self.samples = len(self._values)
        if not self.samples:
            raise ValueError(f"{name} has no samples: give at least one")

    @property
    def is_zero(self) -> bool:
        """Whether every call has 0 of it."""
        return self._function is None and not any(self._values)

    def draw(self, calls: int, seed: str) -> Iterator[Any]:
        """Return an iterator of a value for each of ``calls`` calls."""
        rng = random.Random(f"{seed} {self._name}")  # noqa: S311 - repeatable, not secret
        values, function = self._values, self._function
        if function is not None:
            return (function(rng) for _ in range(calls))
        if len(values) == calls:
            return iter(values)
        if len(values) == 1:
            return repeat(values[0], calls)
        return (rng.choice(values) for _ in range(calls))


def _checked(sample: object, where: str, read: Read) -> float | Cost:
    try:
        return read(sample)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the samples in a file with the numbers of their lines; empty lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{path}, line {number}: not JSON: {error}; a line is a number, a text in "
                        "quotes or an object"
                    ) from error


class Tokens:
    """Read a sample of tokens; it costs what a paced call like it would be charged.

    Four characters of a text are one token, OpenAI's estimate at admission.

    Args:
        profile: how the provider charges a request's body: "openai", "anthropic", ...
    """

    def __init__(self, profile: str) -> None:
        self._profile = profile
        if profile != "openai":  # a misspelled name is an error, with or without bodies
            from asyncbucket.providers.profiles import profile_named

            profile_named(profile)

    def __call__(self, sample: object) -> float | Cost:
        """Return a number of tokens, or a cost.

        Raises:
            TypeError, ValueError: it has no tokens.
        """
        if isinstance(sample, str):
            from asyncbucket.providers.request import RequestSize

            size = RequestSize()
            size.add(sample)
            return size.by_characters
        if isinstance(sample, Cost):
            return sample
        if not isinstance(sample, Mapping):
            return _number(sample)
        amounts = {name: _number(sample[name]) for name in _TOKENS & sample.keys()}
        if amounts:
            return Cost(**amounts)
        body = sample.get("body", sample)
        if not isinstance(body, Mapping) or not body.keys() & {"messages", "prompt", "input"}:
            raise ValueError(
                f"an object with {', '.join(sorted(map(str, sample))) or 'nothing'} gives no "
                "tokens: give tokens, input_tokens and output_tokens, or a request's messages, "
                "prompt or input"
            )
        return self._of_body(body, sample.get("url"))

    def _of_body(self, body: Mapping[str, Any], url: object) -> Cost:
        from asyncbucket.providers.forecast import FORESEEN
        from asyncbucket.providers.profiles import Call, profile_named

        path = url if isinstance(url, str) else _path_of(body)
        call = Call("POST", "", path, body, foreseen=FORESEEN)
        return profile_named(self._profile).cost(call) or Cost()


def _path_of(body: Mapping[str, Any]) -> str:
    """Return where a body would be sent; embeddings and responses differ only in the model."""
    if "messages" in body:
        return "/v1/chat/completions"
    if "prompt" in body:
        return "/v1/completions"
    return "/v1/embeddings" if "embedding" in str(body.get("model")) else "/v1/responses"


def read_seconds(sample: object) -> float:
    """Return a sample of seconds, from a number or an object that has one.

    Raises:
        TypeError, ValueError: it is not a number of seconds from 0 on.
    """
    if isinstance(sample, Mapping):
        seconds = next((sample[name] for name in _SECONDS if name in sample), None)
        if seconds is None:
            raise ValueError(f"an object without {', '.join(_SECONDS)} gives no seconds")
        sample = seconds
    return _number(sample)


def _number(value: object) -> float:
    if not is_number(value):
        raise TypeError(f"expected a number, not {shown(value)}")
    if not 0 <= value < math.inf:
        raise ValueError(f"expected a finite number from 0 on, not {value!r}")
    return plain(value)
