"""`asyncbucket run` as people use it: real HTTP on loopback, real processes, real signals.

The provider runs on the machine's clock, in its own thread or process: virtual time won't do.
"""

import asyncio
import contextlib
import http.server
import itertools
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from asyncbucket import AcquireTimeout
from asyncbucket.cli.app import app
from asyncbucket.http import read_pool
from asyncbucket.testing import RateLimitedProvider
from asyncbucket.testing.pytest_plugin import ProviderFactory

pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.skipif(sys.platform == "win32", reason="signals, locks and limits are Unix's"),
]

SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def in_a_folder_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@pytest.fixture
def provider(rate_limited_provider: ProviderFactory) -> RateLimitedProvider:
    return rate_limited_provider()


def batch(count: int, path: str = "in.jsonl") -> str:
    lines: list[str] = []
    for number in range(count):
        question = {"role": "user", "content": f"What is {number} times {number}?"}
        body = {"model": "gpt", "max_tokens": 16, "messages": [question]}
        line = {"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions"}
        lines.append(json.dumps(line | {"body": body}) + "\n")
    Path(path).write_text("".join(lines))
    return path


def run(provider: Any, *arguments: str, status: int = 0) -> Result:
    return typed(*arguments, "--api-base", provider.base_url, status=status)


def typed(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, ["run", *arguments], prog_name="asyncbucket")
    assert result.exit_code == status, result.output
    return result


def started(provider: Any, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "asyncbucket", "run", *arguments]
    command += ["--api-base", provider.base_url]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_every_line_is_answered_once_in_several_runs(provider: RateLimitedProvider) -> None:
    out = "50 % off? #1.jsonl"
    arguments = ["-o", out, "--rpm", "6000", "--concurrency", "8"]
    provider.fail_next(1, status=429, retry_after=0.1)
    first, again = (run(provider, batch(50), *arguments) for _ in range(2))
    more = run(provider, batch(52), *arguments, "--json")
    answers = {line["custom_id"]: line for line in lines_of(out)}
    assert "50 answered\n51 requests" in first.stderr
    assert ", 1 429s" in first.stderr
    assert "0 answered and 50 earlier" in again.stderr
    told = json.loads(more.stdout)
    names = ("lines", "left", "answered", "answered_earlier")
    assert [told[name] for name in names] == [52, 0, 2, 50]
    assert told["input_tokens"] == sum(answers[f"q{n}"]["usage"]["prompt_tokens"] for n in (50, 51))
    assert provider.statistics().admitted == len(answers) == 52
    assert provider.statistics().refused == 1
    answer = answers["q7"]
    content = answer["response"]["body"]["choices"][0]["message"]["content"]
    assert content == "You said: What is 7 times 7?"
    assert answer["response"]["status_code"] == 200
    assert answer["response"]["request_id"].startswith("req_")
    assert answer["usage"] == answer["response"]["body"]["usage"]
    assert (answer["error"], answer["line"]) == (None, 8)
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", out, f"{out}.limits"}


def test_lines_that_cannot_be_sent_are_reported_others_sent(provider: RateLimitedProvider) -> None:
    good = Path(batch(2)).read_bytes()
    lines = [b'{"custom_id": ', good + b"\xff", b"", b'{"custom_id": "x"}', b"Why?"]
    lines += [b'{"messages": [1], "temperature": NaN}', rb'"\ud800"']  # no JSON can hold them
    Path("in.jsonl").write_bytes(b"\n".join([*lines, b"why " * 12_000]))
    result = run(provider, "in.jsonl", "--tpm", "9000", "--model", "m", status=1)
    errors = {line["line"]: line["error"]["code"] for line in lines_of("answers.errors.jsonl")}
    refused = {8: "ValueError", 9: "UnicodeEncodeError", 10: "CostExceedsLimit"}
    assert errors == dict.fromkeys([1, 4, 6], "bad_line") | refused
    assert len(lines_of("answers.jsonl")) == provider.statistics().admitted == 3
    assert "3 answered, 3 failed, 3 bad lines" in result.stderr
    assert "errors: 3 x bad_line, 1 x" in result.stderr
    assert "; the first: line 1: not JSON" in result.stderr


