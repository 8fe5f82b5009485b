"""What these tests share: models, records of instrumentation, and a scripted OpenAI."""

import asyncio
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import respx
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.azure_openai import AzureOpenAI
from llama_index.llms.openai import OpenAI, OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span_handlers import NullSpanHandler
from pydantic import BaseModel, PrivateAttr

from asyncbucket import Limiter
from asyncbucket.core.context import Inherited, inherited
from asyncbucket.core.events import Admitted, Event
from asyncbucket.testing import RateLimitedProvider, VirtualTime

API_BASE = "https://llm.test/v1"
KEY = "sk-very-secret"
MESSAGES = [ChatMessage("hi")]
PROMPT = PromptTemplate("Name a {thing}.")


class Person(BaseModel):
    """What structured prediction fills in."""

    name: str


def make_openai(**options: Any) -> OpenAI:
    usual: dict[str, Any] = {"model": "gpt-4o-mini", "api_key": "k", "api_base": API_BASE}
    return OpenAI(**usual | options)


def make_completing_openai() -> OpenAI:
    return make_openai(model="gpt-3.5-turbo-instruct", max_tokens=5)


def make_responses(**options: Any) -> OpenAIResponses:
    return OpenAIResponses(model="gpt-4o-mini", api_key="k", api_base=API_BASE, **options)


def make_azure(**options: Any) -> AzureOpenAI:
    options |= {"azure_endpoint": "https://llm.test", "api_version": "2024-10-21"}
    return AzureOpenAI(engine="gpt", model="gpt-4o-mini", api_key="k", **options)


def make_like(**options: Any) -> OpenAILike:
    options = {"api_base": API_BASE, "is_chat_model": True, **options}
    return OpenAILike(model="m", api_key="k", **options)


def make_completing_like() -> OpenAILike:
    return make_like(is_chat_model=False)


def some_models() -> list[Any]:
    embedding = OpenAIEmbedding(api_key=KEY)
    return [MockLLM(max_tokens=3), make_openai(api_key=KEY), MockEmbedding(embed_dim=2), embedding]


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


class Estimating:
    """Estimate every call as ``estimate()`` says."""

    def __init__(self, estimate: Callable[[], Any]) -> None:
        self._estimate = estimate

    def __repr__(self) -> str:
        return "<Estimating>"

    def chat(self, *_: Any) -> Any:
        return self._estimate()

    completion = embedding = chat


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


def _events(*events: Any) -> httpx.Response:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in events]
    text = "".join(f"data: {line}\n\n" for line in lines)
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


