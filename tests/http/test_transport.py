"""Every attempt is admitted, and its slot is held for exactly as long as it is in use."""

import asyncio
import contextlib
import contextvars
import gc
import gzip
import json
import sys
import zlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import aiohttp
import httpx
import httpx2
import pytest

from asyncbucket import Cost, Limiter, WouldBlock, tenant
from asyncbucket.attempt import Attempt, is_running
from asyncbucket.engine.lease import Lease
from asyncbucket.http import Call, Profile, Told, Usage
from asyncbucket.http.exchange import Exchange
from asyncbucket.testing import RateLimitedProvider, VirtualClock, VirtualTime
from asyncbucket.waiting import ASYNC, IO, SYNC, run
from tests.http.conftest import Server, answering, chunked, client_over, either_io, in_flight, used

URL = "https://api.openai.com/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 300}
REPLY = b'{"choices":[],"usage":{"prompt_tokens":90,"completion_tokens":7,"total_tokens":97}}'
USAGE = {"input_tokens": 5_000_000, "output_tokens": 9_000}
KEY = {"authorization": "Bearer k"}


# --- a slot is held until the call is over ---


@either_io
@pytest.mark.parametrize("way", ["read", "half read", "closed unread", "broken", "dropped"])
async def test_slot_is_held_for_the_body(library: Any, limiter: Limiter, io: IO, way: str) -> None:
    error = library.ReadError("gone") if way == "broken" else None
    body = chunked(library, b"a", REPLY, error=error)

    async def use() -> None:
        request = client.build_request("POST", URL, json=BODY)
        reply = await io.call(client.send, request, stream=True)
        assert in_flight(limiter) == 1
        chunks = reply.aiter_raw() if io is ASYNC else reply.iter_raw()
        if way in ("read", "broken"):
            while await io.next_item(chunks, None) is not None:
                pass
        if way == "half read":
            await io.next_item(chunks, None)
        if way in ("half read", "closed unread"):
            for _ in range(2):
                await io.close(reply)
        if way == "half read":
            assert await io.next_item(chunks, None) == REPLY  # what is read on passes

    client = client_over(
        library, limiter, lambda _: library.Response(200, stream=body), io=io, profile="generic"
    )
    with pytest.raises(library.ReadError, match="gone") if error else contextlib.nullcontext():
        await use()
    gc.collect()
    assert in_flight(limiter) == 0
    assert limiter.statistics().admitted == used(limiter, "requests") == 1
    assert used(limiter, "tokens") == (97 if way == "read" else 400)
    assert body.closed or way in ("broken", "dropped")


@either_io
@pytest.mark.parametrize(
    ("error", "cause", "charged"),
    [
        ("ReadTimeout", None, 1),
        ("PoolTimeout", None, 0),
        # Over aiohttp, a connection lost before the reply becomes a time-out of connecting.
        ("ConnectTimeout", aiohttp.ClientConnectorError(MagicMock(), OSError("no host")), 0),
        ("ConnectTimeout", aiohttp.ServerDisconnectedError("no reply"), 1),
    ],
)
async def test_request_without_reply_is_charged_unless_it_never_left(
    library: Any, limiter: Limiter, io: IO, error: str, cause: Exception | None, charged: int
) -> None:
    def answer(_: Any) -> Any:
        raise getattr(library, error)("lost") from cause

    client = client_over(library, limiter, answer, io=io)
    with pytest.raises(getattr(library, error)):
        await io.call(client.post, URL, json=BODY)
    assert (in_flight(limiter), used(limiter, "requests")) == (0, charged)
    assert used(limiter, "tokens") == 300 * charged


async def test_error_that_cannot_be_judged_holds_no_slot(library: Any, limiter: Limiter) -> None:
    class OddError(Exception):
        @property
        def response(self) -> None:
            raise RuntimeError("no response yet")

    async with client_over(library, limiter, Server(OddError())) as client:
        with pytest.raises(RuntimeError, match="no response yet") as held:
            await client.get(URL)
    assert (type(held.value.__context__), in_flight(limiter)) == (OddError, 0)


