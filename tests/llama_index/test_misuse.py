"""What undoes pacing is warned of once, at its line and with the remedy; nothing else is."""

import asyncio
import warnings
from typing import Any

import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.core.workflow import StartEvent, StopEvent, Workflow, WorkflowTimeoutError, step
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI

from asyncbucket import Limiter, by_loop, pace
from asyncbucket.llama_index import RateLimitedLLM, misuse

KEY = "sk-very-secret"
NATIVE = TokenBucketRateLimiter(requests_per_minute=10)


class PacedOpenAI(RateLimitedLLM, OpenAI):
    """A class written by hand."""


class Holder(CustomLLM):
    """A model that contains something else."""

    inner: Any

    @property
    def metadata(self) -> Any:
        return MockLLM().metadata

    def complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        return self.inner.complete(prompt)

    def stream_complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        return self.inner.stream_complete(prompt)


@pytest.fixture
async def client() -> Any:
    """Return a client that retries, as the SDK makes them."""
    async with AsyncOpenAI(api_key=KEY, base_url="https://llm.test/v1") as made:
        yield made


def test_native_rate_limiter_warning_points_to_callers_line() -> None:
    """However the model is paced, the warning names the caller's line."""
    limiter = Limiter("100 RPM")
    inner = OpenAI(api_key=KEY, rate_limiter=NATIVE)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        limiter.wrap(inner)
        limiter.wrap([inner])
        pace(inner, rpm=5)
        PacedOpenAI(api_key=KEY, rate_limiter=NATIVE, limiter=limiter)

    assert {str(each.message).partition(":")[0] for each in seen} == {
        "OpenAI has a rate_limiter of its own",
        "PacedOpenAI has a rate_limiter of its own",
    }
    assert [each.filename for each in seen] == [__file__] * 4


def test_retrying_client_in_model_field_causes_warning(client: AsyncOpenAI) -> None:
    """As the user's own client it stays as it is; with retry=False it is the only layer."""
    limiter = Limiter("100 RPM")

    with pytest.warns(
        UserWarning,
        match=r"Holder.inner tries again by itself \(max_retries=2\): one call may become 5 x 3 "
        r"requests, of which the limiter sees 5; make it with max_retries=0, or wrap with retry=F",
    ):
        limiter.wrap(Holder(inner=client))
    with pytest.warns(UserWarning, match=r"Holder.inner .*5 x 8"):
        limiter.wrap(Holder(inner=OpenAI(api_key=KEY, max_retries=7)))

    limiter.wrap(Holder(inner=client), retry=False)
    limiter.wrap(Holder(inner=client.with_options(max_retries=0)))
    limiter.wrap(Holder(inner=limiter.wrap(OpenAI(api_key=KEY))))


def test_retries_that_wrap_switches_off_cause_no_warning(client: AsyncOpenAI) -> None:
    """Clients of OpenAI's classes and of embeddings are ours to change."""
    limiter = Limiter("100 RPM")

    limiter.wrap(OpenAI(api_key=KEY, max_retries=9, async_openai_client=client))
    limiter.wrap(OpenAIEmbedding(api_key=KEY, max_retries=9))
    limiter.wrap(MockEmbedding(embed_dim=2))
    PacedOpenAI(api_key=KEY, max_retries=9, limiter=limiter)


async def test_new_limiter_per_request_warns_once() -> None:
    """The warning comes with the tenth such limiter for one key on one event loop."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(30):
            pace(OpenAI(model="gpt-4o-mini", api_key=KEY), rpm=500, name="openai")

    (said,) = seen
    assert said.filename == __file__
    assert str(said.message).startswith("10 limiters like <Limiter 'openai', 500 requests per 60 s")
    assert "make it once, when the program starts" in str(said.message)
    assert KEY not in str(said.message)


async def test_many_legitimate_limiters_cause_no_warning() -> None:
    """Tenants with their own keys, several models, children, or many models of one are fine."""
    one = Limiter("500 RPM")
    for number in range(30):
        pace(OpenAI(api_key=f"{KEY} {number}"), rpm=500)
        pace(OpenAI(api_key=KEY, model=f"gpt-4.{number}"), rpm=500)
        pace(OpenAI(api_key=KEY), rpm=500, name=f"{number}")
        pace(OpenAI(api_key=KEY), rpm=500 + number)
        one.wrap(OpenAI(api_key=KEY))
        one.child(f"{number}").wrap(OpenAI(api_key=KEY))
        pace(MockLLM(), rpm=500)


def test_one_limiter_per_event_loop_causes_no_warning() -> None:
    """One limiter per test is fine, as each test has its own event loop, or none."""

    async def test() -> None:
        pace(OpenAI(api_key=KEY), rpm=500)

    for _ in range(30):
        asyncio.run(test())
        pace(OpenAI(api_key=KEY), rpm=500)


async def test_number_of_remembered_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that sees any number of keys remembers a bounded number of them."""
    monkeypatch.setattr(by_loop, "_MAX_KEYS", 5)

    for number in range(50):
        pace(OpenAI(api_key=f"{KEY} {number}"), rpm=500)

    assert len(by_loop.DUPLICATE_LIMITERS._seen[asyncio.get_running_loop()]) <= 6


class Greeting(Workflow):
    """A workflow that asks a model, which may take longer than the workflow's time-out."""

    llm: Any = None

    @step
    async def write(self, ev: StartEvent) -> StopEvent:  # noqa: ARG002 - LlamaIndex's own name
        return StopEvent(result=str(await self.llm.acomplete("Greet me.")))


@pytest.mark.real_clock  # workflows use the machine's clock for their time-outs
async def test_workflow_timed_out_in_queue_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once per limiter; a call cancelled elsewhere, or early, is no mistake."""
    limiter = Limiter("1 RPM", name="slow")
    llm = Greeting.llm = limiter.wrap(MockLLM())
    await Greeting().run()
    with pytest.raises(WorkflowTimeoutError):
        await Greeting(timeout=0.1).run()
    monkeypatch.setattr(misuse, "_MIN_WAIT", 0.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(llm.acomplete("Hello."), 0.1)
    assert not caplog.messages
    for _ in range(2):
        with pytest.raises(WorkflowTimeoutError):
            await Greeting(timeout=0.1).run()
    (message,) = caplog.messages
    assert message.startswith("a call inside a workflow was cancelled when it had waited 0.")
    assert message.endswith(
        " s for limiter 'slow': if the workflow's time-out did that, it is shorter than the queue; make it "
        "with timeout=None, or run it inside asyncbucket.deadline(...), which says what binds"
    )
