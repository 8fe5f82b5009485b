"""The provider in a process of its own, with the same surface."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import asdict
from typing import Any, Unpack

from asyncbucket.testing.provider.running import Running
from asyncbucket.testing.provider.settings import Failure, Options, settings_of
from asyncbucket.testing.provider.statistics import Arrival, ProviderStatistics

TIMEOUT = 10.0
"""Seconds for the process to answer or to end."""


class ProviderProcess(Running):
    """`RateLimitedProvider` in a process: no shared interpreter lock, for demos and benchmarks.

    The surface is the same; statistics, arrivals and orders travel over HTTP (a millisecond or two,
    synchronously). After the end `statistics()` returns the last values; `arrivals` must be read
    before. The process ends with its parent, however that ends.

    Args:
        options: As for `RateLimitedProvider`, except `clock` and a callable `latency`. Times in
            `arrivals` are comparable with `time.monotonic_ns()` here if that clock is the
            machine's, as on Linux and macOS.

    Raises:
        ValueError: For an option out of its range, or one that can't leave this process.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        if "clock" in options or callable(options.get("latency")):
            raise ValueError("a clock or a callable latency can't be sent to another process")
        settings_of(options)
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self._base_url = ""
        self._last_statistics = ProviderStatistics()

    def __repr__(self) -> str:
        where = self._base_url if self._process else "not running"
        return f"<ProviderProcess {self._options} {where}>"

    @property
    def url(self) -> str:
        """The root, such as ``http://127.0.0.1:8000``; what an Azure client calls its endpoint."""
        return self.base_url.removesuffix("/v1")

    @property
    def base_url(self) -> str:
        """What an OpenAI client calls its base URL, such as ``http://127.0.0.1:8000/v1``."""
        if not self._base_url:
            raise RuntimeError("the provider isn't running: enter it with `with` or `async with`")
        return self._base_url

    @property
    def pid(self) -> int | None:
        """The process's id while it runs."""
        return self._process.pid if self._process else None

    @property
    def arrivals(self) -> list[Arrival]:
        """The latest calls and whether they were admitted, oldest first."""
        return [Arrival(*fields) for fields in self._request("/arrivals")]

    def statistics(self) -> ProviderStatistics:
        """Take a snapshot of what was seen since the start."""
        if self._process is None:
            return self._last_statistics
        return ProviderStatistics(**self._request("/statistics"))

    def reconfigure(self, **options: Unpack[Options]) -> None:
        """See `RateLimitedProvider.reconfigure`."""
        self._request("/reconfigure", dict(options))

    def fail_next(
        self,
        count: int = 1,
        *,
        status: int = 500,
        code: str | None = None,
        retry_after: float | None = None,
        after_chunks: int | None = None,
    ) -> None:
        """See `RateLimitedProvider.fail_next`."""
        failure = Failure(status, code, retry_after, after_chunks)
        self._request("/fail_next", {"count": count, **asdict(failure)})

    def start(self) -> None:
        """Start the process and return when it answers. Done by entering the context."""
        if self._process is not None:
            raise RuntimeError(f"the provider runs already, at {self._base_url}")
        command = [sys.executable, "-m", "asyncbucket.testing.provider", "--until-eof"]
        for name, value in self._options.items():
            command += (
                [f"--{name.replace('_', '-')}", _argument(value)] if value is not None else []
            )
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # the parent handles Ctrl-C, and ends this process
        )
        assert self._process.stdout is not None
        self._base_url = self._process.stdout.readline().strip()
        if not self._base_url:
            status = self._process.wait()
            self.stop()
            raise RuntimeError(f"the provider's process ended with status {status} at its start")

    def stop(self) -> None:
        """End the process and keep its last statistics. Done by leaving the context. Idempotent."""
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            # Closes its standard input, upon which it stops and prints its statistics.
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        if output.strip():
            self._last_statistics = ProviderStatistics(**json.loads(output))

    def _request(self, path: str, command: dict[str, Any] | None = None) -> Any:
        if self._process is None:
            raise RuntimeError("the provider isn't running: enter it with `with` or `async with`")
        body = None if command is None else json.dumps(command).encode()
        request = urllib.request.Request(self.url + path, data=body)  # noqa: S310 - loopback
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=TIMEOUT) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as exc:
            with exc:
                raise ValueError(json.load(exc)["error"]) from None
        except OSError as exc:
            status = self._process.poll()
            raise RuntimeError(
                f"the provider's process doesn't answer (its exit status: {status})"
            ) from exc


def _argument(value: object) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
