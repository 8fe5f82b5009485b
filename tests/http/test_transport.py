"""Every attempt is admitted, and its slot is held for exactly as long as it is in use."""

import asyncio
import contextlib
import gc
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import MagicMock

import aiohttp
import httpx
import httpx2
import pytest

from asyncbucket import Cost, CostExceedsLimit, Limiter, WouldBlock, tenant
from asyncbucket.core.events import Admitted
from asyncbucket.http import Call, ProviderProfile, Told, Usage
from asyncbucket.http.held import HeldLease, holding
from asyncbucket.testing import RateLimitedProvider, VirtualClock
from tests.http.conftest import answering, chunked

URL = "https://api.openai.com/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 300}
REPLY = b'{"choices":[],"usage":{"prompt_tokens":90,"completion_tokens":7,"total_tokens":97}}'


def in_flight(limiter: Limiter) -> int:
    """Return how many slots are taken."""
    return limiter.statistics().in_flight


def used(limiter: Limiter, resource: str) -> int:
    """Return how much of a limit is used."""
    return next(u.used for u in limiter.statistics().limits if u.limit.resource == resource)


def client_over(library: Any, limiter: Limiter, answer: Any, **options: Any) -> Any:
    """Return an async client whose paced transport gets its replies from `answer`."""
    inner = library.MockTransport(answer)
    return library.AsyncClient(transport=limiter.transport(inner, **options))


def giving(reply: Any) -> Any:
    """Return a handler for MockTransport that gives `reply`."""

    def answer(_: Any) -> Any:
        return reply

    return answer


async def test_slot_is_held_until_the_body_is_read(library: Any, limiter: Limiter) -> None:
    """The slot is kept when the headers arrive, and released at the end of the body."""
    client = client_over(library, limiter, answering(library, b"a", b"b"))
    async with client, client.stream("GET", URL) as reply:
        assert in_flight(limiter) == 1
        chunks = [chunk async for chunk in reply.aiter_raw()]
        assert in_flight(limiter) == 0

    assert chunks == [b"a", b"b"]
    assert limiter.statistics().admitted == 1


async def test_slot_is_held_until_unread_body_is_closed(library: Any, limiter: Limiter) -> None:
    """A body that is not read releases its slot once, when it is closed."""
    body = chunked(library, b"a")
    async with client_over(library, limiter, giving(library.Response(200, stream=body))) as client:
        reply = await client.send(client.build_request("GET", URL), stream=True)
        assert in_flight(limiter) == 1
        await reply.aclose()
        await reply.aclose()

    assert body.closed
    assert in_flight(limiter) == 0


async def test_dropped_reply_gives_its_slot_back(library: Any, limiter: Limiter) -> None:
    """A reply that is neither read nor closed releases its slot when it is collected."""
    async with client_over(library, limiter, answering(library, b"a")) as client:
        await client.send(client.build_request("GET", URL), stream=True)
        gc.collect()

        assert in_flight(limiter) == 0


async def test_half_read_body_gives_its_slot_back(library: Any, limiter: Limiter) -> None:
    """A client that stops in the middle of a body releases the slot."""
    async with client_over(library, limiter, answering(library, b"a", b"b")) as client:
        async with client.stream("GET", URL) as reply:
            async for _ in reply.aiter_raw():
                break

        assert in_flight(limiter) == 0


async def test_body_that_breaks_off_gives_its_slot_back(library: Any, limiter: Limiter) -> None:
    """An error inside a body is passed on unchanged, too."""
    body = chunked(library, b"a", error=library.ReadError("gone"))
    async with client_over(library, limiter, giving(library.Response(200, stream=body))) as client:
        with pytest.raises(library.ReadError, match="gone"):
            await client.get(URL)

    assert in_flight(limiter) == 0


