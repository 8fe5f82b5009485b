"""What each extra promises, tested in an environment that has it and nothing else.

``python -I promises.py EXTRA...`` is run by an interpreter whose environment has only the wheel and
these extras; ``WHEEL=`` before it names a folder to import from instead. What an extra serves must
work; what lacks something must say how to install it. The script prints a line for each promise,
and ends with status 1 if one is broken.

Only the standard library is imported here: nothing must help the code under test.
"""

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

if "WHEEL" in os.environ:
    sys.path.insert(0, os.environ["WHEEL"])

from asyncbucket import Limiter, TokenBucket, pace, plan, telemetry
from asyncbucket.stores import open_store

#: Extras that include others.
IMPLIED = {
    "openai": {"llama-index", "http"},
    "llama-index": {"http"},
    "proxy": {"http", "prometheus"},
    "cli": {"batch", "openai", "llama-index", "http", "proxy", "prometheus", "testing"},
}
IMPLIED["plot"] = {"cli", *IMPLIED["cli"]}
IMPLIED["all"] = {"otel", "plot", "redis", *IMPLIED["plot"]}


#: An extra; what works with it; whether users without it are told to install it, or cannot get that far.
PROMISES: list[tuple[str, Callable[[], object], bool]] = []


def promise(extra: str, *, tells: bool = True) -> Callable[[Callable[[], object]], None]:
    """Note what an extra, or else the core, promises."""
    return lambda keep: PROMISES.append((extra, keep, tells))


def limiter() -> Limiter:
    """Return a limiter that admits every call here at once."""
    return Limiter("6000 RPM", "2M TPM", concurrency=3, name="packaged")


def read(url: str) -> bytes:
    """Return what a server on this machine answers, an error or not."""
    keep_errors = urllib.request.OpenerDirector()
    keep_errors.add_handler(urllib.request.HTTPHandler())
    body: bytes = keep_errors.open(url, timeout=10).read()
    return body


@promise("core")
def paces_calls() -> None:
    from asyncbucket.testing import VirtualTime

    async def main() -> None:
        paced = Limiter("60 RPH", "2M TPM", concurrency=3, clock=time.clock)
        async with paced.acquire(tokens=5) as lease:
            lease.settle(tokens=3)
        async with paced.child("chat", rpm=600).acquire(), paced.key("acme").acquire():
            pass
        await TokenBucket(rate=5.0, burst=5, clock=time.clock).acquire()
        assert paced.statistics().admitted == 3

    with VirtualTime() as time:
        time.run(main())


@promise("core")
def plans_shares_and_tells() -> None:
    assert "tokens bind" in str(plan(calls=1_000, tokens=800, tpm=200_000, latency=1.5))
    os.environ["PACKAGED_RPM"] = "500"
    assert Limiter.from_env("PACKAGED_").limits[0].amount == 500
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/limits.db"
        with Limiter("6000 RPM", store=url, name="packaged").acquire_sync():
            pass
    paced = limiter()
    trace = paced.trace()
    telemetry.logging(paced)
    with paced.acquire_sync(), paced.serve_stats() as server:
        assert b"packaged" in read(server.url)
    assert [amount for _, amount in trace.amounts("requests")] == [1]


@promise("http", tells=False)
def paces_a_client() -> None:
    limiter().http_client(sync=True).close()
    limiter().transport().close()


@promise("llama-index")
def tells_llama_index() -> None:
    telemetry.llama_index(limiter())


@promise("llama-index")
def tries_again() -> None:
    import_module("asyncbucket.retry")


@promise("llama-index")
def wraps_a_model() -> None:
    if find_spec("llama_index") is None:
        pace(object(), rpm=5)
    from llama_index.core.llms import MockLLM

    model = pace(MockLLM(), rpm=6_000)
    assert isinstance(model, MockLLM)
    assert str(asyncio.run(model.acomplete("salve"))) == "salve"


@promise("openai", tells=False)
def wraps_openai() -> None:
    from llama_index.embeddings.openai import OpenAIEmbedding
    from llama_index.llms.openai import OpenAI

    limiter().wrap([OpenAI(api_key="none"), OpenAIEmbedding(api_key="none")])


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
    telemetry.prometheus(limiter())()


@promise("otel")
def measures_for_opentelemetry() -> None:
    telemetry.opentelemetry(limiter())()


@promise("testing")
def serves_a_provider() -> None:
    from asyncbucket.testing import RateLimitedProvider

    with RateLimitedProvider(rpm=60) as provider:
        assert b"API key" in read(provider.url)
    shown = run("-m", "pytest", "--fixtures", "-q", "-p", "no:cacheprovider")
    assert "rate_limited_provider" in shown
    assert "virtual_time" in shown


@promise("proxy", tells=False)
def has_a_proxy() -> None:
    import_module("asyncbucket.cli.proxy.app")
    assert "--upstream" in run("-m", "asyncbucket", "proxy", "--help")


@promise("cli", tells=False)
def has_commands() -> None:
    for command in ("demo", "run", "plan", "proxy", "watch", "plot", "doctor"):
        assert "Examples:" in run("-m", "asyncbucket", command, "--help"), command
    assert "tokens bind" in run(
        *("-m", "asyncbucket", "plan", "--calls", "1000", "--tokens", "800"),
        *("--tpm", "200000", "--latency", "1"),
    )
    assert "429s" in run("-m", "asyncbucket", "demo", "--seconds", "3")


@promise("cli")
def says_its_version() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; from asyncbucket.cli import main; main()"
    try:
        assert run("-I", "-S", "-B", "-c", code, "--version").startswith("asyncbucket ")
    except AssertionError as error:
        raise ImportError(error) from error


@promise("plot", tells=False)
def draws_a_trace() -> None:
    import_module("asyncbucket.cli.plan")


def run(*arguments: str) -> str:
    """Run this interpreter in an empty folder, and return what it printed."""
    command = [sys.executable, *arguments]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=empty, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def broken(extra: str, keep: Callable[[], object], *, here: bool) -> str:
    """Return what is wrong with a promise, whether or not its extra is installed."""
    try:
        keep()
    except ImportError as error:
        told = "pip install" in str(error) and f"asyncbucket[{extra}]" in str(error)
        return "" if told and not here else traceback.format_exc()
    except Exception:  # noqa: BLE001 - any failure is reported
        return traceback.format_exc()
    return ""  # it may work without its extra if another one brought what it needs


def main(extras: set[str]) -> int:
    """Check every promise; return 1 if one is broken."""
    installed = {"core", *extras}.union(*(IMPLIED.get(extra, set()) for extra in extras))
    failures = 0
    for extra, keep, tells in PROMISES:
        here = extra in installed
        if here or tells:
            wrong = broken(extra, keep, here=here)
            failures += bool(wrong)
            what = f"{extra if here else 'no ' + extra}: {keep.__name__}"
            print(f"  {what}: {f'BROKEN: {wrong}' if wrong else 'ok'}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(set(sys.argv[1:])))