def test_failed_request_is_recorded_and_sent_by_the_next_run(provider: RateLimitedProvider) -> None:
    provider.fail_next(1, status=400, code="string_above_max_length")
    arguments = [batch(3), "-o", "out.jsonl", "--rpm", "6000", "--concurrency", "1"]
    run(provider, *arguments, status=1)
    (error,) = lines_of("out.errors.jsonl")
    run(provider, *arguments)
    assert error["error"]["code"] == "string_above_max_length"
    assert error["response"]["status_code"] == 400
    assert error["response"]["request_id"].startswith("req_")
    assert error["custom_id"] == "q0"
    assert sorted(line["custom_id"] for line in lines_of("out.jsonl")) == ["q0", "q1", "q2"]
    assert not Path("out.errors.jsonl").exists()


@pytest.mark.parametrize("statuses", [[200, 403] * 60, [400] * 60 + [200] * 20])
def test_refused_lines_stop_none(statuses: list[int], server_answering: Callable[..., str]) -> None:
    options = ["-o", "out.jsonl", "--rpm", "60000", "--concurrency", "4"]
    base = server_answering(b"{}", *statuses)
    typed(batch(len(statuses)), *options, "--api-base", base, status=1)
    assert len(lines_of("out.jsonl")) == statuses.count(200)


def test_outage_ends_the_run_and_leaves_lines_for_the_next(provider: RateLimitedProvider) -> None:
    provider.always = 500
    arguments = [batch(150), "-o", "out.jsonl", "--rpm", "60000", "--attempts", "1"]
    result = run(provider, *arguments, "--concurrency", "4", status=2)
    provider.always = None
    run(provider, *arguments)
    assert "error: no request succeeds: HTTP 500" in result.stderr
    assert len(lines_of("out.jsonl")) == 150
    assert provider.statistics().errors < 60


def error(message: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "code": code}}).encode()


@pytest.mark.parametrize(
    ("page", "status", "said"),
    [
        (error(f"bad {SECRET}", "x"), 401, r"HTTP 401: bad \*\*\* .*; correct the key in OPENAI"),
        (error("broke", "insufficient_quota"), 429, "HTTP 429: broke .*; correct .* account"),
        (
            b"[" * 100_000,
            404,
            r"HTTP 404: \[\[\[.*; check that it is running, or correct --api-base or",
        ),
        (b"<html>\nHi\x1b[31m", 200, r"HTTP 200: the reply is not JSON: <html> Hi \[31m"),
        (b"", 200, "HTTP 200: the reply is not JSON: it is empty"),
    ],
)
def test_error_that_every_request_would_get_ends_the_run(
    server_answering: Callable[..., str], page: bytes, status: int, said: str
) -> None:
    """No key or password is shown, even if the server quotes it; no file is left behind."""
    base = server_answering(page, status)
    arguments = ["-o", "out.jsonl", "--rpm", "60000", "--concurrency", "4", "--model", "m"]
    result = typed(batch(1_000), *arguments, "--api-base", base, status=2)
    assert re.search(f"\nerror: no request succeeds: {said}", result.stderr), result.stderr
    assert f" ({base.replace('somebody:pass-word@', '')})" in result.stderr
    assert re.search(r"0 answered, \d\d? failed", result.stderr)
    assert not any(text in result.output for text in (SECRET, "pass-word", "\x1b"))
    assert {path.name for path in Path().iterdir()} == {"in.jsonl"}


def test_key_revoked_meanwhile_ends_the_run_at_once(server_answering: Callable[..., str]) -> None:
    options = ["-o", "out.jsonl", "--rpm", "60000", "--concurrency", "2"]
    base = server_answering(b"{}", *[200] * 5, *[401] * 95)
    result = typed(batch(100), *options, "--api-base", base, status=2)
    assert re.search(r": 5 answered, [12] failed, 9\d left\n", result.stderr), result.stderr


def test_key_in_a_long_message_is_not_shown_in_part(server_answering: Callable[..., str]) -> None:
    base = server_answering(b"x" * 485 + SECRET.encode(), 400)
    result = typed(batch(1), "-o", "out.jsonl", "--rpm", "60", "--api-base", base, status=1)
    assert SECRET[:3] not in result.output + Path("out.errors.jsonl").read_text()


