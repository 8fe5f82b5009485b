"""`asyncbucket demo`: the same agents under the same limits, without asyncbucket and with it.

The load is LlamaIndex agents with a tool, and batches of embeddings, all at once. The same code runs in
both halves; only the models differ, plain or wrapped.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Final

import httpx
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from asyncbucket.agents import agent
from asyncbucket.cli import DONE, FAILED, interrupts_blocked, options
from asyncbucket.cli.ui import Bar, Panel, Screen, silenced
from asyncbucket.engine.cost import Cost
from asyncbucket.engine.limits import Limit
from asyncbucket.engine.wording import named, one_line
from asyncbucket.limiter import Limiter
from asyncbucket.plan.drive import percent

if TYPE_CHECKING:
    from asyncbucket.testing import RateLimitedProvider

#: The provider's limits hold over windows of this length, unless the demo is too short.
_WINDOW: Final = 6.0
#: The fewest windows that the paced run takes; with fewer, only the start would be visible.
_MIN_WINDOWS: Final = 4
_RPM: Final = 600
_CONCURRENCY: Final = 60
#: One call in this many is a batch of embeddings; an agent makes two calls, around its tool.
_CALLS_PER_BATCH: Final = 12
CALLS_PER_AGENT: Final = 2
#: More than a call takes, so that requests bind.
_TOKENS_PER_CALL: Final = 250
_TEXTS_PER_BATCH: Final = 10
#: The range of seconds that the provider takes for a reply, and the reply's tokens.
_LATENCY: Final = (0.2, 0.6)
_REPLY_TOKENS: Final = 40
#: Seconds between two plain lines of progress.
_LINE_INTERVAL: Final = 2.0
#: How many agents start before the loop gets a break; each costs some milliseconds of CPU.
_STARTS_BEFORE_BREAK: Final = 4
_CITIES: Final = ("Lima", "Oslo", "Accra", "Perth", "Quito", "Turin", "Kyoto", "Dakar")

Job = Callable[[], Awaitable[object]]


def demo(
    *,
    rpm: Annotated[int, options.count("The provider's limit, in requests a minute.")] = _RPM,
    seconds: Annotated[
        float,
        typer.Option(
            min=2, max=3600, metavar="S", help="About how long the paced run takes, at most."
        ),
    ] = 24.0,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --seconds 6.")] = False,
) -> None:
    """Run agents under a provider's limits, with and without pacing.

    The provider is bundled: it runs on this machine, costs nothing, and answers 429 above its limits.

    Examples:
        asyncbucket demo
        asyncbucket demo --quick
        asyncbucket demo --rpm 2400
    """
    scenario = scenario_of(6.0 if quick else seconds, rpm=rpm)
    limiter = Limiter(scenario.requests, scenario.tokens, concurrency=_CONCURRENCY)
    runs = [Trial(scenario=scenario), Trial(scenario=scenario, limiter=limiter)]
    console = Console(highlight=False)
    with silenced():
        console.print(f"{scenario}\nloading LlamaIndex ...", markup=False)
        for run in runs:
            with Screen(console) as screen:
                run_once(run, screen)
            screen.say(str(run.panel()))
    _show(console, runs)
    raise typer.Exit(FAILED if runs[-1].failed else DONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is run.

    Attributes:
        agents: how many run at once.
        batches: how many batches of embeddings run beside them.
        requests: what the provider allows in a window; asyncbucket is told the same.
        tokens: the same for tokens.
    """

    agents: int
    batches: int
    requests: Limit
    tokens: Limit

    def __str__(self) -> str:
        return (
            f"{self.agents:,} LlamaIndex agents with a tool, {self.batches:,} batches of embeddings, all "
            f"at once;\na bundled provider allows {self.requests}, {self.tokens}\n"
        )


def scenario_of(seconds: float = 24.0, *, rpm: int = _RPM) -> Scenario:
    """Return a scenario with as many calls as the provider lets pass in ``seconds``."""
    window = round(min(_WINDOW, seconds / _MIN_WINDOWS), 3)
    requests = max(1, round(rpm * window / 60))
    calls = rpm * seconds / 60
    batches = max(1, round(calls / _CALLS_PER_BATCH))
    return Scenario(
        agents=max(1, round((calls - batches) / CALLS_PER_AGENT)),
        batches=batches,
        requests=Limit("requests", requests, per=window),
        tokens=Limit("tokens", max(2, requests) * _TOKENS_PER_CALL, per=window),
    )