@dataclass
class ScriptedOpenAI:
    """An OpenAI API that answers everything, after whatever a test scripts first."""

    script: list[httpx.Response | Exception] = field(default_factory=list)
    requests: list[httpx.Request] = field(default_factory=list)
    usage: dict[str, Any] = field(
        default_factory=lambda: {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    )

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]

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
            return scripted
        body = json.loads(request.content)
        make: Callable[[dict[str, Any]], httpx.Response] = {
            "chat/completions": self._chat,
            "completions": self._completion,
            "responses": self._response,
            "embeddings": self._embeddings,
        }[request.url.path.removeprefix("/v1/").removeprefix("/openai/deployments/gpt/")]
        return make(body)

    def _chat(self, body: dict[str, Any]) -> httpx.Response:
        message: dict[str, Any] = {"role": "assistant", "content": "hello there"}
        if body.get("response_format"):
            message["content"] = '{"name": "Ada"}'
        if body.get("tools"):
            function = {
                "name": body["tools"][0]["function"]["name"],
                "arguments": '{"name": "Ada"}',
            }
            call = {"id": "call_1", "type": "function", "index": 0, "function": function}
            message |= {"content": None, "tool_calls": [call]}
        parts = [{**message, "content": part} for part in (message["content"] or "").split()]
        deltas = [{"delta": part} for part in parts or [message]]
        return self._reply(body, "chat.completion", {"message": message}, deltas)

    def _completion(self, body: dict[str, Any]) -> httpx.Response:
        parts = [{"text": "hello"}, {"text": "there"}]
        return self._reply(body, "text_completion", {"text": "hello there"}, parts)

    def _reply(
        self, body: dict[str, Any], kind: str, whole: dict[str, Any], parts: list[dict[str, Any]]
    ) -> httpx.Response:
        base = {"id": "1", "created": 1, "model": body["model"], "object": kind}
        if not body.get("stream"):
            choices = [{"index": 0, "finish_reason": "stop", **whole}]
            return httpx.Response(200, json={**base, "choices": choices, "usage": self.usage})
        base["object"] = kind.replace("chat.completion", "chat.completion.chunk")
        chunks = [
            {**base, "choices": [{"index": 0, "finish_reason": None, **part}]} for part in parts
        ]
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append({**base, "choices": [], "usage": self.usage})
        return _events(*chunks, "[DONE]")

    def _response(self, body: dict[str, Any]) -> httpx.Response:
        text = '{"name": "Ada"}' if body.get("text") else "hello there"
        content = [{"type": "output_text", "text": text, "annotations": []}]
        message = {"type": "message", "id": "m", "role": "assistant", "status": "completed"}
        usage = {
            "input_tokens": self.usage["prompt_tokens"],
            "output_tokens": self.usage["completion_tokens"],
            "total_tokens": self.usage["total_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        options = {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
        base = {"id": "r", "object": "response", "created_at": 1, "model": body["model"]}
        output = [{**message, "content": content}]
        reply = {**base, **options, "status": "completed", "output": output, "usage": usage}
        if not body.get("stream"):
            return httpx.Response(200, json=reply)
        where = {"item_id": "m", "output_index": 0, "content_index": 0, "sequence_number": 1}
        delta = {"type": "response.output_text.delta", **where, "delta": text, "logprobs": []}
        done = {"type": "response.completed", "response": reply, "sequence_number": 2}
        return _events(delta, done)

    def _embeddings(self, body: dict[str, Any]) -> httpx.Response:
        data = [
            {"object": "embedding", "index": i, "embedding": [0.5, 0.5]}
            for i, _ in enumerate(body["input"])
        ]
        words = sum(len(text.split()) for text in body["input"])
        usage = {"prompt_tokens": words, "total_tokens": words}
        reply = {"object": "list", "data": data, "model": body["model"], "usage": usage}
        return httpx.Response(200, json=reply)


@pytest.fixture(autouse=True, scope="session")
def without_loop_of_the_thread() -> None:
    """Keep LlamaIndex from making one in its synchronous methods, which nobody closes."""
    asyncio.set_event_loop(None)


@pytest.fixture
def scripted_openai() -> ScriptedOpenAI:
    return ScriptedOpenAI()


@pytest.fixture
def openai_api(scripted_openai: ScriptedOpenAI) -> Iterator[ScriptedOpenAI]:
    with respx.mock(assert_all_called=False) as mock:
        mock.route(host__in=["llm.test", "api.groq.com"]).mock(side_effect=scripted_openai.answer)
        yield scripted_openai


@dataclass(frozen=True)
class Reader:
    """Call a model's methods and read its streams, on the event loop or on this thread."""

    is_sync: bool

    async def call(self, on_loop: Any, here: Any, *args: Any) -> Any:
        return here(*args) if self.is_sync else await on_loop(*args)

    async def begin(self, llm: Any, method: str = "stream_chat", *args: Any) -> Any:
        args = args or (MESSAGES,)
        on_loop, here = getattr(llm, f"a{method}"), getattr(llm, method)
        return await self.call(on_loop, here, *args)

    async def next(self, stream: Any) -> Any:
        return next(stream, None) if self.is_sync else await anext(stream, None)

    async def rest(self, stream: Any) -> list[Any]:
        return list(stream) if self.is_sync else [item async for item in stream]

    async def close(self, stream: Any) -> None:
        stream.close() if self.is_sync else await stream.aclose()

    async def throw(self, stream: Any, *error: Any) -> None:
        stream.throw(*error) if self.is_sync else await stream.athrow(*error)

    async def read(self, llm: Any, *args: Any) -> list[Any]:
        return await self.rest(await self.begin(llm, *args))


@pytest.fixture(params=[False, True], ids=["async", "sync"])
def reader(request: pytest.FixtureRequest) -> Reader:
    return Reader(is_sync=request.param)


class Bench:
    """A provider on virtual time, and models and a tool behind children of one limiter."""

    def __init__(self, time: VirtualTime, provider: RateLimitedProvider, limiter: Limiter) -> None:
        self.time, self.provider, self.limiter = time, provider, limiter
        #: The limiters that admitted calls, and what the calls inherited.
        self.seen: list[tuple[str, Inherited | None]] = []
        self._http_client = httpx.Client(transport=provider.mock_transport(sync=True))
        self._async_http_client = httpx.AsyncClient(transport=provider.mock_transport())
        options: dict[str, Any] = {
            "api_base": "http://provider.test/v1",
            "http_client": self._http_client,
            "async_http_client": self._async_http_client,
        }
        #: Makes a model that is not paced.
        self.plain_llm: Callable[[], Any] = functools.partial(make_openai, **options)
        self.llm = limiter.child("chat").wrap(self.plain_llm())
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

    def close(self) -> None:
        self._http_client.close()
        self.time.run(self._async_http_client.aclose())


@pytest.fixture
def bench(virtual_time: VirtualTime) -> Iterator[Bench]:
    provider = RateLimitedProvider(clock=virtual_time.clock)
    limiter = Limiter("60 RPM burst 1", name="openai", clock=virtual_time.clock)
    bench = Bench(virtual_time, provider, limiter)
    yield bench
    bench.close()


def ask(agent: Any, question: str = "look up 1 and 2") -> Any:
    memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
    return agent.run(user_msg=question, memory=memory)