def test_unreachable_server_ends_the_run_with_the_remedy() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        arguments = ["-o", "out.jsonl", "--rpm", "60000", "--attempts", "1", "--api-base", base]
        result = typed(batch(60), *arguments, status=2)
    said = f"succeeds: All connection attempts failed ({base}); check that it is running"
    assert said in result.stderr
    assert {path.name for path in Path().iterdir()} == {"in.jsonl"}


@pytest.fixture
def server_answering() -> Generator[Callable[..., str]]:
    """Make a server that answers with a page and statuses in turn, at a URL with a password."""
    with contextlib.ExitStack() as stack:

        def start(page: bytes, *statuses: int) -> str:
            replies = itertools.cycle(statuses)

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    self.rfile.read(int(self.headers["content-length"]))
                    self.send_response(next(replies))
                    self.send_header("content-length", str(len(page)))
                    self.end_headers()
                    self.wfile.write(page)

                def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://somebody:pass-word@127.0.0.1:{server.server_port}/v1"

        yield start


def test_dry_run_sends_nothing_but_estimates(provider: RateLimitedProvider) -> None:
    arguments = ["-o", "out.jsonl", "--rpm", "60", "--tpm", "9000", "--model", "gpt"]
    run(provider, batch(2), *arguments)
    before = Path("out.jsonl").read_bytes()
    lines = [Path(batch(600)).read_text(), json.dumps("why " * 12_000), "\n{\n"]
    Path("in.jsonl").write_text("".join(lines))
    arguments = ["in.jsonl", *arguments, "--dry-run"]
    told = json.loads(run(provider, *arguments, "--json", status=1).stdout)
    sending, bad, plan, *_ = run(provider, *arguments, status=1).stdout.splitlines()
    assert sending == "598 requests to send, 2 answered earlier, 1 too costly, 1 bad"
    assert bad.startswith("errors: 1 x bad_line; the first: line 602: not JSON")
    assert re.search(r"^(9|10) min.*requests bind", plan)
    assert (told["to_send"], told["too_costly"], told["plan"]["calls"]) == (598, 1, 598)
    assert provider.statistics().requests == 2
    assert Path("out.jsonl").read_bytes() == before


def test_run_stops_before_its_cap_and_goes_on_with_a_larger(provider: RateLimitedProvider) -> None:
    provider.reply_tokens = 16
    Path("prices.toml").write_text("[gpt]\ninput = 1\noutput = 10\n")
    options = [batch(30), "-o", "out.jsonl", "--rpm", "6000", "--prices", "prices.toml"]

    planned = run(provider, *options, "--max-usd", "0.002", "--dry-run")
    first = run(provider, *options, "--max-usd", "0.002", status=3)
    sent = provider.statistics().requests
    run(provider, *options, "--max-usd", "0.002", status=3)
    rest = run(provider, *options, "--max-usd", "1", "--json", "-q")

    assert "this job costs about 0.005 USD\n" in planned.stdout
    spent = r"0\.001[5-9]\d+ of 0\.002 USD spent; the next request may cost more"
    assert re.search(spent, first.stderr)
    assert "the same command with a larger --max-usd continues from here" in first.stderr
    assert 6 < sent < 13
    assert provider.statistics().requests == 30
    tokens = [line["usage"] for line in lines_of("out.jsonl")]
    micro = sum(each["prompt_tokens"] + 10 * each["completion_tokens"] for each in tokens)
    assert json.loads(rest.stdout)["usd"] == micro / 1e6


