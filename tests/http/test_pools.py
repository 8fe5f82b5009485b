"""One client over several providers: each attempt goes to the member that takes it, as its own."""

import asyncio
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import asyncbucket
from asyncbucket import Limiter, LimitSyntaxError, Pool
from asyncbucket.attempt import Attempt
from asyncbucket.http import Endpoint, read_pool
from asyncbucket.testing import VirtualClock, VirtualTime
from asyncbucket.waiting import ASYNC, IO, SYNC
from tests.http.conftest import Server, answering, either_io

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
BODY = {"model": "m", "messages": HELLO, "max_tokens": 5}
EMPTY_ACCOUNT = b'{"error": {"code": "insufficient_quota"}}'
#: Members of a pool for tests where a script answers, and what must be seen of each there alone.
ENDPOINTS: dict[str, Endpoint] = {
    "openai": {
        "base_url": "https://openai.test/v1",
        "headers": {"Authorization": "Bearer canary-openai"},
    },
    "azure": {
        "base_url": "https://azure.test:8443/openai/deployments/gpt?api-version=2024-10-21",
        "headers": {"api-key": "canary-azure", "X-Tenant": "canary-tenant"},
    },
    "google": {"base_url": "http://google.test?key=canary-google"},
}
CANARIES = {
    "openai.test": {"canary-openai"},
    "azure.test": {"canary-azure", "canary-tenant"},
    "google.test": {"canary-google"},
}


def pool_of(
    *names: str, clock: Any = time.monotonic_ns, **options: Any
) -> tuple[Pool, dict[Limiter, Endpoint]]:
    """Return a pool of members of these names, in this order, and their endpoints."""
    members = [Limiter("600 RPM", name=name, clock=clock) for name in names or ENDPOINTS]
    given: Any = {"prefer": "first", **options}
    pool = Pool(*members, **given)
    return pool, {member: ENDPOINTS[member.name] for member in members}


def client_of(
    library: Any, pool: Pool, endpoints: dict[Limiter, Endpoint], servers: Server, io: IO = ASYNC
) -> Any:
    return pool.http_client(
        endpoints,
        family=library.__name__,
        sync=io is SYNC,
        transport=library.MockTransport(servers),
        headers=dict.fromkeys(("Authorization", "Ocp-Apim-Subscription-Key"), "canary-client"),
        cookies={"session": "canary-client"},
        params={"key": "canary-client"},
    )


def seen_in(request: Any) -> set[str]:
    """Return the canaries that a request carries."""
    text = f"{request.url} {request.headers.raw!r}"
    return {word for word in (*set().union(*CANARIES.values()), "canary-client") if word in text}


# --- where a request goes ---


@either_io
async def test_request_is_rewritten_for_its_member_and_no_credential_leaves_for_another(
    library: Any, io: IO, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "asyncbucket")
    servers = Server(answering(library, b"{}"))
    pool, endpoints = pool_of(prefer="least_used")  # which goes round
    client = client_of(library, pool, endpoints, servers, io)

    asked = {"params": {"a": "/"}, "json": BODY}
    replies = [await io.call(client.post, "/chat%20s", **asked) for _ in range(3)]

    urls = [str(request.url) for request in servers.requests]
    assert urls == [
        "https://openai.test/v1/chat%20s?a=%2F",
        "https://azure.test:8443/openai/deployments/gpt/chat%20s?a=%2F&api-version=2024-10-21",
        "http://google.test/chat%20s?a=%2F&key=canary-google",
    ]
    hosts = [request.headers["host"] for request in servers.requests]
    assert hosts == ["openai.test", "azure.test:8443", "google.test"]
    for request in servers.requests:
        assert seen_in(request) == CANARIES[request.url.host]
        assert json.loads(request.content) == BODY
    # What the caller sees is what it asked for.
    assert {str(reply.url.host) for reply in replies} == {"openai.test"}
    shown = f"{client._transport!r} {pool!r} {caplog.text} {vars(client._transport)}"
    assert not any(word in shown for words in CANARIES.values() for word in words)


