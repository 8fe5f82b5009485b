"""Make the pictures of `watch` and `plot`: what a real terminal shows of a real program, by tmux.

    python docs/pictures/make.py

The provider is the bundled one. Once it answers 429, with a Retry-After of 1.5 s: that is the pause in
the picture of the trace.
"""

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from openai import AsyncOpenAI, RateLimitError
from rich.console import Console
from rich.text import Text

from asyncbucket import Limiter
from asyncbucket.cli.plan import draw_trace
from asyncbucket.testing import RateLimitedProvider

HERE = Path(__file__).parent
WIDTH: Final = 92
HEIGHT: Final = 21


class Terminal:
    """A terminal of a fixed size, on which a command is typed."""

    def __init__(self, folder: Path, command: str) -> None:
        """Start ``command`` in ``folder``."""
        self._server = f"pictures-{os.getpid()}"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = os.environ | {"PATH": path, "PS1": "$ "}
        (folder / "shell").write_text("PS1='$ '\n")
        shell = f"bash --rcfile {folder / 'shell'}"
        size = ["-x", str(WIDTH), "-y", str(HEIGHT)]
        self._tmux("new-session", "-d", *size, "-c", str(folder), shell, env=given)
        time.sleep(0.5)
        self.type(command, "Enter")

    def type(self, *keys: str) -> None:
        """Type text, or keys by their names."""
        self._tmux("send-keys", *keys)

    def _tmux(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        command = ["tmux", "-f", os.devnull, "-L", self._server, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout

    def draw(self, path: Path, title: str) -> None:
        """Draw what the terminal shows now, and close it."""
        seen = self._tmux("capture-pane", "-e", "-p").rstrip()
        self._tmux("kill-server")
        console = Console(record=True, width=WIDTH, file=io.StringIO())
        console.print(Text.from_ansi(seen))
        console.save_svg(str(path), title=title, unique_id="asyncbucket")


async def paced_program(provider: RateLimitedProvider, limiter: Limiter, *, calls: int) -> None:
    """Send people's calls and twice as many of a batch, all at once, under one limiter."""
    children = limiter.child("chat"), limiter.child("batch", "30 requests/6s")
    async with asyncio.TaskGroup() as group:
        for count, child in zip((calls, 2 * calls), children, strict=True):
            client = AsyncOpenAI(
                base_url=provider.base_url,
                api_key="none",
                max_retries=0,
                http_client=child.http_client(),
            )
            for number in range(count):
                group.create_task(ask(client, "word " * (20 + number % 7 * 20)))


async def ask(client: AsyncOpenAI, text: str) -> None:
    """Ask until there is an answer."""
    while True:
        with contextlib.suppress(RateLimitError):
            await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": text}], max_tokens=40
            )
            return


async def draw_watch_and_trace(folder: Path) -> None:
    """Draw a program while it runs; and the trace of one that gets a 429."""
    options: Any = {
        "rpm": 60,
        "tpm": 12_000,
        "minute": 6.0,
        "latency": (0.8, 1.6),
    }
    for is_refused in (False, True):
        limiter = Limiter("60 requests/6s", "12k tokens/6s", concurrency=16, name="openai")
        trace = limiter.trace()
        with (
            RateLimitedProvider(**options) as provider,
            limiter.serve_stats(control=True) as server,
        ):
            program = asyncio.create_task(paced_program(provider, limiter, calls=50))
            await asyncio.sleep(4)
            if is_refused:
                provider.fail_next(1, status=429, retry_after=1.5)
            else:
                command = f"asyncbucket watch {server.url} --token {server.token}"
                terminal = Terminal(folder, command)
                await asyncio.sleep(3)
                terminal.type("C-c")
                await asyncio.sleep(0.5)
                terminal.type("openai/batch: 60 requests/6s")
                await asyncio.sleep(0.5)
                terminal.draw(HERE / "watch.svg", "asyncbucket watch")
            await program
    trace.save(str(folder / "trace.jsonl"))
    for name in ("light", "dark"):
        draw_trace(folder / "trace.jsonl", HERE / f"trace-{name}.png", dark=name == "dark")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(draw_watch_and_trace(Path(folder)))
