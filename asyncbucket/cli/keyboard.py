"""What is typed into `asyncbucket watch` changes a running program's limiters."""

import contextlib
import os
import select
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import httpx

from asyncbucket.cli.ui import Panel

_PATIENCE: Final = 5.0
_BAD_REQUEST: Final = 400
_COMMANDS: Final = "limits 600 RPM, 200k TPM | concurrency 8 | pause 60 | resume | shadow off"
#: Values that are neither numbers nor limits.
_WORDS: Final = {"": True, "off": False}


class Keyboard:
    """Read keys from the terminal while it is entered, and send what they change.

    Raises:
        ValueError: on entering: standard input is no terminal.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url, self._headers = url, {"authorization": f"Bearer {token}"}
        self._names: list[str] = []
        #: What is being typed; and what the last command came to.
        self._typed = self._told = ""
        self._restored = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if not sys.stdin.isatty():
            raise ValueError(
                "--token needs a terminal to read keys from: leave it out to only watch"
            )
        import termios  # not on Windows
        import tty

        before = termios.tcgetattr(sys.stdin)
        self._restored.callback(termios.tcsetattr, sys.stdin, termios.TCSADRAIN, before)
        tty.setcbreak(sys.stdin)
        return self

    def __exit__(self, *_: object) -> None:
        self._restored.close()

    def wait(self, seconds: float) -> None:
        """Take keys for so long, or until one was typed."""
        if select.select([sys.stdin], [], [], seconds)[0]:
            for key in os.read(sys.stdin.fileno(), 1_024).decode("utf-8", "ignore"):
                self.take(key)

    def panel(self, limiters: Sequence[Mapping[str, Any]]) -> Panel:
        """Return what is shown below ``limiters``."""
        # The chosen one comes first.
        self._names = self._names or [limiter["name"] for limiter in limiters]
        typing = f"{self._typed}_" if self._typed else f"type {_COMMANDS}; Tab: next limiter"
        return Panel(f"> {self._names[0]}  {self._told}", facts=(typing,))

    def take(self, key: str) -> None:
        """Do what ``key`` means."""
        if key == "\t":
            self._names.append(self._names.pop(0))
        elif key in "\r\n":
            typed, self._typed = self._typed.strip(), ""
            self._send(*typed.partition(" ")[::2])
        elif key in "\x7f\b":
            self._typed = self._typed[:-1]
        elif key.isprintable():
            self._typed += key

    def _send(self, what: str, value: str) -> None:
        """Ask the program for a change, and remember what came of it."""
        read: Any = int(value) if value.isdecimal() else _WORDS.get(value, value)
        change = {what: value.split(",") if what == "limits" else read}
        try:
            with httpx.Client(trust_env=False, timeout=_PATIENCE, headers=self._headers) as client:
                reply = client.post(self._url, json={"limiter": self._names[0], **change})
            bad = reply.status_code == _BAD_REQUEST
            self._told = f"{what}: {reply.json()['error'] if bad else reply.reason_phrase}"
        except httpx.HTTPError as error:
            self._told = f"the program does not answer ({type(error).__name__})"