async def test_request_or_redirect_is_for_a_member_or_refused(library: Any) -> None:
    to_azure, away = (
        answering(library, status=307, location=f"https://{place}")
        for place in ("azure.test:8443/openai/deployments/gpt/other", "evil.test/v1")
    )
    servers = Server(answering(library, b"{}"), openai=[to_azure, away])
    pool, endpoints = pool_of("openai", "azure", prefer="least_used")
    client = client_of(library, pool, endpoints, servers)

    assert (await client.post("/chat/completions", json=BODY)).status_code == 200
    foreign = ("/x", "https://openai.test/v10", "https://azure.test/")  # the first is redirected
    for url in foreign:
        with pytest.raises(ValueError, match="for no member of pool 'pool': make the client with"):
            await client.post(url, json=BODY)

    assert servers.hosts == ["openai", "azure", "openai"]
    assert seen_in(servers.requests[1]) == CANARIES["azure.test"]
    assert pool.statistics().in_flight == 0


async def test_conversation_goes_where_its_prompt_is_warm(virtual_time: VirtualTime) -> None:
    terms: dict[str, Any] = {"concurrency": 1, "clock": virtual_time.clock}
    a, b = (Limiter("600 RPM", name=name, **terms) for name in ("openai", "azure"))
    pool, system = Pool(a, b, patience=2), {"role": "system", "content": "x" * 8_000}
    taken: list[tuple[str, float]] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        taken.append((request.url.host.removesuffix(".test"), virtual_time.now))
        await asyncio.sleep(1)
        return httpx.Response(200, json={})

    client = pool.http_client(
        {member: ENDPOINTS[member.name] for member in (a, b)},
        family="httpx",
        transport=httpx.MockTransport(answer),
    )

    async def taker(*words: str, **options: Any) -> str:
        """Return who takes the next call of a conversation, whose turns are ``words``."""
        roles = ("user", "assistant") * 2
        turns = [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]
        body = {"model": "m", "messages": [options.get("system", system), *turns]}
        await client.post("/chat/completions", json=body)
        return taken[-1][0]

    assert [await taker("hi"), await taker("salve")] == ["openai", "azure"]
    assert [await taker("hi", "yes?", each) for each in "abc"] == ["openai"] * 3
    assert [await taker("salve", "quid?", each) for each in "abc"] == ["azure"] * 3
    with asyncbucket.sticky("mine"):  # the caller knows better
        assert await taker("salve", "quid?", "d") == "openai"
    short = {"role": "system", "content": "x"}
    assert {await taker("hi", system=short) for _ in range(2)} == {"openai", "azure"}
    held, asked = await a.acquire(), virtual_time.now
    assert await taker("hi", "yes?", "d") == "azure"
    assert taken[-1][1] - asked == pytest.approx(2)  # its patience
    held.release()


async def test_model_has_the_name_that_a_member_gives_it(library: Any) -> None:
    pool, endpoints = pool_of("openai", "azure")
    _, azure = endpoints
    endpoints[azure] = {**endpoints[azure], "models": {"m": "mein-gerät"}}
    servers = Server(answering(library, b"{}"), openai=[library.ConnectError("refused")])
    client = client_of(library, pool, endpoints, servers)

    for model in ("m", "other"):
        await client.post("/chat/completions", json={**BODY, "model": model})

    sent = [json.loads(request.content) for request in servers.requests]
    assert sent == [BODY, {**BODY, "model": "mein-gerät"}, {**BODY, "model": "other"}]
    request = servers.requests[1]
    assert request.headers["content-length"] == str(len(request.content))


async def test_costs_are_the_largest_that_any_member_may_charge(library: Any) -> None:
    """OpenAI counts the prompt or the reply, whichever is longer; Azure counts both."""
    pool, _ = pool_of("openai", "azure")
    hosts = ("api.openai.com", "x.openai.azure.com")
    endpoints: dict[Limiter, Endpoint] = {
        member: {"base_url": f"https://{host}/v1"}
        for member, host in zip(pool.members, hosts, strict=True)
    }
    client = client_of(library, pool, endpoints, Server(answering(library, b"{}")))
    costs: list[int] = []
    pool.observe(lambda event: costs.append(getattr(event, "cost", {}).get("tokens", 0)))

    await client.post("/chat/completions", json={**BODY, "max_tokens": 300})

    assert max(costs) == 302


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base_ulr": "x"}, "'openai' has an unknown entry 'base_ulr'"),
        ({"headers": "x"}, "headers of the endpoint of 'openai' must map names to texts"),
        ({"headers": {"api-key": "canary\n"}}, "of 'openai' hold a line break, or what is"),
        ({"headers": {"api-key": "canarý"}}, "of 'openai' hold a line break, or what is"),
        *(
            ({"base_url": url}, "base_url of 'openai' must be like .*go into headers")
            for url in ("api.x?key=canary", 5, "https://canary:x@h/", "https://h:canary")
        ),
    ],
)
def test_wrong_endpoint_is_refused_and_never_shown(changed: dict[str, Any], message: str) -> None:
    pool, endpoints = pool_of("openai", "azure")
    first = pool.members[0]
    wrong: Any = {**endpoints, first: {**endpoints[first], **changed}}

    with pytest.raises((TypeError, ValueError), match=message) as caught:
        pool.transport(wrong)

    assert "canary" not in str(caught.value)