async def test_request_cancelled_mid_body_gives_slot_back(library: Any, limiter: Limiter) -> None:
    """A task cancelled while it waits for the next chunk no longer holds a slot."""
    first = asyncio.Event()

    class Slow(library.AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> Any:
            yield b"a"
            first.set()
            await asyncio.Event().wait()

    async with client_over(
        library, limiter, giving(library.Response(200, stream=Slow()))
    ) as client:
        task = asyncio.create_task(client.get(URL))
        await first.wait()
        assert in_flight(limiter) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert in_flight(limiter) == 0


async def test_request_cancelled_while_waiting_is_not_sent_or_charged(library: Any) -> None:
    """A request that is cancelled while it waits is not sent, and costs nothing."""
    limiter = Limiter(concurrency=1)
    sent: list[Any] = []

    def answer(request: Any) -> Any:
        sent.append(request)
        return library.Response(200, stream=chunked(library, b"a"))

    async with client_over(library, limiter, answer) as client:
        reply = await client.send(client.build_request("GET", URL), stream=True)
        task = asyncio.create_task(client.get(URL))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await reply.aclose()

    assert len(sent) == 1
    assert limiter.statistics().admitted == 1


async def test_failed_attempt_is_charged_and_gives_its_slot_back(
    library: Any, limiter: Limiter
) -> None:
    """What became of a request that was sent is unknown, so its cost stays charged."""

    def answer(_: Any) -> Any:
        raise library.ReadTimeout("no reply")

    async with client_over(library, limiter, answer) as client:
        with pytest.raises(library.ReadTimeout):
            await client.get(URL)

    assert in_flight(limiter) == 0
    assert used(limiter, "requests") == 1


async def test_request_never_sent_costs_nothing(library: Any, limiter: Limiter) -> None:
    """If no connection was made, there was no call."""

    def answer(_: Any) -> Any:
        raise library.ConnectError("refused")

    async with client_over(library, limiter, answer) as client:
        with pytest.raises(library.ConnectError):
            await client.post(URL, json=BODY)

    assert in_flight(limiter) == 0
    assert used(limiter, "requests") == used(limiter, "tokens") == 0


@pytest.mark.parametrize(
    ("cause", "charged"),
    [
        (aiohttp.ConnectionTimeoutError("connecting"), 0),
        (aiohttp.ClientConnectorError(MagicMock(), OSError("no such host")), 0),
        (aiohttp.ServerDisconnectedError("no reply"), 1),
        (aiohttp.ClientOSError("reset"), 1),
    ],
    ids=["no connection in time", "no such host", "no reply", "reset"],
)
async def test_reply_lost_over_aiohttp_is_charged_despite_its_httpx_error(
    library: Any, limiter: Limiter, cause: Exception, charged: int
) -> None:
    """Over aiohttp, a connection lost before the reply becomes a time-out of connecting."""

    def answer(_: Any) -> Any:
        raise library.ConnectTimeout("lost") from cause

    async with client_over(library, limiter, answer) as client:
        with pytest.raises(library.ConnectTimeout):
            await client.post(URL, json=BODY)

    assert in_flight(limiter) == 0
    assert used(limiter, "requests") == charged


async def test_complete_reply_gives_its_slot_back_and_settles_at_once(
    library: Any, limiter: Limiter
) -> None:
    """A reply that is already complete, as tests make them, holds no slot, and is settled."""
    answer = library.Response(200, content=REPLY)
    async with client_over(library, limiter, giving(answer), profile="generic") as client:
        reply = await client.send(client.build_request("POST", URL, json=BODY), stream=True)

        assert in_flight(limiter) == 0
        assert used(limiter, "tokens") == 97
        assert await reply.aread() == REPLY


def test_synchronous_client_is_paced_like_async_client(library: Any, limiter: Limiter) -> None:
    """Slots are held and released the same way by synchronous clients."""
    bodies = [chunked(library, b"a", REPLY), chunked(library, b"a"), chunked(library, b"a")]
    script = iter(bodies)

    def answer(_: Any) -> Any:
        return library.Response(200, stream=next(script))

    inner = library.MockTransport(answer)
    with library.Client(transport=limiter.transport_sync(inner)) as client:
        with client.stream("POST", URL, json=BODY) as reply:
            assert in_flight(limiter) == 1
            assert reply.read() == b"a" + REPLY
            assert in_flight(limiter) == 0
        with client.stream("GET", URL):
            assert in_flight(limiter) == 1
        assert in_flight(limiter) == 0
        client.send(client.build_request("GET", URL), stream=True)
        gc.collect()
        assert in_flight(limiter) == 0

    assert bodies[1].closed
    assert limiter.statistics().admitted == 3


def test_synchronous_request_never_sent_costs_nothing(library: Any, limiter: Limiter) -> None:
    """A request that never left costs nothing, and holds no slot."""

    def answer(_: Any) -> Any:
        raise library.ConnectTimeout("nobody there")

    with (
        library.Client(transport=limiter.transport_sync(library.MockTransport(answer))) as client,
        pytest.raises(library.ConnectTimeout),
    ):
        client.get(URL)

    assert in_flight(limiter) == used(limiter, "requests") == 0


async def test_each_redirect_hop_is_admitted(library: Any, limiter: Limiter) -> None:
    """Redirects are followed by the client, above the transport, so each hop is charged."""

    def answer(request: Any) -> Any:
        if request.url.path == "/old":
            return library.Response(307, headers={"location": "/new"})
        return library.Response(200, content=request.content)

    async with client_over(library, limiter, answer) as client:
        reply = await client.post("https://x.test/old", content=b"hello", follow_redirects=True)

    assert reply.content == b"hello"
    assert [each.status_code for each in reply.history] == [307]
    assert limiter.statistics().admitted == 2


async def test_streamed_upload_is_not_read_before_sending(library: Any, limiter: Limiter) -> None:
    """A body produced while it is sent is not read beforehand; it is charged as one request."""
    asked: list[str] = []

    class Inner(library.AsyncBaseTransport):  # type: ignore[misc]
        async def handle_async_request(self, request: Any) -> Any:
            asked.append("sent")
            got = [chunk async for chunk in request.stream]
            return library.Response(200, content=b"|".join(got))

        async def aclose(self) -> None:
            asked.append("closed")

    async def parts() -> Any:
        for part in (b'{"messages":', b"[]}"):
            asked.append("part")
            yield part

    async with library.AsyncClient(transport=limiter.transport(Inner())) as client:
        reply = await client.post(URL, content=parts())
        assert asked == ["sent", "part", "part"]

    assert reply.content == b'{"messages":|[]}'
    assert asked[-1] == "closed"
    assert used(limiter, "requests") == 1


async def test_streamed_upload_that_was_read_can_be_redirected(
    library: Any, limiter: Limiter
) -> None:
    """A body that the transport has read can be sent again, through a paced transport, too."""

    async def answer(request: Any) -> Any:
        body = await request.aread()
        if request.url.path == "/old":
            return library.Response(307, headers={"location": "/new"})
        return library.Response(200, content=body)

    async def parts() -> Any:
        yield b"hel"
        yield b"lo"

    async with client_over(library, limiter, answer) as client:
        reply = await client.post("https://x.test/old", content=parts(), follow_redirects=True)

    assert reply.content == b"hello"


def test_synchronous_upload_that_was_read_can_be_redirected(library: Any, limiter: Limiter) -> None:
    """It can be sent again, as with an asynchronous client."""

    def answer(request: Any) -> Any:
        body = request.read()
        if request.url.path == "/old":
            return library.Response(307, headers={"location": "/new"})
        return library.Response(200, content=body)

    paced = limiter.transport_sync(library.MockTransport(answer))
    with library.Client(transport=paced) as client:
        reply = client.post(
            "https://x.test/old", content=iter([b"hel", b"lo"]), follow_redirects=True
        )

    assert reply.content == b"hello"


async def test_inner_transports_response_is_returned_as_is(library: Any, limiter: Limiter) -> None:
    """The same response object comes back, so extensions and subclasses survive."""
    answer = library.Response(200, stream=chunked(library), extensions={"http_version": b"HTTP/2"})
    paced = limiter.transport(library.MockTransport(giving(answer)))

    got = await paced.handle_async_request(library.Request("GET", URL))

    assert got is answer
    assert isinstance(got.stream, library.AsyncByteStream)
    assert got.http_version == "HTTP/2"
    await got.stream.aclose()


async def test_reply_of_unknown_library_is_returned_unchanged(limiter: Limiter) -> None:
    """A reply with a stream of no known library is passed on unchanged, and holds no slot."""

    class Foreign:
        status_code = 200
        headers = {"x-ratelimit-remaining-requests": "5"}  # noqa: RUF012 - a plain mapping will do
        stream = object()
        is_closed = False

    class Inner:
        async def handle_async_request(self, _: Any) -> Any:
            return Foreign

    got = await limiter.transport(Inner()).handle_async_request(httpx.Request("GET", URL))

    assert got is Foreign
    assert in_flight(limiter) == 0


def test_closing_body_while_lock_is_held_does_not_deadlock(library: Any, limiter: Limiter) -> None:
    """The collector may close the reader of a refusal at any point, even while the lock is held."""

    class Body(library.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            yield b"a"
            yield b"b"

    refusal = library.Response(429, stream=Body(), headers={"retry-after": "60"})
    inner = library.MockTransport(giving(refusal))
    with library.Client(transport=limiter.transport_sync(inner)) as client:
        reply = client.send(client.build_request("GET", URL), stream=True)
        chunks = iter(reply.stream)
        assert next(chunks) == b"a"
        with limiter._node.pacer.lock:
            chunks.close()
        assert in_flight(limiter) == 1
        reply.close()
        assert in_flight(limiter) == 0
        assert limiter.statistics().upstream_429 == 1


@pytest.mark.real_clock
async def test_reply_dropped_by_real_client_gives_its_slot_back(
    library: Any, limiter: Limiter
) -> None:
    """It comes back though the pool keeps the request for as long as its connection is in use."""
    headers = {"authorization": "Bearer k"}
    with RateLimitedProvider() as provider:
        url = f"{provider.base_url}/chat/completions"
        async with library.AsyncClient(transport=limiter.transport(), headers=headers) as client:
            await client.send(client.build_request("POST", url, json=BODY), stream=True)
            gc.collect()
            assert in_flight(limiter) == 0
        with library.Client(transport=limiter.transport_sync(), headers=headers) as client:
            client.send(client.build_request("POST", url, json=BODY), stream=True)
            gc.collect()
            assert in_flight(limiter) == 0


@pytest.mark.real_clock
async def test_stream_event_reaches_client_before_next_is_sent(limiter: Limiter) -> None:
    """Nothing is buffered: the server sends its second event once the client has seen the first.

    This runs on the real clock, because real sockets must not wait.
    """
    seen = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\n")
        await asyncio.wait_for(seen.wait(), 10)
        writer.write(b"data: 2\n\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, limiter.http_client() as client:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        lines = []
        async with client.stream("GET", url) as reply:
            async for line in reply.aiter_lines():
                lines.append(line)
                seen.set()

    assert lines == ["data: 1", "", "data: 2", ""]


@pytest.mark.real_clock
async def test_waiting_in_queue_does_not_use_up_request_timeout(library: Any) -> None:
    """A timeout begins when a request is sent; it is the socket's, hence the real clock."""
    limiter = Limiter(concurrency=1)
    headers = {"authorization": "Bearer k"}
    with RateLimitedProvider(latency=0.15) as provider:
        url = f"{provider.base_url}/chat/completions"
        client = library.AsyncClient(transport=limiter.transport(), headers=headers, timeout=0.4)
        async with client:
            replies = await asyncio.gather(*(client.post(url, json=BODY) for _ in range(4)))
            assert [reply.status_code for reply in replies] == [200] * 4
            with pytest.raises(library.ReadTimeout):
                await client.post(url, json=BODY, timeout=0.05)

    assert in_flight(limiter) == 0
    assert provider.statistics().peak_in_flight == 1


async def test_call_to_openai_host_is_charged_as_openai_does(
    library: Any, limiter: Limiter
) -> None:
    """A call to OpenAI is charged as OpenAI charges it: the larger of prompt and max_tokens."""
    async with client_over(library, limiter, answering(library, REPLY)) as client:
        await client.post(URL, json=BODY)
        assert used(limiter, "tokens") == 300
        await client.post(URL, json={**BODY, "max_tokens": 20})
        assert used(limiter, "tokens") == 300 + 100


async def test_openai_call_settles_output_tokens_but_not_tokens(library: Any) -> None:
    """Tokens stay charged as OpenAI counts them on arrival; a limit of output follows the usage."""
    limiter = Limiter("10k TPM", "10k OTPM")
    async with client_over(library, limiter, answering(library, REPLY)) as client:
        await client.post(URL, json=BODY)

    assert used(limiter, "tokens") == 300
    assert used(limiter, "output_tokens") == 7


async def test_reply_usage_settles_the_lease(library: Any, limiter: Limiter) -> None:
    """Where a provider corrects its count to the actual use, so does the limiter."""
    client = client_over(library, limiter, answering(library, REPLY), profile="groq")
    async with client, client.stream("POST", URL, json=BODY) as reply:
        assert used(limiter, "tokens") == 400
        await reply.aread()

    assert used(limiter, "tokens") == 97


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/batches/b1"),
        ("GET", "/v1/responses/r1"),
        ("GET", "/v1/files/f1/content"),
        ("POST", "/v1/batches/b1/cancel"),
        ("POST", "/v1/responses/r1/cancel"),
        ("POST", "/v1/chat/completions/c1"),
        ("POST", "/v1/threads/t1/runs/r1"),
        ("POST", "/v1/sessions/s1"),
        ("POST", "/v1/sessions/s1/archive"),
    ],
)
async def test_usage_in_retrieved_results_is_not_charged_again(
    library: Any, method: str, path: str
) -> None:
    """The usage of a batch or a stored reply is that of other calls; forecasts ignore it."""
    limiter = Limiter("200k TPM", "100k ITPM", "100k OTPM")
    answer = answering(
        library, b'{"usage":{"input_tokens":5000000,"output_tokens":9000,"total_tokens":5009000}}'
    )
    async with client_over(library, limiter, answer, profile="generic") as client:
        await client.request(method, f"http://127.0.0.1{path}")
        assert [each.used for each in limiter.statistics().limits] == [0, 0, 0]

        async with client.stream("POST", URL, json={"messages": []}):
            assert used(limiter, "output_tokens") == 256


async def test_usage_with_only_a_total_counts_as_input(library: Any) -> None:
    """Rerankers and embeddings may report only the total; it does not count as a reply's length."""
    limiter = Limiter("100k ITPM", "100k OTPM")
    answer = answering(library, b'{"usage":{"total_tokens":900}}')
    async with client_over(library, limiter, answer, profile="generic") as client:
        await client.post("http://127.0.0.1/v1/rerank", json={"documents": ["x" * 400]})
        assert (used(limiter, "input_tokens"), used(limiter, "output_tokens")) == (900, 0)

        async with client.stream("POST", URL, json={"messages": []}):
            assert used(limiter, "output_tokens") == 256


async def test_last_stream_event_settles_even_if_client_stops_at_done(
    library: Any, limiter: Limiter
) -> None:
    """The usage is found in the last chunk of a stream, even if the client stops at [DONE]."""
    events = [
        b'data: {"choices":[{"delta":{"content":"hi \\"usage\\":{"}}],"usage":null}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":90,"completion_tokens":7,"total_tok',
        b'ens":97}}\n\ndata: [DONE]\n\n',
        b": never asked for",
    ]
    async with (
        client_over(library, limiter, answering(library, *events), profile="generic") as client,
        client.stream("POST", URL, json={**BODY, "stream": True}) as reply,
    ):
        async for chunk in reply.aiter_raw():
            if b"[DONE]" in chunk:
                break

    assert used(limiter, "tokens") == 97
    assert in_flight(limiter) == 0


async def test_last_stream_event_of_any_length_settles(library: Any, limiter: Limiter) -> None:
    """OpenAI's last event of a response repeats all of it, and clients stop reading there."""
    last = b'data: {"type":"response.completed","response":{"output":["%b"],"usage":%b}}\n\n'
    usage = b'{"input_tokens":90,"output_tokens":7,"total_tokens":97}'
    answer = answering(library, b"event: response.completed\n", last % (b"x" * 9_000, usage), b":")
    client = client_over(library, limiter, answer, profile="generic")
    async with client, client.stream("POST", URL, json={**BODY, "stream": True}) as reply:
        async for chunk in reply.aiter_raw():
            if b"usage" in chunk:
                break

    assert used(limiter, "tokens") == 97


@pytest.mark.parametrize("encoding", ["identity", "deflate"])
@pytest.mark.parametrize("cut", [0, 21, 70, 95])
async def test_first_stream_event_counts_however_stream_is_chunked(
    library: Any, cut: int, encoding: str
) -> None:
    """Anthropic's first event has the input tokens; split or compressed, they are still counted."""
    limiter = Limiter("10k ITPM", "10k OTPM")
    start = (
        b'event: message_start\ndata: {"type":"message_start",'
        b'"message":{"usage":{"input_tokens":90,"output_tokens":1}}}\n\n'
    )
    text = b'data: {"type":"content_block_delta","delta":{"text":"blue"}}\n\n' * 2_000
    end = b'data: {"type":"message_delta","usage":{"output_tokens":7}}\n\n'
    sent = start + text + end
    if encoding == "deflate":
        sent = zlib.compress(sent)
    chunks = sent[:cut], sent[cut:-99], sent[-99:]
    answer = answering(library, *chunks, content_encoding=encoding)
    async with client_over(library, limiter, answer, profile="anthropic") as client:
        await client.post(URL, json={**BODY, "stream": True})

    assert used(limiter, "input_tokens") == 90
    assert used(limiter, "output_tokens") == 7


async def test_stream_cut_off_stays_charged_as_reserved(library: Any, limiter: Limiter) -> None:
    """The usage at the beginning of a stream is not complete, so the reservation stays."""
    start = b'data: {"type":"message_start","message":{"usage":{"input_tokens":9,"output_tokens":1}}}\n\n'
    text = b'data: {"text":"ends by \\"message_stop\\", [DONE] or response.completed"}\n\n'
    client = client_over(library, limiter, answering(library, start, text), profile="generic")
    async with client, client.stream("POST", URL, json={**BODY, "stream": True}) as reply:
        async for chunk in reply.aiter_raw():
            if chunk == text:
                break

    assert used(limiter, "tokens") == 400


async def test_long_reply_settles_by_usage_at_its_end(library: Any, limiter: Limiter) -> None:
    """After megabytes of vectors, the usage is found in the part of the end that is kept."""
    chunks = [b'{"data":[', *(b"0.123456789," * 1_000 for _ in range(100)), b"0],", REPLY[1:]]
    client = client_over(library, limiter, answering(library, *chunks), profile="generic")
    async with client:
        reply = await client.post(URL, json=BODY)

    assert reply.content == b"".join(chunks)
    assert used(limiter, "tokens") == 97


async def test_long_reply_settles_by_usage_at_its_beginning(library: Any, limiter: Limiter) -> None:
    """If the usage comes first and megabytes follow, it is found as well."""
    chunks = [REPLY[:-1] + b',"data":[', *(b"0.123456789," * 1_000 for _ in range(100)), b"0]}"]
    client = client_over(library, limiter, answering(library, *chunks), profile="generic")
    async with client:
        await client.post(URL, json=BODY)

    assert used(limiter, "tokens") == 97


async def test_compressed_reply_settles_and_stays_intact(library: Any, limiter: Limiter) -> None:
    """A compressed body is decoded by the client's own library, and passed on as it came."""
    packed = zlib.compress(REPLY)
    answer = answering(library, packed[:20], packed[20:], content_encoding="deflate")
    async with client_over(library, limiter, answer, profile="generic") as client:
        reply = await client.post(URL, json=BODY)

    assert reply.content == REPLY
    assert used(limiter, "tokens") == 97


async def test_compressed_stream_settles_if_client_stops_at_done(
    library: Any, limiter: Limiter
) -> None:
    """A client that closes the reply at [DONE] does not read the end of the compressed data."""
    packer = zlib.compressobj()
    packed = packer.compress(b"data: " + REPLY + b"\n\ndata: [DONE]\n\n")
    packed += packer.flush(zlib.Z_SYNC_FLUSH)
    answer = answering(library, packed, packer.flush(), content_encoding="deflate")
    client = client_over(library, limiter, answer, profile="generic")
    async with client, client.stream("POST", URL, json={**BODY, "stream": True}) as reply:
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                break

    assert used(limiter, "tokens") == 97


@pytest.mark.parametrize("encoding", ["deflate", "gzip, odd"])
async def test_undecodable_reply_stays_charged_as_reserved(
    library: Any, limiter: Limiter, encoding: str
) -> None:
    """A body that can't be decoded is left to the client; the reservation stays."""
    answer = answering(library, b"\x00not compressed", content_encoding=encoding)
    client = client_over(library, limiter, answer, profile="generic")
    async with client, client.stream("POST", URL, json=BODY) as reply:
        assert [chunk async for chunk in reply.aiter_raw()] == [b"\x00not compressed"]

    assert used(limiter, "tokens") == 400


async def test_output_forecast_is_cut_to_what_limits_allow(library: Any) -> None:
    """Only the forecast is cut to what the limits allow; what the request contains is not."""
    limiter = Limiter("300 TPM", "50 OTPM")
    body = {"messages": [{"role": "user", "content": "x" * 400}]}
    async with client_over(
        library, limiter, answering(library, b"{}"), profile="generic"
    ) as client:
        await client.post(URL, json=body)
        assert used(limiter, "tokens") == 150

        body["messages"][0]["content"] = "x" * 4_000
        with pytest.raises(CostExceedsLimit, match="1,000"):
            await client.post(URL, json=body)


async def test_forecast_sum_of_several_replies_is_cut_to_limit(library: Any) -> None:
    """Their sum is cut to what the limits allow, whether or not a profile counts all of them."""
    one = ProviderProfile(name="one", charge=lambda _, foreseen: (0, foreseen, foreseen))
    body = {"messages": [{"role": "user", "content": "x" * 400}], "n": 4}
    for profile, reserved in (("generic", 4 * 12), (one, 50)):
        limiter = Limiter("50 OTPM")
        answer = answering(library, b"{}")
        async with client_over(library, limiter, answer, profile=profile) as client:
            await client.post(URL, json=body)

        assert used(limiter, "output_tokens") == reserved


async def test_forecast_is_per_reply_when_a_call_asks_for_several(library: Any) -> None:
    """After four replies of 1,000 tokens each, four more are expected to take 4,000, not 16,000."""
    limiter = Limiter("100k OTPM")
    reserved: list[int] = []
    limiter.observe(
        lambda event: (
            reserved.append(event.cost["output_tokens"]) if isinstance(event, Admitted) else None
        )
    )
    reply = b'{"usage": {"prompt_tokens": 1, "completion_tokens": 4000, "total_tokens": 4001}}'
    async with client_over(library, limiter, answering(library, reply)) as client:
        for _ in range(2):
            await client.post(
                "https://vllm.test/v1/chat/completions", json={"messages": "x", "n": 4}
            )

    assert reserved == [4 * 256, 4 * 1000]


async def test_forecast_and_usage_respect_tenants_own_limits(library: Any) -> None:
    """A forecast makes no call of a tenant impossible, and usage settles the tenant's charge."""
    limiter = Limiter("1000 RPM burst 1000")
    limiter.per_key("200 TPM")
    async with client_over(library, limiter, answering(library, REPLY)) as client:
        for name in ("acme", "other"):
            with tenant(name):
                await client.post("https://vllm.test/v1/chat/completions", json={"messages": "x"})

    assert used(limiter.key("acme"), "tokens") == used(limiter.key("other"), "tokens") == 97


async def test_headers_of_refusal_are_read_at_once(library: Any) -> None:
    """The headers of a 429 are read even when replies follow each other closely."""
    limiter = Limiter("500 RPM burst 500")
    left = iter(["400", "300", "200"])
    status = iter([200, 200, 429])

    def answer(_: Any) -> Any:
        headers = {"x-ratelimit-remaining-requests": next(left), "retry-after-ms": "1"}
        return library.Response(next(status), headers=headers, stream=chunked(library, b"{}"))

    async with client_over(library, limiter, answer) as client:
        for _ in range(3):
            await client.get(URL)

    assert limiter.statistics().limits[0].available <= 200


async def test_custom_profile_prices_and_settles_calls(library: Any) -> None:
    """A short class describes another provider: its prices, its headers, and what is free."""

    class Pictures:
        name = "pictures"
        settles = frozenset({"images"})
        tells = (Told("images", per=60, remaining="x-left"),)

        def cost(self, call: Call) -> Cost | None:
            return Cost(images=call.body.get("n", 1)) if call.method == "POST" else None

        def settled(self, call: Call, usage: Usage) -> dict[str, int]:
            assert usage.total == 97
            return {"images": 1} if call.body else {}

    limiter = Limiter("20 images/minute")
    answer = answering(library, REPLY, x_left="12")
    async with client_over(library, limiter, answer, profile=Pictures()) as client:
        await client.get("https://pictures.test/")
        assert limiter.statistics().admitted == 0
        await client.post("https://pictures.test/", json={"n": 3})

    (images,) = limiter.statistics().limits
    assert images.used == 1
    assert images.available in (11, 12)  # as the last reply says, if its headers were read


async def test_call_of_wrapped_model_is_charged_once_and_warns_once(
    library: Any, limiter: Limiter, caplog: pytest.LogCaptureFixture
) -> None:
    """Under a wrapped model of the same limiter, a transport only reads headers, and warns once."""
    answer = answering(library, REPLY, x_ratelimit_remaining_requests="40")
    async with client_over(library, limiter, answer) as client:
        with await limiter.acquire(tokens=5) as lease, holding(HeldLease(limiter, lease)):
            await client.post(URL, json=BODY)
            await client.post(URL, json=BODY)

    assert limiter.statistics().admitted == 1
    assert limiter.statistics().limits[0].available == 40
    (record,) = caplog.records
    assert "calls are charged once, by the model" in record.message
    assert "give it a plain client" in record.message


@pytest.mark.parametrize("paid_above", [False, True])
@pytest.mark.parametrize(("status", "lifts"), [(502, False), (200, True)])
async def test_only_successful_reply_lifts_first_calls_cap(
    library: Any, status: int, *, lifts: bool, paid_above: bool
) -> None:
    """A gateway's error is no answer of the provider; a reply is, whoever has paid for the call."""
    limiter = Limiter("600 RPM burst 600")
    client = client_over(library, limiter, answering(library, status=status), profile="openai")
    lease = await limiter.acquire() if paid_above else None
    with contextlib.nullcontext() if lease is None else holding(HeldLease(limiter, lease)):
        await client.post(URL, json=BODY)
    await client.aclose()

    assert (limiter.statistics().limits[0].available > 10) is lifts


async def test_new_limiter_per_request_warns_once(
    library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It warns after ten alike for one key and host, not for children, or many keys or hosts."""
    shared, answer = Limiter("600 RPM", name="shared"), answering(library, REPLY)
    for number in range(30):
        for limiter, url, headers in (
            (Limiter("600 RPM", name="openai"), URL, {"authorization": "Bearer secret"}),
            (Limiter("600 RPM", name="many"), URL, {"api-key": f"{number}"}),
            (Limiter("600 RPM", name="many"), f"http://{number}.test/v1", {"x-api-key": "k"}),
            (Limiter("600 RPM", name="many"), URL, {}),
            (shared.child(f"{number}"), URL, {"authorization": "Bearer secret"}),
            (shared, URL, {"authorization": "Bearer secret"}),
        ):
            async with client_over(library, limiter, answer) as client:
                await client.post(url, json=BODY, headers=headers)

    (record,) = caplog.records
    assert record.getMessage().startswith("10 limiters like <Limiter 'openai', 600 requests per 60")
    assert "make it and its client once, when the program starts" in record.getMessage()
    assert "secret" not in record.getMessage()


async def test_parents_transport_does_not_charge_call_of_childs_model_again(
    library: Any, limiter: Limiter
) -> None:
    """A child's lease counts at its parent, so the parent's transport below lets the call pass."""
    child = limiter.child("chat")
    async with client_over(library, limiter, answering(library, REPLY)) as client:
        with await child.acquire(tokens=5) as lease, holding(HeldLease(child, lease)):
            await client.post(URL, json=BODY)

    assert limiter.statistics().admitted == child.statistics().admitted == 1


async def test_route_to_child_does_not_deadlock_on_slot_held_by_model(
    library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """With one slot, a route to a child would wait for ever for the slot that the model holds."""
    limiter = Limiter("60 RPM", concurrency=1, name="openai")
    child = limiter.child("chat")
    transport = limiter.transport(
        library.MockTransport(answering(library, REPLY)), routes={"/v1/*": "chat"}
    )
    async with library.AsyncClient(transport=transport) as client:
        with await limiter.acquire(tokens=5) as lease, holding(HeldLease(limiter, lease)):
            await client.post(URL, json=BODY)
            await client.post(URL, json=BODY)

    assert limiter.statistics().admitted == 1
    assert child.statistics().admitted == 0
    (record,) = caplog.records
    assert "so the limits of 'openai/chat' are not kept; wrap the model by that" in record.message


def test_synchronous_call_under_a_lease_is_charged_once(library: Any, limiter: Limiter) -> None:
    """Synchronous transports, too, let a call pass that a lease above has paid for."""
    inner = library.MockTransport(answering(library, REPLY))
    with (
        library.Client(transport=limiter.transport_sync(inner)) as client,
        limiter.acquire_sync(tokens=5) as lease,
        holding(HeldLease(limiter, lease)),
    ):
        client.post(URL, json=BODY)

    assert limiter.statistics().admitted == 1


async def test_transport_around_transport_of_same_limiter_charges_once(
    library: Any, limiter: Limiter, caplog: pytest.LogCaptureFixture
) -> None:
    """A paced transport around a paced transport of the same limiter acts as one."""
    inner = library.MockTransport(answering(library, b"{}"))
    outer = limiter.transport(limiter.transport(inner))
    async with library.AsyncClient(transport=outer) as client:
        await client.get(URL)

    assert outer.inner is inner
    assert limiter.statistics().admitted == 1
    assert "give the inner transport itself" in caplog.text


async def test_childs_transport_around_parents_charges_once(
    library: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """This happens when tenants share one pool: with one slot, the call would wait for itself."""
    limiter = Limiter("100 RPM", concurrency=1, name="shared")
    child = limiter.child("acme", "50 RPM")
    pool = limiter.transport(library.MockTransport(answering(library, b"{}")))
    async with library.AsyncClient(transport=child.transport(pool)) as client:
        await client.get(URL)

    assert child.statistics().admitted == limiter.statistics().admitted == 1
    assert "of limiter 'shared/acme' is put above one of 'shared'" in caplog.text
    with pytest.raises(ValueError, match="above one of its child 'shared/acme' would charge calls"):
        limiter.transport(child.transport())


async def test_nested_transports_of_two_limiters_charge_both(library: Any) -> None:
    """The limits of a gateway and those of a provider are separate."""
    gateway, provider = (Limiter("9 RPM", name=name) for name in ("gateway", "provider"))
    inner = provider.transport(library.MockTransport(answering(library, b"{}")))
    async with library.AsyncClient(transport=gateway.transport(inner)) as client:
        await client.get(URL)

    assert gateway.statistics().admitted == provider.statistics().admitted == 1


async def test_call_refused_by_inner_limiter_costs_outer_nothing(library: Any) -> None:
    """The call was not sent, so what the outer limiter had booked comes back."""
    gateway, provider = Limiter("9 RPM", name="gateway"), Limiter("9 TPM", name="provider")
    inner = provider.transport(library.MockTransport(answering(library, b"{}")))
    async with library.AsyncClient(transport=gateway.transport(inner)) as client:
        with pytest.raises(CostExceedsLimit):
            await client.post(URL, json=BODY)

    assert (used(gateway, "requests"), in_flight(gateway)) == (0, 0)


async def test_sdk_retries_are_charged_and_warned_about_once(
    library: Any, limiter: Limiter, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says how to turn off an SDK's own retries; each attempt is charged."""
    async with client_over(library, limiter, answering(library, b"{}", status=500)) as client:
        for attempt in range(3):
            await client.get(URL, headers={"x-stainless-retry-count": str(attempt)})

    assert limiter.statistics().admitted == 3
    (record,) = caplog.records
    assert "pass max_retries=0 to the SDK" in record.message


async def test_first_request_selects_inner_transport(library: Any, limiter: Limiter) -> None:
    """Without an inner transport, a request of httpx2 is sent by httpx2, one of httpx by httpx."""
    paced = limiter.transport()
    sync = limiter.transport_sync()
    assert "above transport" in repr(paced)
    await paced.aclose()
    sync.close()
    with RateLimitedProvider() as provider:
        async with library.AsyncClient(transport=paced) as client:
            assert (await client.get(provider.base_url)).status_code == 401
        with library.Client(transport=sync) as client:
            reply = await asyncio.to_thread(client.get, provider.base_url)
            assert reply.status_code == 401

    assert type(paced.inner.current()) is library.AsyncHTTPTransport
    assert type(sync.inner) is library.HTTPTransport
    assert "above PerLoopTransport" in repr(paced)


def test_first_requests_on_several_threads_share_one_inner_transport(
    library: Any, limiter: Limiter
) -> None:
    """Otherwise the connections of the other one would not be closed with the client."""
    paced, made, arrived = limiter.transport_sync(), [], threading.Barrier(2)

    def make(_: str) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            arrived.wait(0.2)  # for another thread that makes one, too
        made.append(library.MockTransport(answering(library, b"ok")))
        return made[-1]

    paced._make = make  # slow, so that another thread can come meanwhile
    with library.Client(transport=paced) as client, ThreadPoolExecutor(2) as threads:
        assert [each.status_code for each in threads.map(client.get, [URL, URL])] == [200, 200]

    assert made == [paced.inner]


async def test_named_family_makes_inner_transport_at_once(limiter: Limiter) -> None:
    """`family=` makes that library's inner transport at once."""
    paced = limiter.transport(family="httpx2")

    assert type(paced.inner.current()) is httpx2.AsyncHTTPTransport
    await paced.aclose()


async def test_request_of_unknown_library_is_refused(limiter: Limiter) -> None:
    """A request of neither httpx nor httpx2 can't be sent; the error says so."""
    with pytest.raises(TypeError, match="sends requests of httpx or httpx2, not object"):
        await limiter.transport().handle_async_request(object())


def test_wrong_argument_error_names_accepted_ones(limiter: Limiter) -> None:
    """Each error says what would have been accepted."""
    with pytest.raises(ValueError, match="family must be auto, httpx or httpx2, not 'requests'"):
        limiter.transport(family="requests")
    with pytest.raises(ValueError, match="no profile is called 'acme'; known: openai, azure"):
        limiter.transport(profile="acme")
    with pytest.raises(TypeError, match="profile must be a provider's name or a Profile, not 5"):
        limiter.transport(profile=5)
    with pytest.raises(TypeError, match=r"or a Profile, not <class '.*ProviderProfile'>"):
        limiter.transport(profile=ProviderProfile)
    with pytest.raises(TypeError, match=r"not <class 'httpx\.AsyncHTTPTransport'>"):
        limiter.transport(httpx.AsyncHTTPTransport)
    with pytest.raises(TypeError, match=r"transport with handle_async_request\(\), not object"):
        limiter.transport(object())
    with pytest.raises(TypeError, match=r"transport with handle_request\(\), not object"):
        limiter.transport_sync(object())


@pytest.mark.heavy
async def test_transport_remembers_at_most_256_hosts(limiter: Limiter) -> None:
    """A crawler that visits many hosts does not fill the memory."""
    async with client_over(httpx, limiter, answering(httpx, b""), learn=False) as client:
        for number in range(300):
            await client.get(f"https://host{number}.test/")

        assert len(client._transport._reader._profiles) == 256


async def test_booking_is_dated_when_async_request_is_sent(library: Any) -> None:
    """Connecting takes time, and a provider counts a request when it arrives."""
    clock = VirtualClock()
    limiter = Limiter("1 requests/10s", clock=clock)
    sent = []

    class Slow(library.AsyncBaseTransport):  # type: ignore[misc]
        async def handle_async_request(self, request: Any) -> Any:
            clock.advance(5.0)
            sent.extend([chunk async for chunk in request.stream])
            return library.Response(200)

    async with library.AsyncClient(transport=limiter.transport(Slow())) as client:
        request = client.build_request("POST", URL, json=BODY)
        body = request.stream
        await client.send(request)

    assert b"".join(sent) == request.content
    assert request.stream is body
    clock.advance(6.0)
    with pytest.raises(WouldBlock) as refused:
        limiter.acquire_nowait()
    assert refused.value.retry_after == pytest.approx(4.0, abs=0.1)


def test_booking_is_dated_when_synchronous_request_is_sent(library: Any) -> None:
    """Sending dates it, as on an event loop; a request that leaves at once keeps its date."""
    clock = VirtualClock()
    limiter = Limiter("2 requests/10s burst 2", clock=clock)
    waits = [0.0, 5.0]

    class Slow(library.BaseTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            clock.advance(waits.pop(0))
            assert b"".join(request.stream) == request.content
            request.stream.close()
            return library.Response(200)

    with library.Client(transport=limiter.transport_sync(Slow(), learn=False)) as client:
        for _ in range(2):
            client.post(URL, json=BODY)

    clock.advance(5.1)
    assert limiter.statistics().limits[0].used == 1
    clock.advance(4.0)
    assert limiter.statistics().limits[0].used == 1
    clock.advance(2.0)
    assert limiter.statistics().limits[0].used == 0


async def test_inner_transport_can_close_streamed_upload(library: Any, limiter: Limiter) -> None:
    """The inner transport can close it, as it can without the paced one."""
    body = chunked(library, b"a", b"b")

    class Closing(library.AsyncBaseTransport):  # type: ignore[misc]
        async def handle_async_request(self, request: Any) -> Any:
            assert [chunk async for chunk in request.stream] == [b"a", b"b"]
            await request.stream.aclose()
            return library.Response(200)

    async with library.AsyncClient(transport=limiter.transport(Closing())) as client:
        await client.send(library.Request("POST", URL, stream=body))

    assert body.closed
