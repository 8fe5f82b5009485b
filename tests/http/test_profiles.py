"""What a call costs at each provider, by the numbers in its documentation."""

import json
from dataclasses import replace
from typing import Any

import pytest

from asyncbucket import Cost, Limit
from asyncbucket.http import ANTHROPIC, AZURE, GENERIC, GROQ, OPENAI, Call, Profile, Usage
from asyncbucket.providers.profiles import charge, profile_named, profile_of
from asyncbucket.providers.request import read_json, request_size
from asyncbucket.providers.usage import find_usage

MESSAGES = [{"role": "user", "content": "x" * 400}]
USAGE = Usage(90, 7, 97)
PICTURE = "data:image/png;base64," + "x" * 9_999
VIDEO = "data:video/mp4;base64," + "x" * 8_512
FILE = "data:application/pdf;base64," + "x" * 8_512


def call(path: str = "/v1/chat/completions", *, foreseen: int = 256, **body: Any) -> Call:
    return Call("POST", "host", path, body, foreseen)


def amount(cost: Cost | None, resource: str) -> int:
    assert cost is not None
    return cost[resource]


def document(kind: str, **source: Any) -> dict[str, Any]:
    return {"type": "document", "source": {"type": kind, "media_type": "text/plain", **source}}


@pytest.mark.parametrize(
    ("host", "profile"),
    [
        ("api.openai.com", OPENAI),
        ("API.OpenAI.com.", OPENAI),
        ("mine.openai.azure.com", AZURE),
        ("api.anthropic.com", ANTHROPIC),
        ("api.groq.com", GROQ),
        ("bedrock-runtime.us-east-1.amazonaws.com", profile_named("bedrock")),
        ("generativelanguage.googleapis.com", profile_named("gemini")),
        ("us-central1-aiplatform.googleapis.com", profile_named("vertex")),
        ("aiplatform.us.rep.googleapis.com", profile_named("vertex")),
        ("api.eu.mistral.ai", profile_named("mistral")),
        ("s3.us-east-1.amazonaws.com", GENERIC),
        ("127.0.0.1", GENERIC),
        ("notapi.openai.com", GENERIC),
        ("api.openai.com.evil.test", GENERIC),
    ],
)
def test_profile_is_found_by_host_or_name(host: str, profile: Profile) -> None:
    assert profile_of(host) is profile_named(profile.name) is profile


@pytest.mark.parametrize(
    ("profile", "body", "tokens", "output"),
    [
        ("openai", {"max_tokens": 300}, 300, 300),
        ("openai", {"max_tokens": 20}, 100, 20),
        ("openai", {"max_tokens": 90, "n": 2}, 180, 180),
        ("openai", {}, 100, 256),
        ("azure", {"max_tokens": 20}, 120, 20),
        ("azure", {"max_tokens": 20, "best_of": 3}, 160, 60),
        ("azure", {}, 116, 256),
        ("anthropic", {"max_tokens": 8192}, 356, 256),
        ("anthropic", {"max_tokens": 20}, 120, 20),
        ("anthropic", {}, 356, 256),
        ("groq", {"max_completion_tokens": 20}, 120, 20),
        ("generic", {}, 356, 256),
        ("bedrock", {"max_tokens": 8192}, 8292, 8192),
        ("cerebras", {"max_tokens": 8192}, 8292, 8192),
        ("gemini", {"max_tokens": 8192}, 100, 8192),
        ("mistral", {"max_tokens": 8192}, 356, 256),
        ("xai", {"max_tokens": 8192}, 8292, 8192),
    ],
)
def test_call_costs_what_it_charges(
    profile: str, body: dict[str, Any], tokens: int, output: int
) -> None:
    cost = profile_named(profile).cost(call(messages=MESSAGES, **body))
    assert cost == Cost(tokens=tokens, input_tokens=100, output_tokens=output)


@pytest.mark.parametrize(
    ("name", "tpm", "tokens"),
    [
        ("bedrock", 500_000, 64_100),
        ("bedrock", 30_000, 30_000),
        ("cerebras", 500_000, 131_172),
        ("gemini", 500_000, 100),
        ("openai", 500_000, 100),
        ("xai", 500_000, 356),
    ],
)
def test_reply_without_limit_reserves_what_the_provider_does(
    name: str, tpm: int, tokens: int
) -> None:
    """It is cut to what the limit can ever admit: the provider may know a lower maximum."""
    _, cost = charge(call(messages=MESSAGES), profile_named(name), [[Limit("tokens", tpm)]])
    assert amount(cost, "tokens") == tokens