def test_endpoints_are_needed_for_each_member_of_a_pool_and_for_nobody_else() -> None:
    pool, endpoints = pool_of("openai", "azure")
    first, stranger = pool.members[0], Limiter()
    with pytest.raises(ValueError, match="of pool 'pool' lack 'azure': give one for each"):
        pool.http_client({first: endpoints[first]})
    with pytest.raises(ValueError, match="lack 'openai', 'azure': give one for each member"):
        pool.http_client(list(endpoints.values()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="name a limiter that is no member"):
        pool.http_client({**endpoints, stranger: {"base_url": "https://x"}})
    with pytest.raises(TypeError, match="endpoints are for a pool"):
        stranger.http_client(endpoints=endpoints)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# --- when a member fails ---


@either_io
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (None, "ConnectError"),
        ((401, b"{}"), "HTTP 401"),
        ((503, b"{}"), "HTTP 503"),
        ((429, EMPTY_ACCOUNT), "HTTP 429 (insufficient_quota)"),
        ((429, b"{}"), "paused"),
        ((400, b"{}"), None),
        ((404, b"{}"), None),
    ],
)
async def test_call_that_failed_for_its_member_is_made_at_another_at_once(
    library: Any,
    io: IO,
    failure: tuple[int, bytes] | None,
    reason: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error of the caller is returned as it is."""
    failed = library.ConnectError("refused")
    if failure is not None:
        failed = answering(library, failure[1], status=failure[0], retry_after="30")
    servers = Server(answering(library, b"{}"), openai=[failed])
    pool, endpoints = pool_of()
    client = client_of(library, pool, endpoints, servers, io)

    replies = [await io.call(client.post, "/chat/completions", json=BODY) for _ in range(2)]

    assert servers.hosts == (["openai", "azure", "azure"] if reason else ["openai", "openai"])
    ends = failure[0] if failure and not reason else 200
    assert [reply.status_code for reply in replies] == [ends, ends]
    out = None if reason == "paused" else reason
    assert [state.reason for state in pool.states()] == [out, None, None]
    told = [f"pool 'pool' leaves out 'openai': {out}"] if out else []
    assert [text for text in caplog.messages if "leaves out" in text] == told
    paused = [member.statistics().paused > 29 for member in pool.members]
    assert paused == [reason in ("paused", "HTTP 503"), False, False]
    assert pool.statistics().in_flight == 0


async def test_when_all_members_are_out_the_last_error_says_so(library: Any) -> None:
    bad_key = answering(library, b'{"error": {"code": "invalid_api_key"}}', status=401)
    servers = Server(answering(library, b"{}"), openai=[bad_key], azure=[bad_key])
    pool, endpoints = pool_of("openai", "azure", name="chat")
    client = client_of(library, pool, endpoints, servers)

    reply = await client.post("/chat/completions", json=BODY)

    assert (reply.status_code, len(servers.requests)) == (401, 2)
    tried = r"asyncbucket: tried 2 times in 0.\d s; gave up: HTTP 401 .* is not retr"
    states = r"pool 'chat': 'openai': left out for (1|0.9\d*) s more \(HTTP 401"
    assert re.match(f"{tried}.*{states}", reply.headers["x-asyncbucket-note"])


async def test_pool_charges_once_when_layers_nest(library: Any) -> None:
    servers = Server(answering(library, b"{}"))
    pool, endpoints = pool_of("openai", "azure")
    client = client_of(library, pool, endpoints, servers)

    for limiter in (pool.members[1], pool):
        async with limiter.acquire() as lease:
            with Attempt(limiter, lease, pays=True):
                await client.post("/chat/completions", json=BODY)

    # Each went to the member that was paid, whichever address the client has.
    assert [member.statistics().admitted for member in pool.members] == [1, 1]
    assert [request.url.host for request in servers.requests] == ["azure.test", "openai.test"]


# --- three providers ---


async def test_answered_probe_lets_others_follow_before_its_stream_ends(library: Any) -> None:
    pool, endpoints = pool_of("openai", clock=(clock := VirtualClock()))
    answers = [library.ConnectError("refused"), answering(library, b"x")]
    servers = Server(answering(library, b"{}"), openai=answers)
    transport = pool.transport(endpoints, library.MockTransport(servers), retries=0)
    client = library.AsyncClient(transport=transport, base_url=transport.base_url)
    with pytest.raises(library.ConnectError):
        await client.post("/chat/completions", json=BODY)
    clock.advance(1)

    async with client.stream("POST", "/chat/completions", json=BODY):
        assert pool.states()[0].left_out == 0
        assert (await client.post("/chat/completions", json=BODY)).status_code == 200


# --- a pool in a file: what it may say, and where keys may not be ---


KEY = "canary-0123456789"
FILE = """
name = "gpt"
prefer = "first"
patience = 0.5

[member.openai]
limits = ["500 RPM", "200k TPM"]
base_url = "https://api.openai.com/v1"
key_env = "THE_KEY"

[member.azure]
rpm = 300
concurrency = "auto"
base_url = "https://east.test/openai/v1?api-version=preview"
key_env = "THE_KEY"
header = "api-key"
models = { "gpt-4o" = "gpt-4o-eu" }

[member.vllm]
concurrency = 8
base_url = "http://gpu:8000/v1"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THE_KEY", KEY)
    return tmp_path / "pool.toml"


async def test_file_has_limits_and_endpoints_and_names_the_variables_of_keys(file: Path) -> None:
    file.write_text(FILE)
    pool, endpoints = read_pool(file)

    members = [(each.name, each.concurrency) for each in pool.members]
    assert members == [("openai", None), ("azure", 4), ("vllm", 8)]
    assert (pool.name, pool._members.prefer) == ("gpt", "first")
    assert [str(limit) for limit in pool.members[1].limits] == ["300 requests per 60 s"]
    wanted: list[Endpoint] = [
        {"base_url": "https://api.openai.com/v1", "headers": {"Authorization": f"Bearer {KEY}"}},
        {
            "base_url": "https://east.test/openai/v1?api-version=preview",
            "headers": {"api-key": KEY},
            "models": {"gpt-4o": "gpt-4o-eu"},
        },
        {"base_url": "http://gpu:8000/v1"},
    ]
    assert list(endpoints.values()) == wanted
    await pool.http_client(endpoints).aclose()


def test_example_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.setenv(name, KEY)
    pool, _ = read_pool(Path(__file__).parents[2] / "examples" / "pool.toml")
    assert [each.name for each in pool.members] == ["openai", "azure"]


async def test_default_store_keeps_limits_and_no_slots_found_by_themselves(file: Path) -> None:
    file.write_text(FILE)
    pool, _ = read_pool(file, store=f"sqlite:///{file.parent}/limits.db")

    assert [each._node.place is not None for each in pool.members] == [True, False, False]
    async with pool.members[0].acquire():
        assert (file.parent / "limits.db").exists()
    await pool.child("calls").aclose()
    await pool.aclose()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (FILE, "[member]", r"it has no members: write a table \[member.NAME\] for each"),
        (FILE, "[member]\nopenai = 5", r"\[member.openai\] is not a table"),
        ("patience", "patient", "'patient' is not known; known: name, prefer, patience, max_queue"),
        ("rpm = 300", "rmp = 300", r"entry 'rmp' of \[member.azure\] is not known"),
        ("http://gpu:8000", "gpu:8000", "the base_url of 'vllm' must be like"),
        ('"THE_KEY"\nheader', f'"{KEY}"\nheader', r"\[member.azure\]: key_env must name an"),
        ('key_env = "THE_KEY"\nheader', "header", r"\[member.azure\]: header is the one"),
        ('key_env = "THE_KEY"\nheader', f'key = "{KEY}"\nheader', "keys stay out of the file"),
        ("api-version=preview", f"key={KEY}", r"\[member.azure\]: keys stay out of the file"),
        ("api-version=preview", f"api-key={KEY}", r"\[member.azure\]: keys stay out of the file"),
        ("https://east", f"https://me:{KEY}@east", "credentials go into headers"),
    ],
)
def test_mistake_is_named_without_a_key(file: Path, before: str, after: str, message: str) -> None:
    assert before in FILE
    file.write_text(FILE.replace(before, after))
    with pytest.raises(LimitSyntaxError, match=message) as refused:
        read_pool(file)

    told: list[BaseException | None] = [refused.value]
    while told[-1] is not None:
        told.append(told[-1].__cause__)
    assert not re.search(KEY, " ".join(map(str, told)))
