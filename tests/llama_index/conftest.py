"""What these tests share: models, records of instrumentation, and a scripted OpenAI."""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import pytest
import respx
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.anthropic import Anthropic
from llama_index.llms.azure_openai import AzureOpenAI
from llama_index.llms.openai import OpenAI, OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span_handlers import NullSpanHandler
from pydantic import BaseModel, PrivateAttr

from asyncbucket import Limiter
from asyncbucket.engine.context import Inherited, inherited
from asyncbucket.engine.events import Admitted, Event
from asyncbucket.testing import RateLimitedProvider, VirtualTime

API_BASE = "https://llm.test/v1"
KEY = "sk-very-secret"
MESSAGES = [ChatMessage("hi")]
PROMPT = PromptTemplate("Name a {thing}.")


class Person(BaseModel):
    """What structured prediction fills in."""

    name: str


def greet(name: str) -> str:
    """Greet."""
    return f"hello {name}"


TOOL = FunctionTool.from_defaults(greet)


def make_openai(**options: Any) -> OpenAI:
    usual: dict[str, Any] = {"model": "gpt-4o-mini", "api_key": "k", "api_base": API_BASE}
    return OpenAI(**usual | options)


def make_responses(**options: Any) -> OpenAIResponses:
    return OpenAIResponses(model="gpt-4o-mini", api_key="k", api_base=API_BASE, **options)


def make_azure(**options: Any) -> AzureOpenAI:
    options |= {"azure_endpoint": "https://llm.test", "api_version": "2024-10-21"}
    return AzureOpenAI(engine="gpt", model="gpt-4o-mini", api_key="k", **options)


def make_like(**options: Any) -> OpenAILike:
    options = {"api_base": API_BASE, **options}
    return OpenAILike(model="m", api_key="k", is_chat_model=True, **options)


def make_anthropic(**options: Any) -> Anthropic:
    return Anthropic(model="claude-sonnet-4-5", api_key="k", base_url="https://llm.test", **options)


def name_of(make: Callable[..., Any]) -> str:
    return make.__name__.removeprefix("make_")


def charged(limiter: Limiter) -> list[int]:
    return [limit.used for limit in limiter.statistics().limits]


def admitted(limiter: Limiter) -> int:
    return limiter.statistics().admitted


def in_flight(limiter: Limiter) -> int:
    return limiter.statistics().in_flight


@dataclass
class Instrumentation:
    """The names of events and spans, in the order in which LlamaIndex reported them."""

    spans: list[str] = field(default_factory=list)
    objects: list[BaseEvent] = field(default_factory=list)

    @property
    def events(self) -> list[str]:
        return [event.class_name() for event in self.objects]

    def take(self) -> tuple[list[str], list[str]]:
        taken = list(self.spans), [name for name, _ in itertools.groupby(self.events)]
        self.spans.clear()
        self.objects.clear()
        return taken


class _Events(BaseEventHandler):
    _seen: Instrumentation = PrivateAttr()

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self._seen.objects.append(event)


class _Spans(NullSpanHandler):
    _seen: Instrumentation = PrivateAttr()

    def span_enter(self, id_: str, *_: Any, **__: Any) -> None:
        self._seen.spans.append(id_.split("-", maxsplit=1)[0])


@pytest.fixture
def instrumentation() -> Iterator[Instrumentation]:
    seen, root, events, spans = Instrumentation(), get_dispatcher(), _Events(), _Spans()
    events._seen = spans._seen = seen
    before = list(root.event_handlers), list(root.span_handlers)
    root.add_event_handler(events)
    root.add_span_handler(spans)
    yield seen
    root.event_handlers[:], root.span_handlers[:] = before


@dataclass
class FakeAPI:
    """OpenAI's API: the bundled provider, after whatever a test scripts first."""

    script: list[httpx.Response | Exception | None] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)
    provider: RateLimitedProvider = field(
        default_factory=partial(RateLimitedProvider, charge="usage")
    )

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]

    @property
    def tokens(self) -> int:
        """What the replies so far used."""
        return self.provider.statistics().tokens

    def refuse(
        self, status: int, headers: dict[str, str] | None = None, *, times: int = 1, **error: Any
    ) -> None:
        body = {"error": {"message": "scripted", "type": "scripted", "code": None, **error}}
        self.script += [httpx.Response(status, json=body, headers=headers) for _ in range(times)]

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.script:
            scripted = self.script.pop(0)
            if isinstance(scripted, Exception):
                raise scripted
            if scripted is not None:
                return scripted
        return answered(self.provider, request)