def test_model_without_a_price_ends_a_run_that_has_a_cap() -> None:
    result = typed(batch(3), "--rpm", "600", "--max-usd", "1", status=2)
    assert "no price is known for the model 'gpt'" in result.stderr
    assert "write it to a file, and pass that as --prices" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("in.jsonl --rpm 1 --max-usd 0", "limit of usd must be from 0.000001"),
        ("in.jsonl", "say what your key allows: --rpm and --tpm"),
        ("none.jsonl --rpm 1", "'none.jsonl' is not a file: name a file of requests or prompts"),
        ("in.jsonl --rpm 1 -o in.jsonl", "in.jsonl is read already: give another -o"),
        (f"in.jsonl --rpm 1 -o {os.devnull}", "is not a file that can be written"),
        ("in.jsonl --rpm 1 -o .", ". is not a file that can be written"),
        ("in.jsonl --rpm 1 -o -", "- is not a file that can be written"),
        ("in.jsonl --also 3images/s", "3 images per 1 s would hold up no request: limit input"),
        ("in.jsonl --rpm 1 --api-base localhost:8000", "--api-base must begin with"),
        ("in.jsonl --rpm 1 --api-base http://me:pass-word@/v1", "not 'http://***@/v1'"),
        ("in.jsonl --rpm 1 --api-base http://x:99999", "--api-base must begin with"),
        ("in.jsonl --rpm 1 --max-usd 1 --pool x", "--rpm, --max-usd cannot go with --pool: write"),
        ("in.jsonl --rpm 1 --endpoint x", "--endpoint must be one of chat, resp"),
        ("in.txt --rpm 1 -o out.jsonl", "no model: give --model, or name one in the body"),
    ],
)
def test_usage_error_is_one_line_with_status_2(arguments: str, message: str) -> None:
    batch(1)
    Path("in.txt").write_text("\n{\nWhy?\n")
    result = typed(*arguments.split(), status=2)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert SECRET not in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", "in.txt"}


def test_missing_or_broken_key_is_refused_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("", f"{SECRET}\n{SECRET}"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        result = typed(batch(1), "--rpm", "1", status=2)
        assert "OPENAI_API_KEY must hold your key and nothing else: export" in result.stderr
        assert SECRET not in result.stderr


@pytest.mark.parametrize("are_paid", [False, True])
def test_full_disk_is_reported_before_anything_is_paid_or_with_what_is_left(
    *, are_paid: bool, provider: RateLimitedProvider
) -> None:
    room = "0" if are_paid else "lines._ROOM"
    program = f"from asyncbucket.cli import main; from asyncbucket.cli.run import lines; lines._ROOM = {room}; main()"
    options = ["-o", "out.jsonl", "--concurrency", "20", "--api-base", provider.base_url]
    command = [sys.executable, "-c", program, "run", batch(300), *options]
    # Python would compile modules into files that are cut short, too.
    small = 'ulimit -f 16; PYTHONDONTWRITEBYTECODE=1 exec "$0" "$@"'
    # A tracer would write files, too.
    here = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = ["sh", "-c", small, *command]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    said = ended.stderr
    assert ended.returncode == 2
    assert "error: out.jsonl cannot be written (File too large): make room\n" in said
    assert (provider.statistics().requests > 0) is are_paid
    assert (said.count("\n") == 1) is not are_paid
    assert Path("out.jsonl").exists() is are_paid
    if are_paid:
        left = 300 - len(lines_of("out.jsonl"))  # half a line would spoil the next one
        assert f", {left} left\n" in said
        assert "the same command continues from here" in said


def test_ctrl_c_lets_requests_in_flight_finish(provider: RateLimitedProvider) -> None:
    provider.latency = 0.5
    arguments = [batch(200), "-o", "out.jsonl", "--rpm", "600", "--concurrency", "4"]
    with started(provider, *arguments) as process:
        while provider.statistics().in_flight < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    seen = provider.statistics()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert re.search(r"(?m)^stopping after \d requests? under way; Ctrl-C again to drop", errors)
    left = 200 - seen.admitted
    assert f", {left} left\n" in errors
    assert "the same command continues from here" in errors
    assert len(lines_of("out.jsonl")) == seen.admitted < 20
    assert seen.disconnected == 0


def test_second_ctrl_c_drops_requests_in_flight(provider: RateLimitedProvider) -> None:
    provider.latency = 30
    arguments = [batch(200), "-o", "out.jsonl", "--rpm", "600", "--concurrency", "4"]
    with started(provider, *arguments) as process:
        while provider.statistics().in_flight < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "Ctrl-C again" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "4 requests (0 answers/s), 0 429s" in errors


def test_repeatedly_killed_run_answers_each_line_once_without_429(tmp_path: Path) -> None:
    chance = random.Random(5)
    lines, rpm, at_once = 240, 3_000, 16
    with RateLimitedProvider(rpm=rpm, latency=(0.05, 0.2), policy="sliding_window") as provider:
        arguments = [batch(lines), "-o", "out.jsonl", "--rpm", str(rpm), "--quiet"]
        arguments += ["--concurrency", str(at_once)]
        for _ in range(3):
            with started(provider, *arguments) as process:
                enough = provider.statistics().admitted + chance.randrange(5, 60)
                while provider.statistics().admitted < enough:
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
        end = run(provider, *arguments)
        seen = provider.statistics()
    answers = Counter(line["custom_id"] for line in lines_of("out.jsonl"))
    assert end.output == ""
    assert answers == Counter(f"q{number}" for number in range(lines))
    assert seen.refused == 0
    assert seen.admitted - lines <= 3 * at_once
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"in.jsonl", "out.jsonl", "out.jsonl.limits"}


