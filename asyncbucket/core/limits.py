"""Limits: an amount per window, how people write them, and what they mean."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Self, TypeAlias

from asyncbucket.core.errors import LimitSyntaxError
from asyncbucket.core.wording import counted, is_number, plain, written_out

#: What identifies a limit within a limiter: its resource, and its window in seconds.
Key: TypeAlias = tuple[str, float]

_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_RESOURCES: Final = {"r": "requests", "t": "tokens", "it": "input_tokens", "ot": "output_tokens"}
#: Other words for resources. Without them, a limit of "request", or of "r" in "10r/s", would be a
#: limit that no call counts against.
_OTHER_WORDS: Final = {
    **dict.fromkeys(("requests", "request", "req", "reqs", "r", "call", "calls"), "requests"),
    **dict.fromkeys(("tokens", "token"), "tokens"),
    "input_token": "input_tokens",
    "output_token": "output_tokens",
}
#: A name that is this similar (of 1) to one of these is taken for a typing error.
_NEAR: Final = 0.8
_OFTEN_MISSPELLED: Final = {"tok": "tokens"} | {
    word: meant
    for word, meant in _OTHER_WORDS.items()
    if word.startswith(("request", "token", "input", "output"))
}
_PREFIXES: Final = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}

#: Windows, in seconds.
_SHORTEST: Final = 1e-3
_LONGEST: Final = 400 * 86_400
#: From this window on, limits of requests are not paced unless ``burst`` says so.
_UNPACED_FROM: Final = 3_600
#: The most units in one of them.
_LARGEST: Final = 1e18

#: The keyword forms, such as ``rpm=500`` for ``"500 RPM"``: resource and window in seconds.
KEYWORDS: Final = {
    "rps": ("requests", 1),
    "rpm": ("requests", 60),
    "rph": ("requests", 3_600),
    "rpd": ("requests", 86_400),
    "tpm": ("tokens", 60),
    "tpd": ("tokens", 86_400),
    "itpm": ("input_tokens", 60),
    "otpm": ("output_tokens", 60),
}

# A comma only separates thousands: whoever writes "2,5k" means 2,500, not 25,000.
_NUMBER: Final = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9][0-9_]{0,30})(?:\.[0-9]{1,30})?[kmb]?"
_AMOUNT: Final = rf"(?P<amount>{_NUMBER})"
_BURST: Final = rf"(?:\s+burst\s+(?P<burst>{_NUMBER}))?"
_EVERY: Final = r"(?P<every>[0-9]{1,3}(?:,[0-9]{3}){1,2}|[0-9]{1,9})?"
_SHORT: Final = re.compile(rf"{_AMOUNT}\s*(?P<resource>r|[io]?t)p(?P<unit>[smhd]){_BURST}")
_LONG: Final = re.compile(
    rf"{_AMOUNT}\s*(?P<resource>[a-z_]+)?\s*(?:/|\bper\b)\s*{_EVERY}\s*"
    rf"(?P<unit>s|sec|seconds?|m|min|minutes?|h|hours?|d|days?){_BURST}"
)
_SYNTAX: Final = (
    'write e.g. "500 RPM", "200k TPM", "10/s", "100 requests/minute", "3 images/10s", '
    'with "burst 20" at the end if wanted'
)


@dataclass(frozen=True, slots=True)
class Limit:
    """Allow ``amount`` units of ``resource`` in every window of ``per`` seconds.

    The limit holds in *every* sliding window of that length. ``burst`` paces it as well: at most
    ``burst`` units at once, refilled at ``amount / per``. By default, requests are paced with a
    burst of a tenth (at least 1), so that fan-outs do not come in minute-long waves; windows of an
    hour or more and other resources are not paced. ``burst=amount`` switches pacing off.

    Raises:
        LimitSyntaxError: the resource looks like a misspelled one, an amount or burst is not a whole number of units from 1 to 1e18, the
            window is not from 0.001 s to 400 days, or the burst is above the amount.
    """

    resource: str
    amount: int
    per: float = 60
    burst: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is not a limit; fill in the default burst."""
        if not isinstance(self.resource, str) or not self.resource.isidentifier():
            raise LimitSyntaxError(
                f"a resource must be a name such as requests, not {self.resource!r}"
            )
        if self.resource == "concurrency":
            raise LimitSyntaxError("concurrency has no window: pass concurrency=... instead")
        object.__setattr__(self, "resource", _read_resource(self.resource))
        object.__setattr__(self, "amount", _units(self.amount, f"limit of {self.resource}"))
        if not is_number(self.per) or not _SHORTEST <= self.per <= _LONGEST:
            raise LimitSyntaxError(
                f"a window must last from 0.001 to 34,560,000 seconds (400 days), not {self.per!r}"
            )
        object.__setattr__(self, "per", plain(self.per))
        if self.burst is None:
            if self.resource == "requests" and self.per < _UNPACED_FROM:
                object.__setattr__(self, "burst", max(1, self.amount // 10))
            return
        object.__setattr__(self, "burst", _units(self.burst, "burst"))
        if self.burst > self.amount:
            raise LimitSyntaxError(
                f"a burst of {self.burst:,} is above the limit of {self}: lower the burst or raise "
                f"the limit"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a limit as people write it: ``"500 RPM"``, ``"14,400 RPD"``, ``"3 images/10s"``.

        Upper and lower case are the same, also in the resource's name.

        Raises:
            LimitSyntaxError: the text is not a limit; the message shows how limits are written.
        """
        if not isinstance(text, str):
            raise LimitSyntaxError(f"a limit must be a string or a Limit, not {text!r}; {_SYNTAX}")
        written = text.strip().lower()
        match = _SHORT.fullmatch(written) or _LONG.fullmatch(written)
        if match is None:
            raise LimitSyntaxError(f"{text!r} is not a limit; {_SYNTAX}")
        resource = match["resource"] or "requests"
        every = int((match.groupdict().get("every") or "1").replace(",", ""))
        return cls(
            _RESOURCES.get(resource, resource) if match.re is _SHORT else resource,
            _read_number(match["amount"], text),
            per=every * _SECONDS[match["unit"][0]],
            burst=_read_number(match["burst"], text) if match["burst"] else None,
        )

    @property
    def window(self) -> int:
        """The window in nanoseconds."""
        return round(self.per * 1_000_000_000)

    @property
    def key(self) -> Key:
        """What identifies it within a limiter: resource and window."""
        return self.resource, self.per

    @property
    def keyword(self) -> str | None:
        """The keyword that sets this limit, such as ``rpm``, if there is one."""
        return next((word for word, what in KEYWORDS.items() if what == self.key), None)

    @property
    def label(self) -> str:
        """Its label in metrics, independent of the amount: ``rpm``, or ``images/10s``."""
        return self.keyword or f"{self.resource}/{self.per:.9g}s"

    def __str__(self) -> str:
        return f"{counted(self.amount, self.resource)} per {written_out(self.per)} s"


def read_limits(limits: Iterable[str | Limit], keywords: Mapping[str, Any]) -> list[Limit]:
    """Return the limits given as texts, objects and keywords such as ``rpm=500``, in that order.

    Raises:
        LimitSyntaxError: one of them is not a limit, two limit the same resource over the same window,
            or a keyword is not one of ``KEYWORDS``.
    """
    found = [limit if isinstance(limit, Limit) else Limit.parse(limit) for limit in limits]
    for keyword, amount in keywords.items():
        if keyword not in KEYWORDS:
            known = ", ".join(KEYWORDS)
            raise LimitSyntaxError(f"{keyword}= is not a limit; known: {known}, concurrency")
        if amount is not None:
            resource, per = KEYWORDS[keyword]
            found.append(Limit(resource, _units(amount, keyword), per=per))
    seen: dict[Key, Limit] = {}
    for limit in found:
        earlier = seen.setdefault(limit.key, limit)
        if earlier is not limit:
            raise LimitSyntaxError(f"two limits for one window: {earlier} and {limit}; keep one")
    return found


def _read_resource(name: str) -> str:
    """Return the resource that is meant; refuse one that looks like a typing error."""
    if name in _RESOURCES.values():
        return name
    meant = _OTHER_WORDS.get(name)
    if meant is None:
        import difflib  # only limits of other resources come here

        for near in difflib.get_close_matches(name, _OFTEN_MISSPELLED, n=1, cutoff=_NEAR):
            raise LimitSyntaxError(
                f"nothing pays for a limit of {name!r}: did you mean {_OFTEN_MISSPELLED[near]}?"
            )
    return meant or name


def read_amount(text: str) -> int:
    """Return a number written as in limits: ``500``, ``14,400``, ``200k``.

    Raises:
        LimitSyntaxError: it is not a number from 1 on.
    """
    return Limit.parse(f"{text} requests/s").amount


def _read_number(number: str, text: str) -> int:
    """Read a number such as ``14,400`` or ``1.5k``; ``text`` is the limit that contains it."""
    digits = re.sub("[,_]", "", number)
    prefix = digits.lstrip("0123456789.")
    exact = Fraction(digits.removesuffix(prefix)) * _PREFIXES[prefix]
    if exact.denominator != 1:
        raise LimitSyntaxError(f"{text!r} is not a whole number of units; {_SYNTAX}")
    return int(exact)


def _units(value: float, what: str) -> int:
    """Return ``value`` if it is a whole positive number of units."""
    if not is_number(value) or not 1 <= value < float("inf") or value != int(value):
        raise LimitSyntaxError(f"{what} must be a whole number of at least 1, not {value!r}")
    if value > _LARGEST:
        raise LimitSyntaxError(f"{what} must be at most {_LARGEST:.0e}; leave it out for no limit")
    return int(value)
