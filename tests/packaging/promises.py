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
    "cli": {"batch", "http", "openai", "llama-index", "testing"},
    "plot": {"cli", "batch", "http", "openai", "llama-index", "testing"},
    "all": {"batch", "cli", "http", "llama-index", "openai", "otel", "plot", "prometheus", "redis"},
}


@dataclass(frozen=True)
class Promise:
    """Something that works with an extra, and without it names the extra to install."""

    extra: str
    name: str
    keep: Callable[[], object]
    #: Whether users without the extra are told to install it; False: they cannot get that far.
    tells: bool = True


def read(request: str | urllib.request.Request) -> bytes:
    """Return the answer of a server on this machine."""
    with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310 - loopback
        body: bytes = reply.read()
        return body


def limiter() -> Limiter:
    """Return a limiter that admits every call here at once."""
    return Limiter("6000 RPM", "2M TPM", concurrency=3, name="packaged")


def paces_calls() -> None:
    """Limiter, TokenBucket, a child and a tenant work on an event loop."""

    async def main() -> None:
        paced = limiter()
        async with paced.acquire(tokens=5) as lease:
            lease.settle(tokens=3)
        async with paced.child("chat", rpm=600).acquire(), paced.key("acme").acquire():
            pass
        await TokenBucket(rate=5.0, burst=5).acquire()
        assert paced.statistics().admitted == 3

    asyncio.run(main())


def paces_without_a_loop() -> None:
    """`acquire_sync` and a plain function under `paced` work."""
    paced = limiter()
    with paced.acquire_sync(tokens=5):
        pass
    assert paced.paced(len)("four") == 4


def plans() -> None:
    """`plan` runs on virtual time."""
    planned = plan(calls=1_000, tokens=800, rpm=500, tpm=200_000, concurrency=32, latency=1.5)
    assert "tokens bind" in str(planned)


def shares_a_file() -> None:
    """SQLite is the store for one machine."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/limits.db"
        with Limiter("6000 RPM", store=url, name="packaged").acquire_sync():
            pass


def says_what_it_does() -> None:
    """Logging, a trace and a page of statistics on loopback work."""
    paced = limiter()
    off = telemetry.logging(paced)
    trace = paced.trace()
    with paced.acquire_sync(), paced.serve_stats() as server:
        assert b"packaged" in read(server.url)
    assert len(trace) == 1
    off()


def has_its_data() -> None:
    """The scripts of the Redis store and the marker for type checkers are there."""
    package = Path(asyncbucket.__file__).parent
    assert (package / "py.typed").is_file()
    assert list((package / "stores" / "lua").glob("*.lua"))


def reads_settings() -> None:
    """Settings come from the environment, and the presets can be imported."""
    os.environ["PACKAGED_RPM"] = "500"
    assert Limiter.from_env("PACKAGED_").limits[0].amount == 500
    assert asyncbucket.presets.preset_names()


def has_virtual_time() -> None:
    """An hour of pacing takes no time, and needs no web framework."""
    from asyncbucket.testing import VirtualTime

    async def main() -> None:
        hour = Limiter("1 RPH", clock=time.clock)
        await hour.acquire()
        await hour.acquire()

    with VirtualTime() as time:
        time.run(main())


CORE = (
    paces_calls,
    paces_without_a_loop,
    plans,
    shares_a_file,
    says_what_it_does,
    has_its_data,
    reads_settings,
    has_virtual_time,
)

_REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o-mini",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "salve"},
        }
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}
#: Headers of OpenAI about what is left; their durations need a parser of their own.
_LEFT = {
    "x-ratelimit-limit-requests": "6000",
    "x-ratelimit-remaining-requests": "5999",
    "x-ratelimit-reset-requests": "1m0.5s",
    "x-ratelimit-limit-tokens": "2000000",
    "x-ratelimit-remaining-tokens": "1999000",
    "x-ratelimit-reset-tokens": "120ms",
}


class _Model(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Answer any chat."""
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps(_REPLY).encode()
        self.send_response(200)
        for name, value in _LEFT.items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
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


def wraps_a_model() -> None:
    """A LlamaIndex model can be paced."""
    if importlib.util.find_spec("llama_index") is None:
        pace(object(), rpm=5)
    from llama_index.core.llms import MockLLM

    model = pace(MockLLM(), rpm=6_000)
    assert isinstance(model, MockLLM)
    assert str(asyncio.run(model.acomplete("salve"))) == "salve"


def wraps_openai() -> None:
    """OpenAI's classes can be paced, over HTTP with headers that say what is left."""
    from llama_index.embeddings.openai import OpenAIEmbedding
    from llama_index.llms.openai import OpenAI

    paced = limiter()
    with a_model() as url:
        model = paced.wrap(OpenAI(model="gpt-4o-mini", api_base=url, api_key="none"))
        assert str(asyncio.run(model.acomplete("salve"))) == "salve"
    assert paced.statistics().admitted == 1
    paced.wrap(OpenAIEmbedding(api_key="none"))


