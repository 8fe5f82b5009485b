"""What a line may be, and which lines are answered: their file alone decides, whatever happens to it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncbucket.cli.run import Job
from asyncbucket.cli.run.lines import Answers, Request, read_request
from asyncbucket.cli.run.work import address

IN = Path("in")
JOB = Job(source=IN, model="m")


def read(line: Any, job: Job = JOB, number: int = 1) -> Request:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    request = read_request(number, data, job)
    assert request is not None
    return request


def refusal(line: Any) -> str:
    try:
        read(line)
    except ValueError as error:
        return str(error)
    return ""


def batch(**members: Any) -> dict[str, Any]:
    body = {"model": "gpt", "messages": [{"role": "user", "content": "Hi"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return {name: value for name, value in (line | members).items() if value is not None}


def test_batch_line_keeps_its_id_url_and_body_unless_a_model_is_given() -> None:
    request = read(batch(), Job(source=IN))
    assert (request.custom_id, request.path) == ("a", "/v1/chat/completions")
    assert request.body == batch()["body"]
    assert read(batch()).body == batch()["body"] | {"model": "m"}


FORMS = [b"Why?", b'"Why?"', b"  Why?\r\n", "\ufeffWhy?".encode(), b'{"prompt": "Why?"}']
#: They only start like JSON.
TEXTS = ['"Why?" she said', "[INST] Why?", "2 + 2", "true or not?"]


@pytest.mark.parametrize(
    ("line", "prompt"),
    [(line, "Why?") for line in FORMS] + [(text.encode(), text) for text in TEXTS],
)
def test_prompt_in_any_form_becomes_a_chat_request(line: bytes, prompt: str) -> None:
    request = read(line)
    assert request.body == {"messages": [{"role": "user", "content": prompt}], "model": "m"}
    assert request.custom_id == "line-1"


def test_prompt_is_shaped_for_the_chosen_endpoint() -> None:
    options: dict[str, Any] = {"source": IN, "model": "m", "system": "Be brief.", "max_tokens": 9}
    chat = read(b"Why?", Job(**options))
    responses = read(b"Why?", Job(**options, endpoint="responses"))
    embedding = read(b"Why?", Job(**options, endpoint="embeddings"))
    assert chat.body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert chat.body["max_completion_tokens"] == 9
    body = {"input": "Why?", "model": "m"}
    more = {"instructions": "Be brief.", "max_output_tokens": 9}
    assert (responses.path, responses.body) == ("/v1/responses", body | more)
    assert (embedding.path, embedding.body) == ("/v1/embeddings", body)


def test_fields_of_a_line_are_kept_and_override_the_options() -> None:
    line = {"prompt": "Why?", "model": "mine", "temperature": 0, "max_tokens": 5}
    messages = [{"role": "user", "content": line.pop("prompt")}]
    found = read(line | {"prompt": "Why?"}, Job(source=IN, max_tokens=9)).body
    assert found == {"messages": messages, **line}


def test_key_and_version_are_sent_as_the_server_wants_them() -> None:
    azure, other = "https://x.openai.azure.com/openai/v1", "https://example.org/v1"
    for base, query, params, headers in (
        (azure, "?v=1", [("v", "1")], {"api-key": "k"}),
        (other, "", [], {"authorization": "Bearer k"}),
    ):
        job = Job(source=IN, api_base=base + query)
        job.api_key = "k"
        assert address(job) == {"base_url": base, "headers": headers, "params": params}


def test_key_depends_on_content_but_not_on_order_or_line_number() -> None:
    assert read(b"Why?", number=1).key == read(b"Why?", number=2).key
    assert read({"messages": [1], "n": 2}).key == read({"n": 2, "messages": [1]}).key
    assert read(batch()).key != read(batch(custom_id="b")).key
    assert read(b"Why?").key != read(b"Why not?").key


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"custom_id": ', "not JSON: Expecting value: line 1 column "),
        (b'{"prompt": "Why?"} {"prompt": "How?"}', "not JSON: there is more after its end"),
        (b'[{"role": "user"}]', "JSON, but neither a text nor an object: put quotes"),
        (b'""', "the prompt is empty"),
        (b'{"text": "Why?"}', "nothing to answer: a body for /v1/chat/completions needs messages"),
        (batch(url="/v1/embeddings"), "nothing to answer: a body for /v1/embeddings needs input"),
        (b"\xff\xfe", "not UTF-8 text at byte 0"),
        (batch(custom_id=7), "custom_id is missing, or not text"),
        (batch(url="/v1/files"), "url is '/v1/files', known: /v1/chat/completions, /v1/"),
        (batch(url=["/v1/files"]), "url is ['/v1/files'], known: "),
        (batch(body=None), "body is missing, or not an object"),
        (batch(body={"messages": [1], "stream": True}), "the body asks for a stream"),
    ],
)
def test_bad_line_is_refused_with_the_reason(line: Any, reason: str) -> None:
    assert reason in refusal(line)


def test_deeply_nested_line_is_read_or_refused() -> None:
    depths = (*range(2, sys.getrecursionlimit()), 1_000_000)
    start = b'{"messages": [1], "metadata": '
    reasons = [refusal(start + b"[" * depth + b"]" * depth + b"}") for depth in depths]
    assert (reasons[0], reasons[-1]) == ("", "its brackets are nested too deeply")
    assert len(set(reasons)) == 2


SETTINGS: dict[str, Any] = {"model": "m"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def answer(answers: Answers, *texts: str) -> None:
    for text in texts:
        key, _ = answers.look_up(read(text.encode()))
        answers.write(key, {"custom_id": text})


def answered(out: Path, *texts: str) -> bytes:
    with Answers(out, SETTINGS) as answers:
        answer(answers, *texts)
    return out.read_bytes()


def are_done(out: Path, *texts: str) -> list[bool]:
    with Answers(out, SETTINGS) as answers:
        return [answers.look_up(read(text.encode()))[1] for text in texts]


def test_answers_in_the_file_are_done_and_nothing_is_beside_it(out: Path) -> None:
    answered(out, "a", "b", "b")
    assert are_done(out, "b", "a", "c", "b", "b") == [True, True, False, True, False]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("end", "more"),
    [(None, b'{"id":"batch_req_00'), (None, b'{"i'), (-1, b"")],
    ids=["a kill", "an early kill", "an editor that leaves out the last line's end"],
)
def test_whole_answers_are_done_whatever_the_end(out: Path, end: int | None, more: bytes) -> None:
    whole = answered(out, "a", "b")
    out.write_bytes(whole[:end] + more)
    assert are_done(out, "a", "b", "c") == [True, True, False]
    assert out.read_bytes() == whole


@pytest.mark.parametrize("text", ['{"my": "notes"}\nand more', "notes", "{}\n"])
def test_foreign_line_is_refused_and_left_unchanged(out: Path, text: str) -> None:
    out.write_text(text)
    with pytest.raises(
        ValueError, match=r"^line 1 of .*out.jsonl was not written by .*: remove it"
    ):
        Answers(out, SETTINGS).__enter__()
    assert out.read_text() == text


@pytest.mark.parametrize("name", ["out.jsonl", "symlink", "hardlink"])
def test_second_run_on_the_same_file_is_refused_under_any_name(out: Path, name: str) -> None:
    path = out.with_name(name)
    with Answers(out, SETTINGS):
        if name == "symlink":
            path.symlink_to(out)
        elif name == "hardlink":
            path.hardlink_to(out)
        with pytest.raises(ValueError, match="is being written by another run: let it end"):
            Answers(path, SETTINGS).__enter__()
    assert are_done(path, "a") == [False]


def test_answers_made_with_other_settings_are_refused(out: Path) -> None:
    answered(out, "a")
    with pytest.raises(ValueError, match=r"answers made with \{'model': 'm'\}, not \{"):
        Answers(out, {"model": "x"}).read()


def test_dry_run_reads_without_changing_or_locking(out: Path) -> None:
    answers = Answers(out, SETTINGS)
    answers.read()
    assert not out.exists()
    torn = answered(out, "a") + b'{"id":'
    out.write_bytes(torn)
    answers.read()
    assert answers.look_up(read(b"a"))[1]
    assert out.read_bytes() == torn


def test_run_without_an_answer_leaves_no_file_behind(out: Path) -> None:
    link = out.with_name("link")
    link.symlink_to(out)
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"), Answers(link, SETTINGS):
            raise ValueError("refused")
        assert (out.exists(), link.is_symlink()) == (False, True)
