"""The provider as a MockTransport: the same replies without a server, also on virtual time."""

import asyncio
import sys
from importlib import import_module
from typing import Any

import pytest

from asyncbucket.testing import RateLimitedProvider

FAMILIES = ["httpx", "httpx2"]
CALL: dict[str, Any] = {
    "model": "gpt-4o-mini",
    "messages": [{"role": "user", "content": "Is 7 prime?"}],
    "max_tokens": 50,
}
HEADERS = {"authorization": "Bearer any"}


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


each_family = pytest.mark.parametrize("library", FAMILIES, indirect=True)


def client_of(provider: RateLimitedProvider, library: Any) -> Any:
    return library.AsyncClient(
        transport=provider.mock_transport(family=library.__name__),
        base_url="http://provider/v1/",
        headers=HEADERS,
    )


@each_family
async def test_mocked_reply_matches_that_of_the_server(library: Any) -> None:
    provider = RateLimitedProvider(rpm=2, policy="sliding_window")
    async with client_of(provider, library) as client:
        mocked = await client.post("chat/completions", json=CALL)
    async with provider, library.AsyncClient(headers=HEADERS) as client:
        real = await client.post(f"{provider.base_url}/chat/completions", json=CALL)
    async with client_of(provider, library) as client:
        refused = await client.post("chat/completions", json=CALL)
    assert mocked.status_code == real.status_code == 200
    assert mocked.json()["choices"] == real.json()["choices"]
    assert set(mocked.headers) == set(real.headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")


@each_family
async def test_cancelled_call_leaves_no_task_or_slot(library: Any) -> None:
    provider = RateLimitedProvider(latency=30.0)
    async with client_of(provider, library) as client:
        call = asyncio.create_task(client.post("chat/completions", json=CALL))
        while not provider.statistics().in_flight:  # noqa: ASYNC110 - two turns of this loop
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert provider.statistics().in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


@each_family
async def test_stream_that_breaks_off_raises_remote_protocol_error(library: Any) -> None:
    provider = RateLimitedProvider()
    provider.fail_next(2, after_chunks=2)
    async with client_of(provider, library) as client:
        with pytest.raises(library.RemoteProtocolError, match="closed in a stream"):
            await client.post("chat/completions", json={**CALL, "stream": True})
        assert (await client.post("chat/completions", json=CALL)).status_code == 500  # no stream
    assert (provider.statistics().errors, provider.statistics().in_flight) == (2, 0)


@each_family
async def test_sync_client_can_use_mock_while_an_event_loop_runs(library: Any) -> None:
    transport = RateLimitedProvider().mock_transport(family=library.__name__, sync=True)
    with library.Client(transport=transport, headers=HEADERS) as client:
        assert client.post("http://provider/v1/chat/completions", json=CALL).status_code == 200


async def test_latency_that_raises_frees_slot() -> None:
    def broken() -> float:
        raise LookupError("no more latencies")

    provider = RateLimitedProvider(latency=broken)
    async with client_of(provider, import_module("httpx")) as client:
        with pytest.raises(LookupError):
            await client.post("chat/completions", json=CALL)
    assert provider.statistics().in_flight == 0


def test_unknown_or_missing_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = "requests"
    with pytest.raises(ValueError, match="family must be httpx or httpx2, not 'requests'"):
        RateLimitedProvider().mock_transport(family=family)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match="pip install httpx2"):
        RateLimitedProvider().mock_transport(family="httpx2")
