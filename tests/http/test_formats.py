"""Calls are settled by their usage in every provider's own format."""

import base64
from typing import Any

import pytest

from asyncbucket import Limiter
from tests.http.conftest import answering, client_over, data, filled_in, used

FORMATS = data("formats")
STANDS_FOR = {"TEXT": "x" * 400, "FILL": "0," * 50_000, "EVENT": "\0\0\1\r:event-type\7\0"}


def reply_of(entry: dict[str, Any]) -> str:
    packed = (base64.b64encode(event.encode()).decode() for event in entry.get("packed", ()))
    events = (f'EVENT{{"bytes":"{event}","p":"a"}}' for event in packed)
    return filled_in(entry.get("reply") or "".join(events), STANDS_FOR)


def counted(limiter: Limiter) -> tuple[int, int]:
    return used(limiter, "input_tokens"), used(limiter, "output_tokens")


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("name", "ends"),
    [*((name, True) for name in FORMATS), *((name, False) for name in FORMATS if "stream" in name)],
)
async def test_usage_settles_when_read(library: Any, name: str, *, ends: bool, cut: bool) -> None:
    """Clients read a stream no further than the event that ends it, though the reply may go on."""
    entry, answer = FORMATS[name], reply_of(FORMATS[name])
    if cut:
        answer = answer[: answer.find('"bytes"' if "packed" in entry else "90") + 1]
    data = answer.encode()
    pieces = [data[at : at + 50] for at in range(0, len(data), 50)]
    limiter = Limiter("10k ITPM", "10k OTPM")
    reserved = (100, 0 if "embeddings" in name else 300)
    answers = answering(library, *pieces, *([] if ends else [b"\n"]))
    url, body = f"http://llm.test{entry['path']}", filled_in(entry["body"], STANDS_FOR)
    async with (
        client_over(library, limiter, answers) as client,
        client.stream("POST", url, content=body) as reply,
    ):
        assert counted(limiter) == reserved
        seen = b""
        async for chunk in reply.aiter_raw():
            seen += chunk
            if not ends and len(seen) == len(data):
                break
    assert counted(limiter) == (reserved if cut else (90, min(reserved[1], 7)))


async def test_usage_in_a_models_words_or_in_no_base64_does_not_count(library: Any) -> None:
    reply = (
        b'{"content":[{"type":"tool_use","input":{"usage":{"input_tokens":5000}}}],'
        b'"usage":{"input_tokens":90,"output_tokens":7},"bytes":"QQ","a":{"bytes":"AA__"}}'
    )
    limiter = Limiter("10k ITPM", "10k OTPM")
    async with client_over(library, limiter, answering(library, reply)) as client:
        await client.post("http://llm.test/v1/messages", json={"max_tokens": 9})
    assert counted(limiter) == (90, 7)