def answered(provider: RateLimitedProvider, request: httpx.Request) -> httpx.Response:
    """Return the provider's reply to a synchronous client; a loop may be running in its thread."""

    async def answer() -> httpx.Response:
        reply = await provider.mock_transport().handle_async_request(request)
        return httpx.Response(reply.status_code, headers=reply.headers, content=await reply.aread())

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, answer()).result()


@pytest.fixture(autouse=True, scope="session")
def without_loop_of_the_thread() -> None:
    """Keep LlamaIndex from making one in its synchronous methods, which nobody closes."""
    asyncio.set_event_loop(None)


@pytest.fixture
def limiter() -> Limiter:
    return Limiter("1000 RPM", "1M TPM", concurrency=1)


@pytest.fixture
def api() -> Iterator[FakeAPI]:
    api = FakeAPI()
    with respx.mock(assert_all_called=False) as mock:
        mock.route(host__in=["llm.test", "api.groq.com"]).mock(side_effect=api.answer)
        yield api


@dataclass(frozen=True)
class Reader:
    """Call a model's methods and read its streams, on the event loop or on this thread."""

    is_sync: bool

    async def call(self, model: Any, method: str, *args: Any) -> Any:
        if self.is_sync:
            return getattr(model, method)(*args)
        return await getattr(model, f"a{method}")(*args)

    async def begin(self, llm: Any) -> Any:
        return await self.call(llm, "stream_chat", MESSAGES)

    async def next(self, stream: Any) -> Any:
        return next(stream, None) if self.is_sync else await anext(stream, None)

    async def rest(self, stream: Any) -> list[Any]:
        return list(stream) if self.is_sync else [item async for item in stream]

    async def close(self, stream: Any) -> None:
        stream.close() if self.is_sync else await stream.aclose()

    async def read(self, llm: Any) -> list[Any]:
        return await self.rest(await self.begin(llm))


@pytest.fixture(params=[False, True], ids=["async", "sync"])
def reader(request: pytest.FixtureRequest) -> Reader:
    return Reader(is_sync=request.param)


class Bench:
    """A provider on virtual time, and models and a tool behind children of one limiter."""

    def __init__(self, time: VirtualTime, provider: RateLimitedProvider, limiter: Limiter) -> None:
        self.time, self.provider, self.limiter = time, provider, limiter
        self.run = time.run
        #: The limiters that admitted calls, and what the calls inherited.
        self.seen: list[tuple[str, Inherited | None]] = []
        options: dict[str, Any] = {
            "api_base": "http://provider.test/v1",
            "http_client": httpx.Client(transport=httpx.MockTransport(partial(answered, provider))),
            "async_http_client": httpx.AsyncClient(transport=provider.mock_transport()),
        }
        #: A model that is not paced.
        self.plain_llm = make_openai(**options)
        self.llm = limiter.child("chat").wrap(self.plain_llm)
        self.embed_model: Any = limiter.child("embeddings").wrap(
            OpenAIEmbedding(api_key="k", embed_batch_size=2, **options)
        )
        self.tool: Any = limiter.child("tools").wrap(
            FunctionTool.from_defaults(async_fn=self._look_up, name="look_up")
        )
        limiter.observe(self._note)

    async def _look_up(self, a: int, b: int) -> str:
        return str(len(await self.embed_model.aget_query_embedding(f"{a} {b}")))

    def _note(self, event: Event) -> None:
        if isinstance(event, Admitted):
            self.seen.append((event.limiter, inherited.get()))

    def agent(self, **options: Any) -> FunctionAgent:
        return FunctionAgent(name="f", description="f", tools=[self.tool], llm=self.llm, **options)


@pytest.fixture
def bench(virtual_time: VirtualTime) -> Bench:
    provider = RateLimitedProvider(clock=virtual_time.clock)
    limiter = Limiter("60 RPM burst 1", name="openai", clock=virtual_time.clock)
    return Bench(virtual_time, provider, limiter)


def ask(agent: Any, question: str = "look up 1 and 2") -> Any:
    memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
    return agent.run(user_msg=question, memory=memory)