@pytest.mark.parametrize(
    ("model", "times"),
    [
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", 5),
        ("anthropic.claude-3-7-sonnet-20250219-v1:0", 5),
        ("anthropic.claude-3-5-sonnet-20241022-v2:0", 1),
        ("anthropic.claude-v2:1", 1),
        ("amazon.nova-lite-v1:0", 1),
    ],
)
def test_output_of_newer_claude_burns_five_times_its_tokens_at_bedrock(
    model: str, times: int
) -> None:
    path, bedrock = f"/model/{model}/converse", profile_named("bedrock")
    assert bedrock.settled(call(path), USAGE)["tokens"] == 90 + times * 7
    # As many may be settled as 256 replies' tokens say, if that is more than is reserved.
    cost = bedrock.cost(call(path, messages=MESSAGES, inferenceConfig={"maxTokens": 300}))
    assert amount(cost, "tokens") == max(400, 100 + times * 256)


def test_expected_burndown_makes_no_call_impossible() -> None:
    claude = call("/model/anthropic.claude-sonnet-4/invoke", messages=MESSAGES, max_tokens=500)
    _, cost = charge(claude, profile_named("bedrock"), [[Limit("tokens", 1_000)]])
    assert amount(cost, "tokens") == 600


@pytest.mark.parametrize(
    ("prompt", "replies"),
    [("four", 1), (["four", "five"], 2), ([[1, 2], [3]], 2), ([1, 2, 3], 1), ([], 1)],
)
def test_each_prompt_of_completion_reserves_its_replies(prompt: object, replies: int) -> None:
    cost = GENERIC.cost(call("/v1/completions", prompt=prompt, max_tokens=20, n=3))
    assert amount(cost, "output_tokens") == replies * 3 * 20


@pytest.mark.parametrize("profile", [OPENAI, AZURE, ANTHROPIC, GROQ, GENERIC])
def test_embeddings_cost_their_input_and_other_calls_no_tokens(profile: Profile) -> None:
    assert profile.cost(call("/v1/embeddings", input="x" * 40)) == Cost(tokens=10, input_tokens=10)
    for path in ("/v1/files", "/v1/messages/count_tokens", "/v1/responses/input_tokens"):
        assert profile.cost(call(path, messages=MESSAGES)) == Cost(requests=1, tokens=0)
    assert profile.cost(Call("GET", "host", "/v1/chat/completions", {}, 256)) == Cost()


@pytest.mark.parametrize(
    ("profile", "settled"),
    [
        *((name, {"input_tokens": 90, "output_tokens": 7}) for name in ("openai", "azure")),
        *(
            (name, {"input_tokens": 90, "output_tokens": 7, "tokens": 97})
            for name in ("anthropic", "generic")
        ),
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


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"messages": [{"role": "user", "content": "four"}]}, 1),
        ({"messages": "four", "system": [{"type": "text", "text": "four"}]}, 2),
        ({"input": ["a", "b", "abcde"]}, 4),
        ({"input": [[1, 2], [3]]}, 3),
        (
            {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "x" * 9_999}}]}]},
            765,
        ),
        ({"messages": [{"content": [{"type": "input_image", "detail": "low"}]}]}, 85),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"detail": "low"}}]}]}, 85),
        ({"messages": [{"content": [{"type": "input_audio", "data": "x" * 8_500}]}]}, 100),
        ({"messages": [{"content": [document("base64", data="x" * 8_500)]}]}, 100),
        ({"messages": [{"content": [document("text", data="x" * 8_500)]}]}, 2_125),
        ({"messages": [{"content": [document("content", content=[{"text": "four"}])]}]}, 1),
        ({"messages": [{"content": [{"type": "video_url", "video_url": {"url": VIDEO}}]}]}, 100),
        ({"messages": [{"content": [{"type": "document_url", "document_url": FILE}]}]}, 100),
        ({"input": [{"output": {"type": "computer_screenshot", "image_url": PICTURE}}]}, 765),
        ({"input": [{"image": PICTURE}, {"text": "four"}]}, 766),
        ({"messages": [{"role": "user", "content": "four", "images": ["x" * 9_999] * 2}]}, 1_531),
        ({"prompt": "four", "images": ["x" * 9_999]}, 766),
        ({"query": "four", "documents": ["four", "fours"]}, 4),
        ({"messages": [{"role": "user", "content": "four", "images": None}]}, 1),
        ({"messages": [{"content": "data: four more"}]}, 4),
        ({"messages": [{"tool_calls": [{"id": "c"}], "content": None}]}, 4),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 4),
        ({"tools": [{"name": "f"}, "odd"]}, 5),
        ({"response_format": {"type": "json_object"}}, 6),
        ({"output_config": {"type": "json_object"}}, 6),
        ({"contents": [{"role": "user", "parts": [{"text": "four"}]}]}, 1),
        ({"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": FILE}}]}]}, 765),
        ({"contents": [{"parts": [{"inline_data": {"data": "x" * 8_530}}]}]}, 100),
        ({"requests": [{"content": {"parts": [{"text": "four"}]}}] * 2}, 2),
        ({"systemInstruction": {"parts": [{"text": "four"}]}}, 1),
        ({"messages": [{"content": [{"image": {"source": {"bytes": "x" * 9_999}}}]}]}, 765),
        ({"messages": [{"content": [{"document": {"source": {"bytes": "x" * 8_520}}}]}]}, 100),
        ({"messages": [{"content": [{"toolResult": {"content": [{"text": "four"}]}}]}]}, 1),
        ({"toolConfig": {"tools": [{"toolSpec": {"name": "f"}}]}}, 10),
        ({"messages": [None, True, 1.5, {"role": "user", "type": 3, "content": "four"}]}, 1),
    ],
)
def test_every_part_of_request_counts_towards_input(body: dict[str, Any], tokens: int) -> None:
    assert request_size("/v1/chat/completions", body).by_characters == tokens
    asked = request_size("/api/chat", {"messages": [{"content": "これはテスト。"}]})
    assert (asked.by_characters, asked.by_size) == (2, 6)  # more by size, if it is not English


