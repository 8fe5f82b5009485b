"""What is to be done, checked before anything begins."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from asyncbucket.cli import options
from asyncbucket.core.cost import COMMON
from asyncbucket.core.limits import Limit
from asyncbucket.core.wording import USD

#: Paths of the API by their short names.
PATHS: Final[dict[str, str]] = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "embeddings": "/v1/embeddings",
}
#: The window, in seconds, of the cap of dollars: a year and a month.
FOR_GOOD: Final = 400 * 86_400
#: Calls at once, by default.
CONCURRENCY: Final = 100
STANDARD: Final = "-"
_KEY: Final = "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Hold the options of a run.

    Attributes:
        source: a file, or ``-`` for standard input.
        out: a file, or ``-`` for standard output.
        model: put into every request; None keeps what the lines say.
        endpoint: where a plain prompt is sent.
        system: the system message before each prompt.
        max_tokens: the most tokens of a reply, if a line does not say.
        restart: start over, whatever was answered before.
        concurrency: the most calls in flight; None if the user did not say.
        max_usd: the most dollars that all runs into ``out`` may spend together.
        prices: the file of what models cost, if not what is published.
        pool: the file of several providers and their limits, instead of one's.
    """

    source: str
    out: str
    limits: tuple[Limit, ...] = ()
    concurrency: int | Literal["auto"] | None = None
    max_usd: float | None = None
    prices: Path | None = None
    pool: Path | None = None
    model: str | None = None
    endpoint: str = "chat"
    system: str | None = None
    max_tokens: int | None = None
    api_base: str = options.OPENAI
    api_key: str | None = field(default=None, repr=False)
    attempts: int = 5
    restart: bool = False

    @property
    def all_limits(self) -> tuple[Limit, ...]:
        """The limits, with the cap of dollars as one over the longest time that there is."""
        if self.max_usd is None:
            return self.limits
        return (*self.limits, Limit(USD, self.max_usd, per=FOR_GOOD))

    @property
    def out_file(self) -> Path | None:
        """The file of answers; None if they go to standard output."""
        return None if self.out == STANDARD else Path(self.out)

    @property
    def limits_file(self) -> Path | None:
        """The store that remembers what was admitted lately, also for runs on a link to ``out``."""
        return None if self.out == STANDARD else Path(f"{Path(self.out).resolve()}.limits")

    @property
    def errors_file(self) -> Path | None:
        """The file of lines without an answer; None if the answers go to standard output."""
        out = self.out_file
        return None if out is None else out.parent / f"{out.stem}.errors{out.suffix}"

    @property
    def destination(self) -> str:
        """Where requests go, in a form that may be shown: without a password in the URL."""
        return options.shown_url(self.api_base) if self.pool is None else str(self.pool)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which answers depend: with others, it is another run."""
        system = self.system and hashlib.sha256(self.system.encode()).hexdigest()[:16]
        found = {
            "model": self.model,
            "api_base": None if self.pool else self.destination,
            "pool": self.pool and self.pool.name,
            "endpoint": self.endpoint,
            "system": system,
            "max_tokens": self.max_tokens,
        }
        return {name: value for name, value in found.items() if value is not None}

    def check(self) -> None:
        """Refuse options that do not fit together.

        Raises:
            ValueError: the message says what, and the remedy.
        """
        if not self.limits and self.concurrency is None and self.pool is None:
            raise ValueError(
                "say what your key may do: --rpm and --tpm, e.g. --rpm 500 --tpm 200000; or, for a "
                "server without limits, --concurrency 20 or --concurrency auto; or, for several, --pool"
            )
        for limit in self.all_limits:  # which reads the cap, too
            if limit.resource not in COMMON:
                raise ValueError(
                    f"no request takes any {limit.resource}, so {limit} would hold up none: limit "
                    f"requests, tokens, input_tokens, output_tokens or usd"
                )
        options.check_url(self.api_base)
        if self.endpoint not in PATHS:
            raise ValueError(f"--endpoint must be one of {', '.join(PATHS)}, not {self.endpoint!r}")
        if self.source != STANDARD and not Path(self.source).is_file():
            raise ValueError(
                f"{self.source!r} is not a file that can be read: name one, or pipe the lines in and give -"
            )
        self._check_files()

    def _check_files(self) -> None:
        """Refuse files that cannot be written, and one file for two purposes: it would be lost."""
        taken = {None if self.source == STANDARD else _identity(Path(self.source))}
        for path in (self.out_file, self.limits_file, self.errors_file):
            if path is None:
                continue
            if not path.parent.is_dir():
                raise ValueError(f"{path.parent} is not a folder: make it, or give another -o")
            if path.exists() and not path.is_file():  # answers are read again
                raise ValueError(f"{path} is not a file that can be written: give another -o")
            if _identity(path) in taken:
                raise ValueError(
                    f"{path} is read or written already: give another -o, or it would be lost"
                )
            taken.add(_identity(path))


def _identity(path: Path) -> object:
    """Return what all names of a file share: links, and cases if the file system ignores case."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return path.resolve()
    return found.st_dev, found.st_ino


def api_key(api_base: str) -> str | None:
    """Return the API key in the environment.

    Raises:
        ValueError: there is none, and the provider needs one; or it cannot be sent.
    """
    key = os.environ.get(_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{_KEY} holds characters that no key has: export the key alone in it")
    if not key and api_base == options.OPENAI:
        raise ValueError(
            f"{_KEY} is not set: export your key in it, or name another provider with --api-base"
        )
    return key or None
