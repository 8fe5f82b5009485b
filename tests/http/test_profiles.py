"""What a call costs at each provider, by the numbers in its documentation."""

import base64
import json
from typing import Any

import pytest

from asyncbucket import Cost, Limiter
from asyncbucket.http import AZURE, GENERIC, OPENAI, Call, Usage
from asyncbucket.providers.profiles import charge, profile_named, profile_of
from asyncbucket.providers.request import read_json, request_size
from asyncbucket.providers.usage import find_usage
from tests.http.conftest import answering, client_over, data, filled_in, used

MESSAGES = [{"role": "user", "content": "x" * 400}]
USAGE = Usage(90, 7, 97)
BODIES = {
    "BASE64": "x" * 8_500,
    "PICTURE": "data:image/png;base64," + "x" * 9_999,
    "VIDEO": "data:video/mp4;base64," + "x" * 8_512,
    "FILE": "data:application/pdf;base64," + "x" * 8_512,
}


def call(path: str = "/v1/chat/completions", *, foreseen: int = 256, **body: Any) -> Call:
    return Call("POST", "host", path, body, foreseen)


def amount(cost: Cost | None, resource: str) -> int:
    assert cost is not None
    return cost[resource]


def test_profile_is_found_by_host_or_name() -> None:
    for name, hosts in {
        "openai": "api.openai.com API.OpenAI.com.",
        "azure": "mine.openai.azure.com",
        "bedrock": "bedrock-runtime.us-east-1.amazonaws.com",
        "vertex": "us-central1-aiplatform.googleapis.com aiplatform.us.rep.googleapis.com",
        "mistral": "api.eu.mistral.ai",
        "generic": "s3.us-east-1.amazonaws.com notapi.openai.com api.openai.com.evil.test",
    }.items():
        assert {profile_of(host) for host in hosts.split()} == {profile_named(name)}


@pytest.mark.parametrize(
    ("profile", "body", "tokens", "output"),
    [
        ("openai", {"max_tokens": 300}, 300, 300),
        ("openai", {"max_tokens": 90, "n": 2}, 180, 180),
        ("openai", {}, 100, 256),
        ("azure", {"max_tokens": 20, "best_of": 3}, 160, 60),
        ("anthropic", {"max_tokens": 8192}, 356, 256),
        ("anthropic", {"max_tokens": 20}, 120, 20),
        ("groq", {"max_completion_tokens": 20}, 120, 20),
        ("gemini", {"max_tokens": 8192}, 100, 8192),
    ],
)
def test_cost_is_the_charge(profile: str, body: dict[str, Any], tokens: int, output: int) -> None:
    cost = profile_named(profile).cost(call(messages=MESSAGES, **body))
    assert cost == Cost(tokens=tokens, input_tokens=100, output_tokens=output)


@pytest.mark.parametrize(
    ("name", "tpm", "tokens"),
    [
        ("bedrock", 500_000, 64_100),
        ("bedrock", 30_000, 30_000),  # the provider may know a lower maximum
        ("xai", 300, 300),  # a mere forecast makes no call impossible
    ],
)
def test_unlimited_reply_reserves_what_limits_can_admit(name: str, tpm: int, tokens: int) -> None:
    _, cost = charge(call(messages=MESSAGES), profile_named(name), [[("tokens", tpm)]])
    assert amount(cost, "tokens") == tokens


@pytest.mark.parametrize(
    ("model", "times"),
    [
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", 5),
        ("anthropic.claude-3-5-sonnet-20241022-v2:0", 1),
        ("amazon.nova-lite-v1:0", 1),
    ],
)
def test_output_of_newer_claude_counts_five_times_at_bedrock(model: str, times: int) -> None:
    path, bedrock = f"/model/{model}/converse", profile_named("bedrock")
    assert bedrock.settled(call(path), USAGE)["tokens"] == 90 + times * 7
    # As many may be settled as 256 replies' tokens say, if that is more than is reserved.
    cost = bedrock.cost(call(path, messages=MESSAGES, inferenceConfig={"maxTokens": 300}))
    assert amount(cost, "tokens") == max(400, 100 + times * 256)


@pytest.mark.parametrize(
    ("prompt", "replies"),
    [("four", 1), (["four", "five"], 2), ([[1, 2], [3]], 2), ([1, 2, 3], 1), ([], 1)],
)
def test_each_prompt_of_completion_reserves_its_replies(prompt: object, replies: int) -> None:
    cost = GENERIC.cost(call("/v1/completions", prompt=prompt, max_tokens=20, n=3))
    assert amount(cost, "output_tokens") == replies * 3 * 20