def test_damaged_record_of_limits_ends_the_run(provider: RateLimitedProvider) -> None:
    Path("out.jsonl.limits").write_text("weights, and many of them " * 100)
    result = run(provider, batch(2), "-o", "out.jsonl", "--rpm", "6000", "--quiet", status=2)
    assert "out.jsonl.limits: SQLite failed (file is not a database)" in result.stderr
    assert Path("out.jsonl.limits").read_text().startswith("weights")


def test_help_examples_run(provider: RateLimitedProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    base = provider.base_url
    monkeypatch.setenv("OPENAI_BASE_URL", base)
    for path in ("batch.jsonl", "in.jsonl"):
        batch(3, path)
    Path("prompts.txt").write_text("one\ntwo\n")
    examples = re.findall("asyncbucket run (.*)", typed("--help").output.partition("Examples:")[2])
    for example in examples:
        typed(*shlex.split(example.replace("http://localhost/v1", base)))
    assert len(examples) == 3


# --- several providers ---


def pool_of(*base_urls: str, limit: str = 'limits = ["6k RPM burst 100"]') -> str:
    tables = (
        f'[member.p{number}]\nbase_url = "{url}"\nkey_env = "OPENAI_API_KEY"\n{limit}\n'
        for number, url in enumerate(base_urls)
    )
    Path("pool.toml").write_text('prefer = "first"\n' + "".join(tables))
    return "pool.toml"


def test_members_share_a_run_that_outlives_one(rate_limited_provider: ProviderFactory) -> None:
    providers = [rate_limited_provider(latency=0.01) for _ in range(3)]
    pool = pool_of(*(each.base_url for each in providers))
    providers[0].stop()
    dry, first, more, none = (
        typed(batch(count), "-o", "out.jsonl", "--pool", pool, *options)
        for count, options in [(40, ["--dry-run"]), (40, []), (60, []), (60, ["--json"])]
    )
    assert "40 requests to send" in dry.output
    assert "in.jsonl, 40 lines; pool.toml\np0: 6,000 requests per 60 s; p1: 6" in first.stderr
    assert "20 answered and 40 earlier" in more.stderr
    assert json.loads(none.stdout)["requests"] == 0
    assert len({line["custom_id"] for line in lines_of("out.jsonl")}) == 60
    assert sum(each.statistics().requests for each in providers[1:]) == 60
    other = typed(batch(60), "-o", "out.jsonl", "--rpm", "6000", status=2)
    assert "holds answers made with {'model': None, 'api': 'pool.toml', " in other.stderr


def test_bookings_of_each_member_outlive_the_run(
    rate_limited_provider: ProviderFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = rate_limited_provider().base_url
    pool = pool_of(base, f"{base}/", limit='limits = ["3 requests/hour"]')
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/")  # that is not for pools
    typed(batch(3), "-o", "out.jsonl", "--pool", pool)
    after, _ = read_pool(pool, store=f"sqlite:///{Path('out.jsonl.limits').resolve()}")
    after.members[1].acquire_sync(timeout=5)
    with pytest.raises(AcquireTimeout):
        after.members[0].acquire_sync(timeout=1)
    asyncio.run(after.aclose())


def test_run_ends_if_no_member_takes_its_hidden_key(server_answering: Callable[..., str]) -> None:
    base = server_answering(error(f"Incorrect API key: {SECRET}", "x"), 401).rpartition("@")[2]
    pool = pool_of(f"http://{base}", f"http://{base}", limit="concurrency = 60")
    result = typed(batch(60), "-o", "out.jsonl", "--pool", pool, status=2)
    assert "error: no request succeeds" in result.stderr
    assert "pool.toml" in result.stderr.splitlines()[-1]
    assert SECRET not in result.output
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", "pool.toml"}
