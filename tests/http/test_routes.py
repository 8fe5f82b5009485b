"""A transport sends each request to a child, chosen by the request's path and model."""

from typing import Any

import pytest

from asyncbucket import Limiter
from asyncbucket.http import Call
from asyncbucket.testing import VirtualClock
from tests.http.conftest import answering, client_over

HOST = "https://api.openai.com"
CHAT = "/v1/chat/completions"


async def send(library: Any, limiter: Limiter, routes: Any, *calls: tuple[str, str]) -> None:
    async with client_over(library, limiter, answering(library, b"{}"), routes=routes) as client:
        for path, model in calls:
            await client.post(HOST + path, json={"model": model, "input": "x", "max_tokens": 9})


async def test_request_is_routed_to_child_by_path_or_model(library: Any) -> None:
    limiter = Limiter("500 RPM", name="openai")
    for name in ("big", "vectors", "answers"):
        limiter.child(name)
    routes = {
        "/v1/embeddings": "vectors",
        "/v1/responses gpt-4o*": "answers",
        "gpt-4o*": "big",
        "o?-mini": limiter.child("thinking"),
        "gpt-4*": None,
    }
    chats = ((CHAT, model) for model in ("gpt-4o-mini", "gpt-4o", "o3-mini", "gpt-4.1"))
    others = (("/v1/responses", "gpt-4o-mini"), ("/v1/responses", "gpt-3.5"))
    await send(library, limiter, routes, ("/v1/embeddings", "gpt-4o"), *chats, *others)
    assert [each.statistics().admitted for each in limiter.children.values()] == [2, 1, 1, 1]
    assert (limiter.statistics().admitted, limiter.statistics().in_flight) == (7, 0)


async def test_routing_function_chooses_child(library: Any) -> None:
    def choose(call: Call) -> str | None:
        return "cheap" if call.body["max_tokens"] < 10 and call.path == CHAT else None

    limiter = Limiter("500 RPM")
    await send(library, limiter, choose, (CHAT, "m"), ("/v1/embeddings", "m"))
    assert limiter.statistics().admitted == 2
    assert limiter.children["cheap"].statistics().admitted == 1


async def test_refusal_pauses_routed_child_but_for_a_tenant_the_whole_key(library: Any) -> None:
    limiter = Limiter("500 RPM", name="openai", clock=VirtualClock())
    big, small, acme = (limiter.child(name) for name in ("big", "small", "acme"))

    def answer(request: Any) -> Any:
        refused = b"gpt-3" not in request.content
        return library.Response(429 if refused else 200, headers={"retry-after": "7"}, json={})

    routes = {"gpt-4o*": "big", "gpt-3*": "small"}
    async with client_over(library, limiter, answer, routes=routes) as client:
        for model in ("gpt-4o", "gpt-3.5"):
            await client.post(HOST + CHAT, json={"model": model})
    paused = [each.statistics().paused for each in (big, small, limiter)]
    assert paused == [pytest.approx(7), 0, 0]
    async with client_over(library, acme, answer) as client:
        await client.post(HOST + CHAT, json={"model": "m"})
    assert limiter.statistics().paused == pytest.approx(7)


PATTERN = r'such as "/v1/chat/completions gpt-4o\*", not '


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        *(({each: "big"}, f"{PATTERN}'{each}'$") for each in ("", "gpt-4o /v1", "/v1 a b")),
        ({5: "big"}, f"{PATTERN}5"),
        (5, "routes must be a mapping such as .*, or a function of the call, not 5"),
        ({"*": Limiter(name="stranger")}, "'stranger' is not a child of 'openai'"),
        ({"*": 5}, "a route must lead to a child or its name, not to 5"),
        ({"*": "bgi"}, r"'openai' has no child 'bgi' .it has: big.: correct the name, or make it"),
    ],
)
def test_route_to_nothing_or_out_of_the_limits_is_refused(routes: Any, message: str) -> None:
    limiter = Limiter("500 RPM", name="openai")
    limiter.child("big", "100 RPM")
    with pytest.raises((TypeError, ValueError), match=message):
        limiter.transport(routes=routes)
    assert list(limiter.children) == ["big"]
