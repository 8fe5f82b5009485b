"""`asyncbucket run`: a file of requests or prompts in, a file of answers out, under your limits.

Here is what can be typed, checked before anything begins. `lines` are what goes in and what comes out,
`work` sends and writes, `screen` counts and shows.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from asyncbucket.cli import options
from asyncbucket.engine.cost import COMMON
from asyncbucket.engine.limits import Limit, read_limits
from asyncbucket.engine.wording import USD
from asyncbucket.settings import key_in_env

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
_KEY: Final = "OPENAI_API_KEY"
#: Options that concern one provider, not the members of a pool.
_OF_ONE_PROVIDER: Final = (
    *("rpm", "tpm", "also", "concurrency"),
    *("max_usd", "prices", "api_base"),
)


@dataclass(kw_only=True)
class Job:
    """Hold the options of a run as they are typed, and what they mean.

    Attributes:
        limits: all limits but the cap of dollars.
        base: where the provider is.
        api_key: the key in the environment, if one is needed.
    """

    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="Requests or prompts, one per line.")
    ]
    out: Annotated[Path, options.file("The file of answers, JSONL.", "--out", "-o")] = Path(
        "answers.jsonl"
    )
    model: Annotated[str | None, options.name("The model; default: what the lines say.")] = None
    # What is allowed.
    rpm: options.Rpm = None
    tpm: options.Tpm = None
    also: options.Also = None
    #: A number or ``auto``; typer knows no unions.
    concurrency: Annotated[
        Any, options.count(f"Calls at once; default: {CONCURRENCY}.", or_auto=True)
    ] = None
    max_usd: Annotated[
        float | None, options.text("Stop before the run costs more than this.", metavar="USD")
    ] = None
    prices: options.PriceFile = None
    # Where requests go, and what is in them.
    api_base: Annotated[
        str | None, options.text("Any OpenAI-compatible server; default: OpenAI.", metavar="URL")
    ] = None
    endpoint: Annotated[str, options.name("Where prompts go: chat, responses, embeddings.")] = (
        "chat"
    )
    system: Annotated[str | None, options.text("The system message before each prompt.")] = None
    max_tokens: Annotated[
        int | None, options.count("The most tokens of a reply, if the line sets none.")
    ] = None
    pool: options.PoolFile = None
    # How often, and how.
    attempts: Annotated[int, options.count("Attempts for a line, the first included.")] = 5
    dry_run: Annotated[
        bool, options.flag("Send nothing; say how long it would take.", "--dry-run")
    ] = False
    # What is shown.
    quiet: Annotated[bool, options.flag("Show nothing but errors.", "--quiet", "-q")] = False
    as_json: Annotated[bool, options.flag("Print the summary as JSON on stdout.", "--json")] = False
    limits: tuple[Limit, ...] = field(init=False)
    base: str = field(init=False)
    api_key: str | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        """Read what was typed.

        Raises:
            ValueError: it cannot be understood; the message says what, and the remedy.
        """
        self.limits = tuple(read_limits(self.also or (), {"rpm": self.rpm, "tpm": self.tpm}))
        self.base = self.api_base or os.environ.get("OPENAI_BASE_URL") or options.OPENAI

    @property
    def all_limits(self) -> tuple[Limit, ...]:
        """The limits, with the cap of dollars as one over the longest time that there is."""
        if self.max_usd is None:
            return self.limits
        return (*self.limits, Limit(USD, self.max_usd, per=FOR_GOOD))

    @property
    def limits_file(self) -> Path:
        """The store that remembers what was admitted lately, also for runs on a link to ``out``."""
        return Path(f"{self.out.resolve()}.limits")

    @property
    def errors_file(self) -> Path:
        """The file of lines without an answer."""
        return self.out.parent / f"{self.out.stem}.errors{self.out.suffix}"

    @property
    def destination(self) -> str:
        """Where requests go, in a form that may be shown: without a password in the URL."""
        return options.shown_url(self.base) if self.pool is None else str(self.pool)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which answers depend: with others, it is another run."""
        system = self.system and hashlib.sha256(self.system.encode()).hexdigest()[:16]
        api = self.pool.name if self.pool else self.destination
        return {"model": self.model, "api": api, "system": system}

    def check(self) -> None:
        """Refuse options that do not fit together; find the key.

        Raises:
            ValueError: the message says what, and the remedy.
        """
        if self.endpoint not in PATHS:
            raise ValueError(f"--endpoint must be one of {', '.join(PATHS)}, not {self.endpoint!r}")
        self._check_files()
        self._check_model()
        given = [name for name in _OF_ONE_PROVIDER if getattr(self, name) is not None]
        if self.pool is not None and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"{names} cannot go with --pool: write it into the members' tables in {self.pool}"
            )
        if not self.limits and self.concurrency is None and self.pool is None:
            raise ValueError(
                "say what your key allows: --rpm and --tpm, e.g. --rpm 500 --tpm 200000; or, for a "
                "server without limits, --concurrency 20 or --concurrency auto; or, for several, --pool"
            )
        odd = [limit for limit in self.limits if limit.resource not in COMMON]
        if odd:
            raise ValueError(
                f"{odd[0]} would hold up no request: limit {', '.join(sorted(COMMON))}"
            )
        options.check_url(self.base)
        if not (self.dry_run or self.pool):
            self.api_key = _api_key(self.base)

    def _check_files(self) -> None:
        """Refuse files that cannot be read or written, and to write what is read: it would be lost."""
        if not self.source.is_file():
            raise ValueError(
                f"{str(self.source)!r} is not a file: name a file of requests or prompts"
            )
        for path in (self.out, self.limits_file, self.errors_file):
            if path.name == "-" or (path.exists() and not path.is_file()):  # answers are read again
                raise ValueError(f"{path} is not a file that can be written: give another -o")
            if path.exists() and path.samefile(self.source):
                raise ValueError(f"{path} is read already: give another -o, or it would be lost")

    def _check_model(self) -> None:
        """Refuse a file whose first request names no model: the others won't, either."""
        from asyncbucket.cli.run.lines import NoModelError, read_request

        with self.source.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if read_request(number, line, self) is not None:
                        return
                except NoModelError:
                    raise
                except ValueError:  # counted later, as a line that can't be read
                    continue