def paces_a_client() -> None:
    """The limiter's own client works with whichever HTTP library is installed."""
    paced = limiter()
    client = paced.http_client(sync=True)
    with a_model() as url, client:
        assert client.post(f"{url}/chat/completions", json={"messages": []}).status_code == 200
    assert paced.statistics().admitted == 1


def maps_a_batch() -> None:
    """`amap` works with a bar and a checkpoint, and so does `map` for code without a loop."""

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

    paced = limiter()
    with tempfile.TemporaryDirectory() as folder:
        assert asyncio.run(main(folder)) == [0, 2, 4]
    assert sorted(item.result for item in paced.map(abs, [-1, -2])) == [1, 2]


def opens_redis() -> None:
    """A store on a server can be opened; nothing connects yet."""
    open_store("redis://127.0.0.1:1/0")


def counts_for_prometheus() -> None:
    """The metrics are in the registry."""
    paced = limiter()
    off = telemetry.prometheus(paced)
    with paced.acquire_sync():
        pass
    from prometheus_client import REGISTRY, generate_latest

    assert b"packaged" in generate_latest(REGISTRY)
    off()


def measures_for_opentelemetry() -> None:
    """The API alone is enough; an SDK is only needed to see anything."""
    off = telemetry.opentelemetry(limiter())
    off()


def serves_a_provider() -> None:
    """The bundled provider answers and counts."""
    from asyncbucket.testing import RateLimitedProvider

    with RateLimitedProvider(rpm=60) as provider:
        body = json.dumps({"model": "any", "messages": [{"role": "user", "content": "salve"}]})
        request = urllib.request.Request(  # noqa: S310 - loopback
            f"{provider.base_url}/chat/completions",
            body.encode(),
            {"content-type": "application/json", "authorization": "Bearer none"},
        )
        assert b"choices" in read(request)


def gives_fixtures() -> None:
    """Pytest finds them by itself."""
    shown = _run("-m", "pytest", "--fixtures", "-q", "-p", "no:cacheprovider")
    assert "rate_limited_provider" in shown
    assert "virtual_time" in shown


def has_commands() -> None:
    """Each has its help, and `plan` and the demo run."""
    for command in ("demo", "run", "plan", "watch", "plot", "doctor"):
        assert "Examples:" in _run("-m", "asyncbucket", command, "--help"), command
    assert "tokens bind" in _run(
        *("-m", "asyncbucket", "plan", "--calls", "1000", "--tokens", "800"),
        *("--tpm", "200000", "--latency", "1"),
    )
    outcome = json.loads(_run("-m", "asyncbucket", "demo", "--seconds", "3", "--json"))
    assert outcome


def says_its_version() -> None:
    """The command tells its version; without its extra it tells what to install."""
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


def draws_a_trace() -> None:
    """A picture is drawn of what `limiter.trace()` kept."""
    from asyncbucket.cli.pictures import draw_trace, read_trace

    paced = limiter()
    trace = paced.trace()
    with paced.acquire_sync():
        pass
    with tempfile.TemporaryDirectory() as folder:
        trace.save(Path(folder) / "trace.jsonl")
        draw_trace(read_trace(Path(folder) / "trace.jsonl"), Path(folder) / "trace.svg", dark=False)
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


PROMISES = (
    Promise("llama-index", "wraps a model", wraps_a_model),
    Promise("llama-index", "tells LlamaIndex", lambda: telemetry.llama_index(limiter())),
    Promise("llama-index", "tries again", lambda: importlib.import_module("asyncbucket.retry")),
    Promise("openai", "wraps OpenAI's model", wraps_openai, tells=False),
    Promise("http", "paces a client", paces_a_client, tells=False),
    Promise("batch", "maps a batch", maps_a_batch),
    Promise("redis", "opens a store on a server", opens_redis),
    Promise("prometheus", "counts for Prometheus", counts_for_prometheus),
    Promise("otel", "measures for OpenTelemetry", measures_for_opentelemetry),
    Promise("testing", "serves a provider", serves_a_provider),
    Promise("testing", "gives fixtures", gives_fixtures, tells=False),
    Promise("cli", "says its version", says_its_version),
    Promise("cli", "has commands", has_commands, tells=False),
    Promise("plot", "draws a trace", draws_a_trace, tells=False),
)


def installed(extras: list[str]) -> set[str]:
    """Return the extras, with those that they include."""
    found = set(extras)
    for extra in extras:
        found |= IMPLIED.get(extra, set())
        for implied in IMPLIED.get(extra, set()):
            found |= IMPLIED.get(implied, set())
    return found | ({"testing"} if "all" in extras else set())


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


def main(extras: list[str]) -> int:
    """Check every promise; return 1 if one is broken."""
    here = installed(extras)
    failures = 0
    core = [Promise("core", each.__name__.replace("_", " "), each) for each in CORE]
    for promise in (*core, *PROMISES):
        there = promise.extra in here or promise.extra == "core"
        if not there and not promise.tells:
            continue
        wrong = broken(promise, here=there)
        failures += wrong is not None
        verdict = "ok" if wrong is None else f"BROKEN: {wrong}"
        print(f"  {promise.extra if there else 'no ' + promise.extra}: {promise.name}: {verdict}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
