"""What a call costs and how long it takes: a number, samples, a file of them, or a distribution."""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

#: The default profile is known to exist without loading anything.
_PROFILE: Final = "openai"
_TOKENS: Final = frozenset({"tokens", "input_tokens", "output_tokens"})
_SECONDS: Final = ("latency", "seconds", "duration")


class Series:
    """Return a value for each call, the same for the same seed.

    Samples are taken in order if there are as many as calls, else drawn with replacement.
    """

    def __init__(self, given: Samples | None, name: str, read: Read) -> None:
        """Read what was ``given`` as ``name``; ``read`` turns a sample into a number or a cost."""
        self._draw: Callable[[random.Random], float] | None = None
        self._values: Sequence[float | Cost] | None = None
        #: The value of every call, if it is `constant`; None if nothing was given.
        self.value: float | Cost | None = None
        self._name = name
        self._read = read
        if given is None:
            return
        if callable(given):
            self._draw = given
        elif isinstance(given, (str, PathLike)):
            self._values = _read_file(Path(given), name, read)
        elif isinstance(given, Iterable) and not isinstance(given, (Mapping, bytes)):
            self._values = [
                _read(sample, f"{name}, sample {n}", read) for n, sample in enumerate(given, 1)
            ]
        else:
            self.value = _read(given, name, read)
        if self._values is not None and not self._values:
            where = f"{name}: {given}" if isinstance(given, (str, PathLike)) else name
            raise ValueError(f"{where} has no samples: give at least one")

    @property
    def given(self) -> bool:
        """Whether there is anything to draw from."""
        return not (self._draw is None and self._values is None and self.value is None)

    @property
    def constant(self) -> bool:
        """Whether every call has the same value."""
        return self._draw is None and self._values is None

    def __len__(self) -> int:
        """Return the number of samples; 0 if any number of calls may be drawn."""
        return 0 if self._values is None else len(self._values)

    def draw(self, calls: int, seed: str) -> Iterator[Any]:
        """Yield a value for each of ``calls`` calls."""
        rng = random.Random(f"{seed} {self._name}")  # noqa: S311 - repeatable, not secret
        values, draw = self._values, self._draw
        if values is not None:
            return (
                iter(values) if len(values) == calls else (rng.choice(values) for _ in range(calls))
            )
        if draw is not None:
            return (_read(draw(rng), self._name, self._read) for _ in range(calls))
        return (self.value for _ in range(calls))


def _read(sample: object, where: str, read: Read) -> float | Cost:
    try:
        return read(sample)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _read_file(path: Path, name: str, read: Read) -> list[float | Cost]:
    """Return the samples in a file, one per line; empty lines are skipped."""
    values: list[float | Cost] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                sample = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where}: not JSON: {error}; a line is a number, a text in quotes or an object"
                ) from error
            values.append(_read(sample, f"{name}: {where}", read))
    return values


class Tokens:
    """Read a sample of tokens; it costs what a paced call like it would be charged.

    Args:
        count: counts the tokens of a text; by default four characters are one, OpenAI's estimate at
            admission.
        profile: how the provider charges a request's body: "openai", "anthropic", ...
    """

    def __init__(self, *, count: Callable[[str], int] | None, profile: str) -> None:
        if count is not None and not callable(count):
            raise TypeError(
                f"count_tokens must be a function from a text to its tokens, not {shown(count)}"
            )
        self._count = count
        self._profile = profile
        if profile != _PROFILE:  # a misspelt name is an error, with or without bodies
            from asyncbucket.providers.profiles import profile_named

            profile_named(profile)

    def __call__(self, sample: object) -> float | Cost:
        """Return a number of tokens, or a cost.

        Raises:
            TypeError, ValueError: it has no tokens.
        """
        if isinstance(sample, str):
            return self._of_text(sample)
        if isinstance(sample, Cost):
            return sample
        if isinstance(sample, Mapping):
            return self._of_object(sample)
        return _number(sample)

    def _of_text(self, text: str) -> int:
        if self._count is not None:
            return self._count(text)
        from asyncbucket.providers.request import RequestSize

        size = RequestSize()
        size.add(text)
        return size.by_characters

    def _of_object(self, line: Mapping[str, Any]) -> Cost:
        """Return the cost of amounts, of a request's body, or of a line of a batch file."""
        amounts = {name: line[name] for name in _TOKENS & line.keys()}
        if amounts:
            return Cost(**{name: _number(amount) for name, amount in amounts.items()})
        body = line.get("body", line)
        if not isinstance(body, Mapping) or not body.keys() & {"messages", "prompt", "input"}:
            raise ValueError(
                f"an object with {', '.join(sorted(map(str, line))) or 'nothing'} gives no tokens: give "
                "tokens, input_tokens and output_tokens, or a request's messages, prompt or input"
            )
        return self._of_body(body, line.get("url"))

    def _of_body(self, body: Mapping[str, Any], url: object) -> Cost:
        from asyncbucket.providers.forecast import FORESEEN
        from asyncbucket.providers.profiles import Call, profile_named

        profile = profile_named(self._profile)
        path = url if isinstance(url, str) else _path_of(body)
        cost = profile.cost(Call("POST", "", path, body, foreseen=FORESEEN))
        return Cost() if cost is None else cost


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
