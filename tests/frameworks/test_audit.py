"""An audit names each call of a real framework that passes no limiter, and none that passes one.

Every program makes its call at its last line, as its framework offers to: with the limiter as
docs/frameworks.md shows it, or with none, which is how a bypass begins. `make frameworks` has
environments with all of them; elsewhere what is not installed is skipped.
"""

import asyncio
import contextlib
import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from asyncbucket import Limiter, audit
from asyncbucket.testing import RateLimitedProvider

# They run on the machine's clock, and warn of what they will change, in themselves and in each other.
pytestmark = [pytest.mark.real_clock, pytest.mark.filterwarnings("default")]

#: A name, for sockets that are opened by number look nothing up.
HOST: Final = "localhost"
MESSAGES: Final[Any] = [{"role": "user", "content": "Is 7 prime?"}]
CLAUDE: Final = "claude-sonnet-5"
SETTINGS: Final = {
    **{f"{name}_API_KEY": "test-key" for name in ("OPENAI", "ANTHROPIC", "GEMINI")},
    **{f"AWS_{name}": "test-key" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")},
    "AWS_REGION": "us-east-1",
    # What they would send to others, or ask of them.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
NOTHING: Final = contextlib.nullcontext()
need = pytest.importorskip
Program = Callable[[str, Limiter | None], Any]
PROGRAMS: dict[str, Program] = {}


def program(run: Program) -> Program:
    """Note a program under its name."""
    PROGRAMS[run.__name__] = run
    return run


def client_of(limiter: Limiter | None, name: str = "http_client", **options: Any) -> dict[str, Any]:
    """Return the argument that paces a client; none if there is no limiter."""
    return {} if limiter is None else {name: limiter.http_client(**options)}


@program
async def openai(url: str, limiter: Limiter | None) -> None:
    client = need("openai").AsyncOpenAI(base_url=f"{url}/v1", **client_of(limiter))
    await client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)


@program
async def anthropic(url: str, limiter: Limiter | None) -> None:
    client = need("anthropic").AsyncAnthropic(base_url=url, **client_of(limiter))
    await client.messages.create(model=CLAUDE, max_tokens=9, messages=MESSAGES)


@program
async def llama_index(url: str, limiter: Limiter | None) -> None:
    llm = need("llama_index.llms.openai").OpenAI(api_base=f"{url}/v1", model="gpt-4o-mini")
    llm = llm if limiter is None else limiter.wrap(llm)
    await llm.acomplete("Is 7 prime?")


@program
async def langchain(url: str, limiter: Limiter | None) -> None:
    paced = client_of(limiter, "http_async_client")
    llm = need("langchain_openai").ChatOpenAI(base_url=f"{url}/v1", model="gpt-4o-mini", **paced)
    await llm.ainvoke("Is 7 prime?")


@program
def langchain_sync(url: str, limiter: Limiter | None) -> None:
    paced = client_of(limiter, sync=True)
    llm = need("langchain_openai").ChatOpenAI(base_url=f"{url}/v1", model="gpt-4o-mini", **paced)
    llm.invoke("Is 7 prime?")


@program
async def litellm_openai(url: str, limiter: Limiter | None) -> None:
    litellm = need("litellm")
    litellm.aclient_session = client_of(limiter, "it", family="httpx").get("it")
    await litellm.acompletion("gpt-4o-mini", MESSAGES, api_base=f"{url}/v1")


@program
def litellm_sync(url: str, limiter: Limiter | None) -> None:
    litellm = need("litellm")
    litellm.client_session = client_of(limiter, "it", family="httpx", sync=True).get("it")
    litellm.completion("gpt-4o-mini", MESSAGES, api_base=f"{url}/v1")


def litellm_client(limiter: Limiter | None) -> dict[str, Any]:
    """Return the client of LiteLLM's own routes."""
    handlers = need("litellm.llms.custom_httpx.http_handler")
    return (
        {}
        if limiter is None
        else {"client": handlers.AsyncHTTPHandler(transport=limiter.transport())}
    )


@program
async def litellm_anthropic(url: str, limiter: Limiter | None) -> None:
    paced = litellm_client(limiter)
    await need("litellm").acompletion(f"anthropic/{CLAUDE}", MESSAGES, api_base=url, **paced)


@program
async def litellm_bedrock(url: str, limiter: Limiter | None) -> None:
    asked = {"model": "bedrock/anthropic.claude-v3", "aws_bedrock_runtime_endpoint": url}
    await need("litellm").acompletion(messages=MESSAGES, **asked, **litellm_client(limiter))


@program
async def openai_agents(url: str, limiter: Limiter | None) -> None:
    agents, model = need("agents"), need("agents.extensions.models.litellm_model").LitellmModel
    need("litellm").aclient_session = client_of(limiter, "it", family="httpx").get("it")
    agent = agents.Agent("poet", model=model("openai/gpt-4o-mini", base_url=f"{url}/v1"))
    await agents.Runner.run(agent, "Is 7 prime?")


@program
async def dspy(url: str, limiter: Limiter | None) -> None:
    need("litellm").aclient_session = client_of(limiter, "it", family="httpx").get("it")
    engine = {} if limiter is None else {"engine": "litellm"}
    lm = need("dspy").LM("openai/gpt-4o-mini", api_base=f"{url}/v1", cache=False, **engine)
    await lm.acall("Is 7 prime?")


@program
async def pydantic_ai(url: str, limiter: Limiter | None) -> None:
    client = need("openai").AsyncOpenAI(base_url=f"{url}/v1", **client_of(limiter))
    provider = need("pydantic_ai.providers.openai").OpenAIProvider(openai_client=client)
    model = need("pydantic_ai.models.openai").OpenAIChatModel("gpt-4o-mini", provider=provider)
    await need("pydantic_ai").Agent(model).run("Is 7 prime?")


@program
async def instructor(url: str, limiter: Limiter | None) -> None:
    client = need("openai").AsyncOpenAI(base_url=f"{url}/v1", **client_of(limiter))
    create = need("instructor").from_openai(client).chat.completions.create
    await create(model="gpt-4o-mini", response_model=None, messages=MESSAGES)


@program
async def google_genai(url: str, limiter: Limiter | None) -> None:
    paced = client_of(limiter, "httpx_async_client", family="httpx")
    options = need("google.genai.types").HttpOptions(base_url=url, **paced)
    models = need("google.genai").Client(http_options=options).aio.models
    await models.generate_content(model="gemini-2.0-flash", contents="Is 7 prime?")


@program
def boto3(url: str, limiter: Limiter | None) -> None:
    client = need("boto3").client("bedrock-runtime", "us-east-1", endpoint_url=url)
    content = [{"role": "user", "content": [{"text": "Is 7 prime?"}]}]
    with NOTHING if limiter is None else limiter.acquire_sync():
        client.converse(modelId="anthropic.claude-v3", messages=content)


@program
async def aiohttp(url: str, limiter: Limiter | None) -> None:
    asked = {"model": "gpt-4o-mini", "messages": MESSAGES}
    async with (
        need("aiohttp").ClientSession() as session,
        NOTHING if limiter is None else limiter.acquire(),
    ):
        await session.post(f"{url}/v1/chat/completions", json=asked)


def line_of(run: Program) -> str:
    """Return where the last line of ``run`` is, as an audit shows it."""
    lines, first = inspect.getsourcelines(run)
    file = Path(inspect.getfile(run))
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f"{shown}:{first + len(lines) - 1}"


async def ran(run: Program, url: str, limiter: Limiter | None) -> None:
    """Run a program, on a thread of its own if it is synchronous; the provider has no Bedrock."""
    with contextlib.suppress(Exception) if "bedrock" in inspect.getsource(run) else NOTHING:
        if inspect.iscoroutinefunction(run):
            await run(url, limiter)
        else:
            await asyncio.to_thread(run, url, limiter)


@pytest.mark.parametrize("name", PROGRAMS)
async def test_audit_names_the_line_of_each_bypass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in SETTINGS.items():
        monkeypatch.setenv(key, value)
    run, limiter = PROGRAMS[name], Limiter("600 RPM")
    with RateLimitedProvider() as provider, audit(hosts=[HOST]) as seen:
        url = provider.url.replace("127.0.0.1", HOST)
        # LiteLLM keeps clients by their URL, so the bypass has another.
        await ran(run, f"{url}/paced", limiter)
        assert (seen.unpaced, seen.paced) == ([], 1)
        await ran(run, url, None)
    (unpaced,) = seen.unpaced
    assert (unpaced.host, unpaced.where) == (HOST, line_of(run))
    assert seen.paced == limiter.statistics().admitted == 1
    # Clients that nobody closes must not warn in another test.
    _ = gc.collect()