@pytest.mark.parametrize(
    ("body", "limit"),
    [
        ({"max_output_tokens": 5}, 5),
        ({"max_new_tokens": 5}, 5),
        ({"options": {"num_predict": 5}}, 5),
        ({"generationConfig": {"maxOutputTokens": 5}}, 5),
        ({"inferenceConfig": {"maxTokens": 5}}, 5),
        ({"options": {"num_predict": -1}}, None),
        ({"options": "odd"}, None),
        ({"max_tokens": 0}, None),
        ({"max_tokens": True}, None),
        ({"max_tokens": "5"}, None),
        ({"n": 3}, None),
    ],
)
def test_max_output_is_read_by_any_name_if_sound(body: dict[str, Any], limit: int | None) -> None:
    assert request_size("/v1/responses", body).max_output == limit


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
        (b'{"usage":null}', None),
        (b'{"usage":{"prompt_tokens":90', None),
        (b'{"usage":{"prompt_tokens":-1}}', None),
        (b'{"usage":' + b'{"usage":' * 50_000, None),
        (b"", None),
    ],
)
def test_usage_is_read_from_last_real_usage_key(end: bytes, usage: Usage | None) -> None:
    assert find_usage(end) == usage


def test_anthropic_stream_usage_combines_first_and_last_event() -> None:
    first = b'data: {"message":{"usage":{"input_tokens":90,"cache_read_input_tokens":500,"output_tokens":1}}}'
    last = b'data: {"type":"message_delta","usage":{"output_tokens":7}}'
    assert find_usage(last, first) == replace(USAGE, cached_beside=500)
    assert find_usage(b"", first) == Usage(90, 1, 91, cached_beside=500)


def test_any_json_body_gets_a_whole_number_cost() -> None:
    odd: list[Any] = [None, True, 0, -1, 1e400, "x", [], [[]], {}, {"type": []}, {"type": "image"}]
    for name in ("messages", "input", "tools", "max_tokens", "n", "options", "response_format"):
        for value in odd:
            body = json.loads(json.dumps({name: value}))
            cost = GENERIC.cost(Call("POST", "h", "/v1/responses", body, 9))
            assert cost is not None
            assert all(type(amount) is int for amount in cost.values())


def test_deeply_nested_body_is_still_priced() -> None:
    message: Any = "x" * 400
    for _ in range(600):
        message = {"content": message}
    call = Call("POST", "h", "/v1/responses", {"max_tokens": 9, "messages": message}, 9)
    assert GENERIC.cost(call) == Cost(tokens=9, input_tokens=0, output_tokens=9)


def test_repr_of_call_shows_no_prompt() -> None:
    call = Call("POST", "api.openai.com", "/v1/responses", {"input": "my secret"})
    assert "secret" not in repr(call)
    assert "/v1/responses" in repr(call)
