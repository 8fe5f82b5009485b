"""Keys of `asyncbucket watch` that change a running program's limiters."""

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
_KEYS: Final = "keys: n next limiter, l limits, p pause 60 s, r resume, s shadow off, q quit"
_CHANGES: Final = {"p": ("pause", 60), "r": ("resume", True), "s": ("shadow", False)}
_PROMPT: Final = "limits such as 600 RPM, 200k TPM, or how many calls at once: "
_ENTER, _ESCAPE, _BACKSPACES = "\r\n", "\x1b", "\x7f\b"


class Keyboard:
    """Read keys from the terminal while it is entered, and send what they change.

    Raises:
        ValueError: on entering: standard input is no terminal.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url, self._headers = url, {"authorization": f"Bearer {token}"}
        self._names: list[str] = []
        self._restored = contextlib.ExitStack()
        #: The limits that are being typed; and what the last change came to.
        self._typed: str | None = None
        self._told = ""

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
        """Take keys for so long, or until one was typed.

        Raises:
            KeyboardInterrupt: it was the one that quits.
        """
        if select.select([sys.stdin], [], [], seconds)[0]:
            for key in os.read(sys.stdin.fileno(), 1_024).decode("utf-8", "ignore"):
                self.take(key)

    def panel(self, limiters: Sequence[Mapping[str, Any]]) -> Panel:
        """Return what is shown below ``limiters``."""
        # The chosen one comes first.
        self._names = self._names or [limiter["name"] for limiter in limiters]
        doing = _KEYS if self._typed is None else f"{_PROMPT}{self._typed}_"
        return Panel(f"> {self._names[0]}  {self._told}", facts=(doing,))

    def take(self, key: str) -> None:
        """Do what ``key`` means."""
        if self._typed is not None:
            self._type(key, self._typed)
        elif key == "q":
            raise KeyboardInterrupt
        elif key == "n":
            self._names.append(self._names.pop(0))
        elif key == "l":
            self._typed = ""
        elif key in _CHANGES:
            self._send(*_CHANGES[key])

    def _type(self, key: str, typed: str) -> None:
        if key in _ENTER:
            self._typed = None
            slots = int(typed) if typed.isdecimal() else 0
            self._send(*(("concurrency", slots) if slots else ("limits", typed.split(","))))
        elif key == _ESCAPE:
            self._typed = None
        elif key.isprintable() or key in _BACKSPACES:
            self._typed = typed[:-1] if key in _BACKSPACES else typed + key

    def _send(self, what: str, value: Any) -> None:
        """Ask the program for a change, and remember what came of it."""
        try:
            with httpx.Client(trust_env=False, timeout=_PATIENCE, headers=self._headers) as client:
                reply = client.post(self._url, json={"limiter": self._names[0], what: value})
            bad = reply.status_code == _BAD_REQUEST
            self._told = f"{what}: {reply.json()['error'] if bad else reply.reason_phrase}"
        except httpx.HTTPError as error:
            self._told = f"the program does not answer ({type(error).__name__})"