def _api_key(api_base: str) -> str | None:
    """Return the API key in the environment.

    Raises:
        ValueError: there is none, and the provider needs one; or it cannot be sent.
    """
    if not os.environ.get(_KEY) and api_base != options.OPENAI:
        return None
    try:
        return key_in_env(_KEY)
    except ValueError:
        raise ValueError(
            f"{_KEY} must hold your key and nothing else: export it, or name a provider that needs "
            f"none with --api-base"
        ) from None


def run(**given: Any) -> None:
    """Send every line of a file to a model, under your limits.

    A line is a request of OpenAI's batch files, the body of one, or a prompt. Every answer is
    written once, as it arrives, with the custom_id and line of the request, as in OpenAI's output files.
    The key is read from OPENAI_API_KEY.
    With --pool, each request goes to whichever provider in that file can start it first.
    Killed and started again, it continues where it stopped and stays under the limits. Ctrl-C lets
    the requests under way finish; a second one drops them.

    Status: 0 when all lines are answered, 1 when some failed (the errors file says why), 2 when none
    can be, 3 when --max-usd stopped it, 130 after Ctrl-C.

    Examples:
        asyncbucket run prompts.txt -o answers.jsonl --model gpt-4o-mini --rpm 500
        asyncbucket run batch.jsonl -o out.jsonl --rpm 500 --max-usd 2.50 --dry-run
        asyncbucket run in.jsonl -o b --concurrency 9 --api-base http://localhost/v1
    """
    job = Job(**given)
    job.check()
    from asyncbucket.cli.run import work

    raise typer.Exit(work.dry_run(job) if job.dry_run else work.run(job))


options.take_from(Job, run)