def test_embeddings_cost_their_input_and_other_calls_no_tokens() -> None:
    for profile in (OPENAI, AZURE, GENERIC):
        embeddings = profile.cost(call("/v1/embeddings", input="x" * 40))
        assert embeddings == Cost(tokens=10, input_tokens=10)
        for path in ("/v1/files", "/v1/messages/count_tokens", "/v1/responses/input_tokens"):
            assert profile.cost(call(path, messages=MESSAGES)) == Cost(requests=1, tokens=0)
        assert profile.cost(Call("GET", "host", "/v1/chat/completions", {}, 256)) == Cost()


@pytest.mark.parametrize(
    ("profile", "settled"),
    [
        ("openai", {"input_tokens": 90, "output_tokens": 7}),
        ("anthropic", {"input_tokens": 90, "output_tokens": 7, "tokens": 97}),
        ("groq", {"input_tokens": 26, "output_tokens": 7, "tokens": 33}),
        ("gemini", {"input_tokens": 90, "output_tokens": 7, "tokens": 90}),
    ],
)
def test_usage_settles_what_the_provider_counts(profile: str, settled: dict[str, int]) -> None:
    """Some correct tokens, or do not count those from the cache, or count input alone."""
    end = b'{"usage":{"prompt_tokens":90,"completion_tokens":7,"%b_details":{"cached_tokens":64}}}'
    usage = find_usage(end % b"prompt_tokens")
    assert usage is not None
    assert usage == find_usage(end % b"input_tokens") == Usage(90, 7, 97, 64)
    assert profile_named(profile).settled(call(), usage) == settled


@pytest.mark.parametrize(("tokens", "body"), data("requests")["tokens"])
def test_every_part_of_request_counts_towards_input(tokens: int, body: str) -> None:
    asked = request_size("/v1/chat/completions", json.loads(filled_in(body, BODIES)))
    assert asked.by_characters == tokens


def test_text_that_is_not_english_counts_more_by_its_size() -> None:
    asked = request_size("/api/chat", {"messages": [{"content": "これはテスト。"}]})
    assert (asked.by_characters, asked.by_size) == (2, 6)


@pytest.mark.parametrize(("limit", "body"), data("requests")["limits"])
def test_max_output_is_read_by_any_name_if_sound(limit: int, body: str) -> None:
    assert (request_size("/v1/responses", json.loads(body)).max_output or 0) == limit


@pytest.mark.parametrize(
    "content",
    [None, b"", b"[1]", b"{", b"\xff{", b'{"a":' + b"[" * 100_000, b"--boundary", b'{"a": \xff}'],
)
def test_body_that_is_not_a_json_object_reads_as_empty(content: bytes | None) -> None:
    assert read_json(content) == {}


@pytest.mark.parametrize(
    ("end", "usage"),
    [
        (b'{"usage": {"prompt_tokens": 90, "completion_tokens": 7}}', USAGE),
        (b'{"usage" : {"input_tokens":90,"output_tokens":7},"metadata":{"usage":"x"}}', USAGE),
        (b'{"usage":{"input_tokens":90,"output_tokens":7},"x":{"usage":{}}}', USAGE),
        (b'{"text":"\\"usage\\":{\\"prompt_tokens\\":5}"}', None),
        (b'{"usage":{"prompt_tokens":90', None),
        (b'{"usage":{"prompt_tokens":-1}}', None),
        (b'{"usage":' + b'{"usage":' * 50_000, None),
    ],
)
def test_usage_is_read_from_last_real_usage_key(end: bytes, usage: Usage | None) -> None:
    assert find_usage(end) == usage


def test_any_json_body_gets_a_whole_number_cost() -> None:
    deep: Any = "x" * 400
    for _ in range(600):
        deep = {"content": deep}
    odd: list[Any] = [None, True, -1, 1e400, "x", [], [[]], {}, {"type": []}, {"type": "image"}]
    for name in ("messages", "input", "tools", "max_tokens", "n", "options", "response_format"):
        for value in (*odd, deep):
            cost = GENERIC.cost(Call("POST", "h", "/v1/responses", {name: value}, 9))
            assert cost is not None
            assert all(type(amount) is int for amount in cost.values())


def test_repr_of_call_shows_no_prompt() -> None:
    call = Call("POST", "api.openai.com", "/v1/responses", {"input": "my secret"})
    assert "secret" not in repr(call)
    assert "/v1/responses" in repr(call)


# --- usage is read in every provider's own format ---


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
