"""What each extra promises, tested in an environment that has it and nothing else.

``python -I promises.py EXTRA...`` is run by an interpreter whose environment has only the wheel and
these extras; ``WHEEL=`` before it names a folder to import from instead. What an extra serves must
work; what lacks something must say how to install it. The script prints a line for each promise,
and ends with status 1 if one is broken.

Only the standard library is imported here: nothing must help the code under test.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

if "WHEEL" in os.environ:
    sys.path.insert(0, os.environ["WHEEL"])

import asyncbucket
from asyncbucket import Limiter, TokenBucket, pace, plan, telemetry
from asyncbucket.stores import open_store

#: Extras that include others.
IMPLIED = {
    "openai": {"llama-index"},
    "llama-index": {"http"},
    "proxy": {"http", "prometheus"},
    "cli": {"batch", "openai", "proxy", "testing"},
    "plot": {"cli"},
    "all": {"cli", "otel", "plot", "prometheus", "redis"},
}


@dataclass(frozen=True)
class Promise:
    """Something that works with an extra, and without it names the extra to install."""

    extra: str
    keep: Callable[[], object]
    #: Whether users without the extra are told to install it; False: they cannot get that far.
    tells: bool


PROMISES: list[Promise] = []


def promise(extra: str, *, tells: bool = True) -> Callable[[Callable[[], object]], None]:
    """Note what an extra, or else the core, promises."""
    return lambda keep: PROMISES.append(Promise(extra, keep, tells))


def read(request: str | urllib.request.Request) -> bytes:
    """Return the answer of a server on this machine."""
    with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310 - loopback
        body: bytes = reply.read()
        return body


def limiter() -> Limiter:
    """Return a limiter that admits every call here at once."""
    return Limiter("6000 RPM", "2M TPM", concurrency=3, name="packaged")


@promise("core")
def paces_calls() -> None:
    async def main() -> None:
        paced = limiter()
        async with paced.acquire(tokens=5) as lease:
            lease.settle(tokens=3)
        async with paced.child("chat", rpm=600).acquire(), paced.key("acme").acquire():
            pass
        await TokenBucket(rate=5.0, burst=5).acquire()
        assert paced.statistics().admitted == 3

    asyncio.run(main())


@promise("core")
def paces_without_a_loop() -> None:
    paced = limiter()
    with paced.acquire_sync(tokens=5):
        pass
    assert paced.paced(len)("four") == 4


@promise("core")
def plans() -> None:
    planned = plan(calls=1_000, tokens=800, rpm=500, tpm=200_000, concurrency=32, latency=1.5)
    assert "tokens bind" in str(planned)


@promise("core")
def shares_a_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/limits.db"
        with Limiter("6000 RPM", store=url, name="packaged").acquire_sync():
            pass


@promise("core")
def says_what_it_does() -> None:
    paced = limiter()
    off = telemetry.logging(paced)
    trace = paced.trace()
    with paced.acquire_sync(), paced.serve_stats() as server:
        assert b"packaged" in read(server.url)
    assert len(trace) == 1
    off()


@promise("core")
def has_its_data() -> None:
    package = Path(asyncbucket.__file__).parent
    assert (package / "py.typed").is_file()
    assert list((package / "stores" / "lua").glob("*.lua"))


@promise("core")
def reads_settings() -> None:
    os.environ["PACKAGED_RPM"] = "500"
    assert Limiter.from_env("PACKAGED_").limits[0].amount == 500
    assert asyncbucket.presets.preset_names()


@promise("core")
def has_virtual_time() -> None:
    from asyncbucket.testing import VirtualTime

    async def main() -> None:
        hour = Limiter("1 RPH", clock=time.clock)
        await hour.acquire()
        await hour.acquire()

    with VirtualTime() as time:
        time.run(main())


_MESSAGE = {"role": "assistant", "content": "salve"}
_REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o-mini",
    "choices": [{"index": 0, "finish_reason": "stop", "message": _MESSAGE}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}
#: Headers of OpenAI about what is left; their durations need a parser of their own.
_LEFT = {
    "x-ratelimit-limit-requests": "6000",
    "x-ratelimit-remaining-requests": "5999",
    "x-ratelimit-reset-requests": "1m0.5s",
}


class _Model(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps(_REPLY).encode()
        self.send_response(200)
        for name, value in {**_LEFT, "content-type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its base calls it so
        """Log nothing."""


@contextlib.contextmanager
def a_model() -> Generator[str]:
    """Serve an OpenAI-compatible model on loopback, and yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Model) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


@promise("llama-index")
def tells_llama_index() -> None:
    telemetry.llama_index(limiter())


@promise("llama-index")
def tries_again() -> None:
    importlib.import_module("asyncbucket.retry")


@promise("llama-index")
def wraps_a_model() -> None:
    if importlib.util.find_spec("llama_index") is None:
        pace(object(), rpm=5)
    from llama_index.core.llms import MockLLM

    model = pace(MockLLM(), rpm=6_000)
    assert isinstance(model, MockLLM)
    assert str(asyncio.run(model.acomplete("salve"))) == "salve"