async def test_stalled_refusal_is_over_after_5_s(library: Any, virtual_time: VirtualTime) -> None:
    class Stalled(library.AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b'{"error": {'
            await asyncio.sleep(600)

    limiter = Limiter(concurrency=1, clock=virtual_time.clock)
    reply = library.Response(500, headers={"content-length": "99"}, stream=Stalled())
    async with client_over(library, limiter, lambda _: reply) as client:
        assert (await client.get(URL)).content == b'{"error": {'
    assert "content-length" not in reply.headers
    assert virtual_time.now == 5
    assert in_flight(limiter) == 0


def test_thread_reads_a_refusal_for_5_s_at_most(library: Any, clock: VirtualClock) -> None:
    waits = list[float]()

    class Dripping(library.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Any:
            while True:
                waits.append(server.requests[0].extensions["timeout"]["read"])
                clock.advance(2.0)
                yield b"x"

    def drip(_: Any) -> Any:
        return library.Response(500, stream=Dripping())

    limiter = Limiter(concurrency=1, clock=clock)
    server = Server(drip)
    with client_over(library, limiter, server, io=SYNC) as client:
        reply = client.get(URL, timeout=60)
    assert (reply.content, reply.request.extensions["timeout"]["read"]) == (b"xxx", 60)
    assert (waits, in_flight(limiter)) == ([5.0] * 3, 0)


async def test_endless_refusal_is_cut_off(library: Any, limiter: Limiter) -> None:
    answer = answering(library, *([b"x" * 2**20] * 40), status=500)
    async with client_over(library, limiter, answer) as client:
        assert len((await client.get(URL)).content) == 8 * 2**20


@either_io
@pytest.mark.parametrize(
    ("status", "body", "breaks", "paused"),
    [
        (404, b"{}", False, 0),
        (429, b'[{"error":{"details":[{"@type":"RetryInfo","retryDelay":"18s"}]}}]', False, 18),
        (429, b'{"error":{"code":"insufficient_quota"}}', False, 0),
        (429, b'{"error":', True, 0),
    ],
)
async def test_refusal_is_judged_by_its_body_and_holds_no_slot_though_nobody_reads_it(
    library: Any, io: IO, status: int, body: bytes, *, breaks: bool, paused: float
) -> None:
    """Even a list, as Google's, or one that breaks off; its reader gets it as it came."""
    limiter = Limiter(clock=VirtualClock(), concurrency=1)
    stream = chunked(library, body, error=library.ReadError("gone") if breaks else None)
    refusal = library.Response(status, stream=stream)
    client = client_over(library, limiter, lambda _: refusal, io=io, profile="openai")
    request = client.build_request("POST", URL, json=BODY)
    reply = await io.call(client.send, request, stream=True)
    assert (stream.closed, in_flight(limiter)) == (True, 0)
    assert limiter.statistics().paused == paused
    assert await io.call(reply.aread if io is ASYNC else reply.read) == body


async def test_request_sent_several_times_at_once_is_admitted_each_time(library: Any) -> None:
    async def answer(_: Any) -> Any:
        await asyncio.sleep(0)
        return library.Response(200)

    limiter = Limiter(concurrency=1)
    async with client_over(library, limiter, answer) as client:
        request = client.build_request("POST", URL, json=BODY)
        body = request.stream
        replies = await asyncio.gather(*(client.send(request) for _ in range(3)))
    assert {(reply.request, reply.request.stream) for reply in replies} == {(request, body)}
    assert (limiter.statistics().admitted, in_flight(limiter)) == (3, 0)


@either_io
async def test_reply_that_is_kept_keeps_nothing_of_its_call(
    library: Any, limiter: Limiter, io: IO
) -> None:
    """Else each call would wait for the garbage collector: a reply is part of a cycle."""
    client = client_over(library, limiter, answering(library, REPLY), io=io, profile="generic")
    gc.collect()
    reply = await io.call(client.post, URL, json=BODY)
    assert [each for each in gc.get_objects() if isinstance(each, (Exchange, Lease))] == []
    assert (reply.content, used(limiter, "tokens")) == (REPLY, 97)


async def test_event_stream_of_a_get_holds_no_slot(library: Any, limiter: Limiter) -> None:
    answer = answering(library, b"data: 1\n\n", content_type="text/event-stream; charset=utf-8")
    async with client_over(library, limiter, answer) as client:
        async with client.stream("GET", URL) as reply:
            assert in_flight(limiter) == 0
            assert await reply.aread() == b"data: 1\n\n"
        async with client.stream("POST", URL, json=BODY):
            assert in_flight(limiter) == 1


async def test_chunks_come_at_once_and_cancelling_frees_slot(
    library: Any, virtual_time: VirtualTime
) -> None:
    limiter = Limiter(concurrency=1, clock=virtual_time.clock)

    class Endless(library.AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> Any:
            yield b"1"
            await asyncio.Event().wait()

    reply, seen = library.Response(200, stream=Endless()), list[bytes]()
    async with client_over(library, limiter, lambda _: reply) as client:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1), client.stream("GET", URL) as streamed:
                async for chunk in streamed.aiter_raw():
                    seen.append(chunk)
    assert (seen, in_flight(limiter), limiter.statistics().admitted) == ([b"1"], 0, 1)


def test_closing_body_while_lock_is_held_does_not_deadlock(library: Any, limiter: Limiter) -> None:
    with client_over(library, limiter, answering(library, b"a", b"b"), io=SYNC) as client:
        reply = client.send(client.build_request("GET", URL), stream=True)
        chunks = iter(reply.stream)
        assert next(chunks) == b"a"
        with limiter._node.pacer.lock:
            chunks.close()
        assert in_flight(limiter) == 1
        reply.close()
        assert in_flight(limiter) == 0


async def test_only_what_fewer_calls_would_have_avoided_costs_slots() -> None:
    named, accident = {"retry_after": "1"}, dict[str, str]()
    for status, headers, slots in ((429, named, 3), (429, accident, 4), (500, accident, 4)):
        limiter = Limiter(concurrency="auto")
        answer = answering(httpx, status=status, **headers)
        async with client_over(httpx, limiter, answer) as client:
            await client.post(URL, json=BODY)
        assert (in_flight(limiter), limiter.concurrency) == (0, slots)


# --- what is sent, and when ---


def sending(library: Any, send: Any) -> Any:
    class Inner(library.AsyncBaseTransport):  # type: ignore[misc]
        async def handle_async_request(self, request: Any) -> Any:
            return await send(request)

    return Inner()


async def test_booking_is_dated_when_request_is_sent(library: Any) -> None:
    clock = VirtualClock()
    limiter = Limiter("1 requests/10s", clock=clock)

    async def send(request: Any) -> Any:
        clock.advance(5.0)
        assert b"".join([chunk async for chunk in request.stream]) == request.content
        return library.Response(200)

    transport = limiter.transport(sending(library, send))
    async with library.AsyncClient(transport=transport) as client:
        await client.post(URL, json=BODY)
    clock.advance(6.0)
    with pytest.raises(WouldBlock) as refused:
        limiter.acquire_nowait()
    assert refused.value.retry_after == pytest.approx(4.0, abs=0.1)


# --- what a reply says ---


async def test_reply_that_a_transport_beneath_has_read_is_judged_and_settled(library: Any) -> None:
    async def body(text: bytes) -> Any:
        yield text

    async def send(_: Any) -> Any:
        status, text = answers.pop()
        reply = library.Response(status, content=body(text))
        await reply.aread()
        return reply

    limiter = Limiter("100k TPM")
    answers = [(429, b'{"error":{"code":"insufficient_quota"}}'), (200, REPLY)]
    transport = limiter.transport(sending(library, send), profile="generic")
    async with library.AsyncClient(transport=transport) as client:
        assert (await client.post(URL, json=BODY)).content == REPLY
        assert used(limiter, "tokens") == 97
        assert (await client.post(URL, json=BODY)).status_code == 429
    assert limiter.statistics().paused == in_flight(limiter) == 0


@pytest.mark.parametrize(("target", "teaches"), [("https://cdn.test/a", False), ("/b", True)])
async def test_foreign_redirect_tells_nothing(library: Any, target: str, *, teaches: bool) -> None:
    """Nor is it expected to tell limits; else only a slice of them would pass until it does."""
    limiter = Limiter("1000 RPM burst 1000", clock=VirtualClock())
    told = {"x_ratelimit_remaining_requests": "5", "retry_after": "7"}
    redirect = answering(library, status=302, location=target)
    server = Server(redirect, answering(library, b"{}", status=429, **told))
    async with client_over(library, limiter, server) as client:
        await client.get("https://api.openai.com/v1/files", follow_redirects=True)
    available = limiter.statistics().limits[0].available
    assert available < 6 if teaches else available == 998
    assert limiter.statistics().paused == (7 if teaches else 0)
    assert in_flight(limiter) == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "usage", "counted"),
    [
        ("GET", "/v1/responses/r1", {}, USAGE, [0, 0, 0]),
        ("POST", "/v1/batches/b1/cancel", {}, USAGE, [0, 0, 0]),
        ("POST", "/v1/chat/completions/c1", {}, USAGE, [0, 0, 0]),
        ("POST", "/v1/rerank", {"documents": ["x" * 400]}, {"total_tokens": 900}, [900, 900, 0]),
    ],
)
async def test_usage_of_other_calls_is_free_and_teaches_nothing_and_a_mere_total_is_input(
    library: Any, method: str, path: str, body: Any, usage: Any, counted: list[int]
) -> None:
    limiter = Limiter("200k TPM", "100k ITPM", "100k OTPM")
    answer = answering(library, json.dumps({"usage": usage}).encode())
    async with client_over(library, limiter, answer, profile="generic") as client:
        await client.request(method, f"http://127.0.0.1{path}", json=body)
        assert [each.used for each in limiter.statistics().limits] == counted
        async with client.stream("POST", URL, json={"messages": []}):
            assert used(limiter, "output_tokens") == 256


