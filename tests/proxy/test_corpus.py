"""Requests as attackers and broken programs send them: refused clearly, and nothing is kept.

Raw bytes to a real server on loopback, on the machine's clock.
"""

import asyncio
from typing import Any, Final

import pytest

from tests.conftest import until
from tests.proxy.conftest import Proxied, Upstream, proxied

pytestmark = pytest.mark.real_clock

HOST: Final = b"host: localhost\r\n"
CLOSE: Final = HOST + b"connection: close\r\n"
CHUNKED: Final = b"transfer-encoding: chunked\r\n"
BODY: Final = b"2\r\n{}\r\n0\r\n\r\n"
DOTS: Final = (
    *("/..", "/.", "/v1/./x", "/v1/../x", "/%2e%2e/x", "/%2E./x", "/.%2e", "/%252e%252e/x"),
    *("/..;/x", "/..;a=b/x", "/%2e%2e%3b/x", "/\\..\\x", "/x%5c..%5cy", "/x%2f..%2fy"),
    "/%25252525252e/x",
)


async def exchanged(proxy: Proxied, sent: bytes) -> bytes:
    """Return all that the proxy answers until it closes the connection."""
    reader, writer = await proxy.connect()
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


async def test_whatever_decodes_to_a_dot_segment_is_refused(upstream: Upstream) -> None:
    async with proxied(f"{upstream.url}/base") as proxy:
        for path in DOTS:
            told = await exchanged(proxy, b"GET %b HTTP/1.1\r\n%b\r\n" % (path.encode(), CLOSE))
            assert told.startswith(b"HTTP/1.1 400 "), path
            assert b"a path with . or .. as a segment is refused" in told, path
    assert upstream.calls == 0


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET http://evil.example/v1 HTTP/1.1\r\n" + CLOSE, 400),
        (b"GET http://user:pass@evil.example/ HTTP/1.1\r\n" + CLOSE, 400),
        (b"CONNECT evil.example:443 HTTP/1.1\r\n" + CLOSE, 400),
        (
            b"POST /x HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n" + CLOSE + b"\r\n{}",
            400,
        ),
        (b"POST /x HTTP/1.1\r\ncontent-length: 2\r\n" + CHUNKED + CLOSE + b"\r\n" + BODY, 400),
        (b"POST /x HTTP/1.1\r\ncontent-length: -2\r\n" + CLOSE, 400),
        (b"POST /x HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n" + CLOSE + b"\r\n" + BODY, 400),
        (b"GET /x HTTP/1.1\r\nx: " + b"x" * 65_536 + b"\r\n" + CLOSE, 431),
        (b"GET /x y HTTP/1.1\r\n" + CLOSE, 400),
        (b"GET /x HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n", 400),
        (b"GET /x HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n", 403),
        (b"GET /x HTTP/1.1\r\nhost: user@evil.example\r\nconnection: close\r\n", 403),
        (b"\x16\x03\x01\x02\x00\x01", 400),
    ],
)
async def test_malformed_request_goes_nowhere(upstream: Upstream, sent: bytes, status: int) -> None:
    async with proxied(upstream.url) as proxy:
        told = await exchanged(proxy, sent + b"\r\n" * (not sent.endswith(b"\r\n\r\n")))
        await proxy.until(in_flight=0, waiting=0)
    assert told.startswith(b"HTTP/1.1 %d " % status)
    assert upstream.calls == 0


@pytest.mark.parametrize(
    ("sent", "target"),
    [
        (b"GET //evil.example/x HTTP/1.1\r\n" + CLOSE, "//evil.example/x?"),
        (b"GET /@evil.example/x?a=http://evil.example HTTP/1.1\r\n" + CLOSE, "/@evil.example/x?a="),
        (b"GET /a%2Fb;c/%2e%2ex HTTP/1.0\r\n" + HOST, "/a%2Fb;c/%2e%2ex?"),
        (b"HEAD /x HTTP/1.1\r\n" + CLOSE, ""),
        (b"GET /x HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade, close\r\n" + HOST, "/x?"),
        (b"POST /x HTTP/1.1\r\n" + CHUNKED + CLOSE + b"\r\n" + BODY, "/x?"),
    ],
)
async def test_unusual_request_goes_on_alone(upstream: Upstream, sent: bytes, target: str) -> None:
    async with proxied(upstream.url) as proxy:
        told = await exchanged(proxy, sent + b"\r\n" * (b"\r\n\r\n" not in sent))
        await proxy.until(in_flight=0)
    assert told.split(b" ", 2)[1] == b"201"
    assert upstream.calls == 1
    assert upstream.targets[0].startswith(target)


@pytest.mark.parametrize("sent", [b"", b"GET /x HT", b"GET /x HTTP/1.1\r\nhost: loc"])
@pytest.mark.parametrize("drips", [False, True])
async def test_head_that_does_not_come_in_time_is_408(
    upstream: Upstream, sent: bytes, drips: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an earlier request on the same connection, too."""
    monkeypatch.setattr("asyncbucket.cli.proxy.app._STALLED", 0.3)
    async with proxied(upstream.url) as proxy:
        reader, writer = await proxy.connect()
        if sent:
            writer.write(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
            await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(sent)

        async def drip() -> None:
            while True:
                await asyncio.sleep(0.02)
                writer.write(b"x")

        dripping = asyncio.ensure_future(drip()) if drips and sent else None
        told = await asyncio.wait_for(reader.readline(), 20)
        if dripping is not None:
            dripping.cancel()
        writer.close()
    assert told.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert upstream.calls == bool(sent)


@pytest.mark.parametrize(
    ("path", "cut"), [*(("hangs", n) for n in (1, 20, 60, 90)), ("endless", 90)]
)
async def test_caller_that_hangs_up_keeps_nothing(upstream: Upstream, path: str, cut: int) -> None:
    async with proxied(upstream.url, concurrency=1) as proxy:
        head = f"POST /{path} HTTP/1.1\r\ncontent-length: 9\r\n".encode()
        whole = head + HOST + b'\r\n{"a": 12}'
        _, writer = await proxy.connect()
        writer.write(whole[:cut])
        if cut >= len(whole):
            await until(lambda: upstream.calls)
        writer.close()
        await proxy.until(in_flight=0, waiting=0, admitted=upstream.calls)
        if upstream.calls:
            await asyncio.wait_for(upstream.is_cut_off.wait(), 20)


async def test_operator_says_how_often_a_call_goes_out() -> None:
    """The connection breaks after the body was sent: the provider may have done the work."""
    calls = 0

    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        await reader.readuntil(b"{}")
        calls += 1
        writer.close()

    async with await asyncio.start_server(broken, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with proxied(url, retries=0) as proxy:
            reply = await proxy.client.post("/x", content=b"{}")
    assert (reply.status_code, calls) == (502, 1)
