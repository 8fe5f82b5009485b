"""Keys of `asyncbucket watch` that change a running program's limiters."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import httpx

from asyncbucket.cli.ui import Panel

_PATIENCE: Final = 5.0
_BAD_REQUEST: Final = 400
#: Seconds that the pause of a key lasts.
_PAUSE: Final = 60
_KEYS: Final = (
    "n next limiter, l limit, c concurrency, p pause 60 s, r resume, s shadow off, q quit"
)
_PROMPTS: Final = {"l": "limits, such as 600 RPM, 200k TPM", "c": "calls at once, or auto"}
_ENTER, _ESCAPE, _BACKSPACES = "\r\n", "\x1b", "\x7f\b"


class Keyboard:
    """Read keys from the terminal while it is entered, and send what they change.

    Raises:
        ValueError: on entering: standard input is no terminal.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url, token
        self._names: list[str] = []
        self._chosen = 0
        #: What is being typed, after which key; and what the last change came to.
        self._typing: str | None = None
        self._typed = self._told = ""
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if not sys.stdin.isatty():
            raise ValueError(
                "--token needs a terminal to read keys from: leave it out to only watch"
            )
        import termios  # not on Windows
        import tty

        before = termios.tcgetattr(sys.stdin)
        self._restore.callback(termios.tcsetattr, sys.stdin, termios.TCSADRAIN, before)
        tty.setcbreak(sys.stdin)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def wait(self, seconds: float) -> None:
        """Take keys for so long, or until one was typed.

        Raises:
            KeyboardInterrupt: it was the one that quits.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([sys.stdin], [], [], left)[0]:
                for key in os.read(sys.stdin.fileno(), 1_024).decode("utf-8", "ignore"):
                    self.take(key)
                return

    def panel(self, limiters: Sequence[Mapping[str, Any]]) -> Panel:
        """Return what is shown below ``limiters``."""
        self._names = [limiter["name"] for limiter in limiters]
        doing = _KEYS
        if self._typing is not None:
            doing = f"{_PROMPTS[self._typing]}: {self._typed}_"
        return Panel(f"> {self._name()}", facts=tuple(filter(None, (self._told, doing))))

    def take(self, key: str) -> None:
        """Do what ``key`` means."""
        if self._typing is not None:
            self._type(key)
        elif key == "q":
            raise KeyboardInterrupt
        elif key == "n":
            self._chosen += 1
        elif key in _PROMPTS:
            self._typing, self._typed = key, ""
        else:
            wanted = {"p": ("pause", _PAUSE), "r": ("resume", True), "s": ("shadow", False)}.get(
                key
            )
            if wanted is not None:
                self._send(*wanted)

    def _type(self, key: str) -> None:
        if key in _ENTER:
            typing, self._typing = self._typing, None
            if self._typed and typing == "l":
                self._send("limits", [each.strip() for each in self._typed.split(",")])
            elif self._typed:
                self._send(
                    "concurrency", int(self._typed) if self._typed.isdecimal() else self._typed
                )
        elif key == _ESCAPE:
            self._typing = None
        elif key in _BACKSPACES:
            self._typed = self._typed[:-1]
        elif key.isprintable():
            self._typed += key

    def _name(self) -> str:
        return self._names[self._chosen % len(self._names)] if self._names else ""

    def _send(self, what: str, value: Any) -> None:
        """Ask the program for a change, and remember what came of it."""
        headers = {"authorization": f"Bearer {self._token}"}
        try:
            with httpx.Client(trust_env=False, timeout=_PATIENCE, headers=headers) as client:
                reply = client.post(self._url, json={"limiter": self._name(), what: value})
            told = reply.json()["error"] if reply.status_code == _BAD_REQUEST else ""
            self._told = told or (f"{what} changed" if reply.is_success else reply.reason_phrase)
        except httpx.HTTPError as error:
            self._told = f"the program does not answer ({type(error).__name__})"