async def test_compressed_reply_settles_and_stays_intact(library: Any, limiter: Limiter) -> None:
    """Even if the client closes it at [DONE], and does not read the end of the compressed data."""
    packer = zlib.compressobj()
    packed = packer.compress(b"data: " + REPLY + b"\n\ndata: [DONE]\n\n")
    packed += packer.flush(zlib.Z_SYNC_FLUSH)
    chunks = packed[:20], packed[20:], packer.flush()
    answer = answering(library, *chunks, content_encoding="deflate")
    client = client_over(library, limiter, answer, profile="generic")
    seen = []
    async with client, client.stream("POST", URL, json=BODY) as reply:
        async for line in reply.aiter_lines():
            seen.append(line)
            if line == "data: [DONE]":
                break
    assert used(limiter, "tokens") == 97
    assert seen == ["data: " + REPLY.decode(), "", "data: [DONE]"]


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "zstd of 3.14", "gzip, odd"])
async def test_reply_that_unpacks_to_too_much_or_nothing_stays_charged_as_reserved(
    library: Any, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    def unpack(data: bytes, output_buffer_limit: int) -> bytes:
        return gzip.decompress(data)[:output_buffer_limit]  # as bounded as brotli does

    packers: dict[str, Any] = {"gzip": gzip.compress, "br": gzip.compress}
    brotli = SimpleNamespace(Decompressor=lambda: SimpleNamespace(process=unpack))
    monkeypatch.setitem(sys.modules, "brotli", brotli)
    encoding, is_new, _ = encoding.partition(" of ")
    if is_new:
        zstd = SimpleNamespace(ZstdDecompressor=lambda: SimpleNamespace(decompress=unpack))
        monkeypatch.setitem(sys.modules, "compression.zstd", zstd)
        packers["zstd"] = gzip.compress
    elif encoding == "zstd":
        packers["zstd"] = pytest.importorskip("zstandard").compress
    for size, tokens in ((1_000, 97 if encoding in packers else 400), (9_000_000, 400), (0, 400)):
        limiter = Limiter("100k TPM")
        packed = packers.get(encoding, bytes)(REPLY[:-1] + b',"padding":"' + b"x" * size + b'"}')
        if not size:
            packed = b"\x00not compressed"
        answer = answering(library, packed, content_encoding=encoding)
        client = client_over(library, limiter, answer, profile="generic")
        async with client, client.stream("POST", URL, json=BODY) as reply:
            assert b"".join([chunk async for chunk in reply.aiter_raw()]) == packed
        assert used(limiter, "tokens") == tokens


async def test_forecast_is_per_reply_when_a_call_asks_for_several(library: Any) -> None:
    limiter = Limiter("100k OTPM")
    reserved: list[int] = []

    def answer(_: Any) -> Any:
        reserved.append(used(limiter, "output_tokens") - sum(reserved[1:]))
        usage = {"prompt_tokens": 1, "completion_tokens": 4000, "total_tokens": 4001}
        return library.Response(200, json={"usage": usage})

    async with client_over(library, limiter, answer, profile="generic") as client:
        for _ in range(2):
            await client.post(URL, json={"messages": "x", "n": 4})
    assert reserved == [4 * 256, 4_000 + 4 * 1_000]


async def test_forecast_and_usage_respect_tenants_own_limits(library: Any) -> None:
    limiter = Limiter("1000 RPM burst 1000")
    limiter.per_key("200 TPM")
    async with client_over(library, limiter, answering(library, REPLY)) as client:
        for name in ("acme", "other"):
            with tenant(name):
                await client.post("https://vllm.test/v1/chat/completions", json={"messages": "x"})
    assert used(limiter.key("acme"), "tokens") == used(limiter.key("other"), "tokens") == 97


async def test_custom_profile_prices_and_settles_calls(library: Any) -> None:
    class Pictures(Profile):
        def cost(self, call: Call) -> Cost | None:
            return Cost(images=call.body.get("n", 1)) if call.method == "POST" else None

        def settled(self, call: Call, usage: Usage) -> dict[str, int]:
            return {"images": 1} if call.body and usage.total == 97 else {}

    tells = (Told("images", per=60, remaining="x-left"),)
    pictures = Pictures(name="pictures", settles=frozenset({"images"}), tells=tells)
    limiter = Limiter("20 images/minute burst 20")
    answer = answering(library, REPLY, x_left="12")
    async with client_over(library, limiter, answer, profile=pictures) as client:
        await client.get("https://pictures.test/")
        assert limiter.statistics().admitted == 0
        await client.post("https://pictures.test/", json={"n": 3})
    assert used(limiter, "images") == 1
    assert limiter.statistics().limits[0].available in (11, 12)  # if the last reply was read


# --- layers that are stacked pay once ---


@pytest.mark.parametrize(
    ("routes", "paced"),
    # With one slot, a route to a child would wait for ever for the slot that the model holds.
    [(None, "default"), ({"*": "chat"}, "default/chat")],
)
async def test_call_of_wrapped_model_is_charged_once_and_warns_once(
    library: Any, caplog: pytest.LogCaptureFixture, routes: Any, paced: str
) -> None:
    limiter = Limiter("1000 RPM burst 1000", concurrency=1)
    child = limiter.child("chat")
    answer = answering(library, REPLY, x_ratelimit_remaining_requests="40")
    async with client_over(library, limiter, answer, routes=routes) as client:
        with await limiter.acquire(tokens=5) as lease, Attempt(limiter, lease, pays=True):
            await client.post(URL, json=BODY)
            await client.post(URL, json=BODY)
    assert (limiter.statistics().admitted, child.statistics().admitted) == (1, 0)
    assert limiter.statistics().limits[0].available == 40
    (told,) = caplog.messages
    assert told == (
        f"calls that a model has paid for by limiter 'default' come through a transport of {paced!r}, "
        f"too: they count once, at the first; pace only one of the two"
    )


async def test_transport_finds_the_note_of_another_though_one_between_copies_the_request(
    library: Any, limiter: Limiter, caplog: pytest.LogCaptureFixture
) -> None:
    async def send(request: Any) -> Any:
        rest = {"extensions": request.extensions, "stream": request.stream}
        copied = library.Request(request.method, request.url, **rest)
        context = contextvars.Context()
        return await asyncio.create_task(inner.handle_async_request(copied), context=context)

    inner = limiter.transport(library.MockTransport(answering(library, b"{}")))
    async with library.AsyncClient(transport=limiter.transport(sending(library, send))) as client:
        await client.get(URL)
        await client.get(URL)
    assert (limiter.statistics().admitted, in_flight(limiter)) == (2, 0)
    (record,) = caplog.records
    assert "calls that another transport has paid for by limiter 'default'" in record.message


@pytest.mark.parametrize(
    ("outer", "inner", "admitted"),
    [
        ("acme", "shared", (1, 1)),
        ("shared", "acme", (1, 0)),
        ("gateway", "shared", (1, 1)),  # another limiter is another charge
    ],
)
async def test_stacked_transports_charge_once(
    library: Any, outer: str, inner: str, admitted: tuple[int, int]
) -> None:
    shared = Limiter("100 RPM", concurrency=1, name="shared")
    limiters = {"shared": shared, "acme": shared.child("acme"), "gateway": Limiter("9 RPM")}
    beneath = limiters[inner].transport(library.MockTransport(answering(library, b"{}")))
    async with library.AsyncClient(transport=limiters[outer].transport(beneath)) as client:
        await client.get(URL)
    assert tuple(limiters[name].statistics().admitted for name in (outer, inner)) == admitted


def test_tool_is_called_anew_once_it_has_called_something_or_is_done() -> None:
    limiter, tool = Limiter(), object()
    with limiter.acquire_nowait() as lease, Attempt(limiter, lease, call=tool):
        assert is_running(tool)
        assert not is_running(limiter)
        with run(Attempt(limiter).admit(SYNC, timeout=1)):
            pass
        assert not is_running(tool)
    with limiter.acquire_nowait() as lease, Attempt(limiter, lease, call=tool):
        lease.release()
        assert not is_running(tool)


# --- what a transport is made of ---


async def test_one_transport_serves_all_clients_of_both_libraries(limiter: Limiter) -> None:
    paced = limiter.transport()
    assert "above transport" in repr(paced)
    await paced.aclose()
    with RateLimitedProvider() as provider:
        for library in (httpx, httpx2):
            with library.Client(transport=paced) as client:
                reply = await asyncio.to_thread(client.get, provider.base_url)
                assert reply.status_code == 401
        assert "above HTTPTransport" in repr(paced)
        for library in (httpx, httpx2):
            async with library.AsyncClient(transport=paced) as client:
                assert (await client.get(provider.base_url)).status_code == 401
        assert type(paced.inner) is httpx.AsyncHTTPTransport
        assert "above AsyncHTTPTransport" in repr(paced)
        assert "above HTTPTransport" in repr(paced.above(httpx.HTTPTransport()))
    assert limiter.statistics().admitted == 4


async def test_request_of_other_kind_or_library_is_refused(library: Any, limiter: Limiter) -> None:
    with pytest.raises(TypeError, match="sends requests of httpx or httpx2, not <class 'object'>"):
        await limiter.transport().handle_async_request(object())
    paced = limiter.transport(library.AsyncHTTPTransport())
    refused = pytest.raises(TypeError, match=r"AsyncHTTPTransport has no handle_request\(\)")
    with refused, library.Client(transport=paced) as client:
        client.get(URL)


@pytest.mark.parametrize(
    ("inner", "profile", "message"),
    [
        (None, "acme", "no profile is called 'acme'; known: openai, azure"),
        (None, Profile, r"or a Profile, not <class '.*Profile'>"),
        (httpx.AsyncHTTPTransport, None, r"not <class 'httpx\.AsyncHTTPTransport'>"),
        (object(), None, r"handle_async_request\(\) or handle_request\(\), not object"),
    ],
)
def test_wrong_argument_error_names_accepted_ones(inner: Any, profile: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Limiter().transport(inner, profile=profile)