@promise("openai", tells=False)
def wraps_openai() -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding
    from llama_index.llms.openai import OpenAI

    paced = limiter()
    with a_model() as url:
        model = paced.wrap(OpenAI(model="gpt-4o-mini", api_base=url, api_key="none"))
        assert str(asyncio.run(model.acomplete("salve"))) == "salve"
    assert paced.statistics().admitted == 1
    paced.wrap(OpenAIEmbedding(api_key="none"))


@promise("http", tells=False)
def paces_a_client() -> None:
    paced = limiter()
    client = paced.http_client(sync=True)
    with a_model() as url, client:
        assert client.post(f"{url}/chat/completions", json={"messages": []}).status_code == 200
    assert paced.statistics().admitted == 1


@promise("batch")
def maps_a_batch() -> None:
    async def double(number: int) -> int:
        return 2 * number

    async def main(folder: str) -> list[int]:
        bar = sys.stderr
        with contextlib.redirect_stderr(io.StringIO()):
            results = limiter().amap(
                double, range(3), ordered=True, show_progress=True, checkpoint=f"{folder}/run.db"
            )
            found = [item.result async for item in results]
        assert sys.stderr is bar
        return found

    with tempfile.TemporaryDirectory() as folder:
        assert asyncio.run(main(folder)) == [0, 2, 4]


@promise("redis")
def opens_redis() -> None:
    open_store("redis://127.0.0.1:1/0")


@promise("prometheus")
def counts_for_prometheus() -> None:
    paced = limiter()
    off = telemetry.prometheus(paced)
    with paced.acquire_sync():
        pass
    from prometheus_client import REGISTRY, generate_latest

    assert b"packaged" in generate_latest(REGISTRY)
    off()


@promise("otel")
def measures_for_opentelemetry() -> None:
    off = telemetry.opentelemetry(limiter())
    off()


@promise("testing")
def serves_a_provider() -> None:
    from asyncbucket.testing import RateLimitedProvider

    with RateLimitedProvider(rpm=60) as provider:
        body = json.dumps({"model": "any", "messages": [{"role": "user", "content": "salve"}]})
        request = urllib.request.Request(  # noqa: S310 - loopback
            f"{provider.base_url}/chat/completions",
            body.encode(),
            {"content-type": "application/json", "authorization": "Bearer none"},
        )
        assert b"choices" in read(request)


@promise("testing", tells=False)
def gives_fixtures() -> None:
    shown = _run("-m", "pytest", "--fixtures", "-q", "-p", "no:cacheprovider")
    assert "rate_limited_provider" in shown
    assert "virtual_time" in shown


@promise("proxy")
def has_a_proxy() -> None:
    importlib.import_module("asyncbucket.proxy.serving")
    assert "--upstream" in _run("-m", "asyncbucket", "proxy", "--help")


@promise("cli", tells=False)
def has_commands() -> None:
    for command in ("demo", "run", "plan", "proxy", "watch", "plot", "doctor"):
        assert "Examples:" in _run("-m", "asyncbucket", command, "--help"), command
    assert "tokens bind" in _run(
        *("-m", "asyncbucket", "plan", "--calls", "1000", "--tokens", "800"),
        *("--tpm", "200000", "--latency", "1"),
    )
    outcome = json.loads(_run("-m", "asyncbucket", "demo", "--seconds", "3", "--json"))
    assert outcome


@promise("cli")
def says_its_version() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; from asyncbucket.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", code, "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ImportError(done.stderr)
    assert done.stdout.startswith("asyncbucket ")


@promise("plot", tells=False)
def draws_a_trace() -> None:
    from asyncbucket.cli.plan import draw_trace

    paced = limiter()
    trace = paced.trace()
    with paced.acquire_sync():
        pass
    with tempfile.TemporaryDirectory() as folder:
        trace.save(Path(folder) / "trace.jsonl")
        draw_trace(Path(folder) / "trace.jsonl", Path(folder) / "trace.svg", dark=False)
        assert (Path(folder) / "trace.svg").stat().st_size > 1_000


def _run(*arguments: str) -> str:
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=empty,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_implied(extras: set[str]) -> set[str]:
    """Return the extras, with those that they include."""
    found = extras.union(*(IMPLIED.get(extra, set()) for extra in extras))
    return found if found == extras else with_implied(found)


def broken(promise: Promise, *, here: bool) -> str | None:
    """Return what is wrong with a promise, whether or not its extra is installed."""
    try:
        promise.keep()
    except ImportError as error:
        told = f"asyncbucket[{promise.extra}]"
        if here:
            return traceback.format_exc()
        return None if "pip install" in str(error) and told in str(error) else f"says {error}"
    except Exception:  # noqa: BLE001 - any failure is reported
        return traceback.format_exc()
    return None  # it may work without its extra if another one brought what it needs


def main(extras: set[str]) -> int:
    """Check every promise; return 1 if one is broken."""
    here = with_implied({"core", *extras})
    failures = 0
    for each in PROMISES:
        there = each.extra in here
        if there or each.tells:
            wrong = broken(each, here=there)
            failures += wrong is not None
            what = f"{each.extra if there else 'no ' + each.extra}: {each.keep.__name__}"
            print(f"  {what}: {'ok' if wrong is None else 'BROKEN: ' + wrong}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(set(sys.argv[1:])))