@dataclass(slots=True, kw_only=True)
class Trial:
    """What one run has done so far."""

    scenario: Scenario
    #: None without asyncbucket.
    limiter: Limiter | None = None
    #: It counts what it sees.
    provider: "RateLimitedProvider" = field(init=False)
    agents_finished: int = 0
    #: How often each kind of error ended an agent or a batch; the first failed call ends one.
    failures: Counter[str] = field(default_factory=Counter[str])
    started_ns: int = 0
    ended_ns: int = 0

    def __post_init__(self) -> None:
        from asyncbucket.testing import RateLimitedProvider

        self.provider = RateLimitedProvider(
            rpm=self.scenario.requests.units,
            tpm=self.scenario.tokens.units,
            minute=self.scenario.requests.per,
            charge="usage",
            latency=_LATENCY,
            reply_tokens=_REPLY_TOKENS,
        )

    @property
    def name(self) -> str:
        """Its name on the screen and in the report."""
        return "without asyncbucket" if self.limiter is None else "with asyncbucket"

    @property
    def failed(self) -> int:
        """Calls that failed for good, after the client's own retries."""
        return self.failures.total()

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran; 0 before it starts."""
        if not self.started_ns:
            return 0.0
        return ((self.ended_ns or time.monotonic_ns()) - self.started_ns) * 1e-9

    def figures(self) -> dict[str, str]:
        """Return what is shown of it by name."""
        seen, limit = self.provider.statistics(), self.scenario.requests
        answered = seen.admitted - seen.in_flight - seen.disconnected
        allowed = limit.units * self.seconds / limit.per
        share = min(1.0, seen.admitted / allowed) if allowed else 0.0
        waits = {} if self.limiter is None else self.limiter.statistics().waits
        means = (
            f"{wait.seconds / wait.count:.1f} s for {named(each)}" for each, wait in waits.items()
        )
        return {
            "agents finished": f"{self.agents_finished:,} of {self.scenario.agents:,}",
            "calls": f"{answered + self.failed:,}",
            "HTTP requests, retries included": f"{seen.requests:,}",
            "429s": f"{seen.refused:,}",
            "failed": f"{self.failed:,}",
            "wall time": f"{self.seconds:.1f} s",
            "limit used while it ran": percent(share),
            "mean wait": "; ".join(means) or "-",
        }

    def panel(self) -> Panel:
        """Return what is shown while it runs."""
        figures = self.figures()
        done = self.agents_finished / self.scenario.agents
        bar = Bar(f"{figures['agents finished']} agents", done)
        facts = tuple(f"{figures[each]} {each}" for each in ("calls", "429s", "failed"))
        took = figures["wall time"] if self.ended_ns else f"{self.seconds:.0f} s"
        return Panel(f"{self.name}, {took}", (bar,), facts)


def run_once(run: Trial, screen: Screen) -> None:
    """Run the agents once, from the provider's start to its end."""
    try:
        with interrupts_blocked():
            run.provider.start()
        asyncio.run(_drive(run, screen))
    finally:
        run.provider.stop()


async def _drive(run: Trial, screen: Screen) -> None:
    # What LlamaIndex's workflows leave behind when they are cancelled stays off the screen.
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    ticker = asyncio.create_task(_tick(run, screen))
    # As the OpenAI client has it: an httpx client without limits of its own has 100.
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
    try:
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            jobs = _jobs(run, client)
            run.started_ns = time.monotonic_ns()
            async with asyncio.TaskGroup() as group:
                for number, job in enumerate(jobs, 1):
                    group.create_task(_run_job(job, run))
                    if number % _STARTS_BEFORE_BREAK == 0:
                        await asyncio.sleep(0.001)
    finally:
        run.ended_ns = time.monotonic_ns()
        ticker.cancel()


async def _tick(run: Trial, screen: Screen) -> None:
    while True:
        screen.show([run.panel()])
        await asyncio.sleep(screen.interval(_LINE_INTERVAL))


async def _run_job(job: Job, run: Trial) -> None:
    try:
        await job()
    except Exception as error:  # noqa: BLE001 - whatever ends an agent is counted and shown
        # Equal errors are counted together; providers' messages all differ.
        name = type(error).__name__
        run.failures[name if hasattr(error, "status_code") else f"{name}: {error}"] += 1


def _jobs(run: Trial, client: httpx.AsyncClient) -> list[Job]:
    """Return agents, with the batches spread evenly among them."""
    with interrupts_blocked():
        from llama_index.core.agent.workflow import FunctionAgent
        from llama_index.core.utils import get_tokenizer
        from llama_index.embeddings.openai import OpenAIEmbedding
        from llama_index.llms.openai import OpenAI

        # What the first call would load: half a second of CPU that belongs to neither run.
        import_module("openai.resources")
        get_tokenizer()
    api_base = run.provider.base_url
    common: Any = {"api_base": api_base, "api_key": "none", "async_http_client": client}
    llm: Any = OpenAI(model="gpt-4o-mini", **common)
    embed_model: Any = OpenAIEmbedding(embed_batch_size=_TEXTS_PER_BATCH, **common)
    if run.limiter is not None:
        llm, embed_model = run.limiter.wrap([llm, embed_model])

    def look_up_weather(city: str) -> str:
        """Look up the weather in a city."""
        return f"{city}: 21 degrees, a light wind from the west, no rain until the evening."

    async def ask(number: int) -> None:
        # As `Any`, because type checkers pick a deprecated overload of `run`.
        worker: Any = FunctionAgent(tools=[look_up_weather], llm=llm, timeout=None)
        city = _CITIES[number % len(_CITIES)]
        with agent(kind="traveler", expects=Cost(requests=CALLS_PER_AGENT)):
            await worker.run(user_msg=f"I am traveler {number}. What should I wear in {city}?")
        run.agents_finished += 1

    async def embed(number: int) -> None:
        lines = range(_TEXTS_PER_BATCH)
        texts = [f"Report {number}.{line}: the harbor lies in fine weather." for line in lines]
        await embed_model.aget_text_embedding_batch(texts)

    agents, batches = run.scenario.agents, run.scenario.batches
    jobs: list[tuple[float, Job]] = [(n / agents, partial(ask, n)) for n in range(agents)]
    jobs += [((n + 1) / batches, partial(embed, n)) for n in range(batches)]
    return [job for _, job in sorted(jobs, key=lambda each: each[0])]


def _show(console: Console, runs: Sequence[Trial]) -> None:
    """Print the table, and what went wrong."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column(no_wrap=True)
    for run, style in zip(runs, ("red", "green"), strict=True):
        shown.add_column(run.name, justify="right", style=style)
    columns = [run.figures() for run in runs]
    for name in columns[0]:
        shown.add_row(name, *(each[name] for each in columns))
    console.print(shown)
    for run in runs:
        for what, count in run.failures.most_common():
            console.print(f"{run.name}, {count:,} failed: {one_line(what)}", markup=False)
