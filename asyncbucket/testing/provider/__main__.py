"""`python -m asyncbucket.testing.provider`: one line with the URL, and at the end the statistics."""

import argparse
import inspect
import json
import signal
import sys
import threading
from dataclasses import asdict, fields
from typing import Any

from asyncbucket.testing.provider.options import Options
from asyncbucket.testing.provider.running import RateLimitedProvider, carry_out


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM or, with --commands, the end of standard input."""
    options = vars(_parser().parse_args(arguments))
    takes_commands = options.pop("commands", False)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stopped.set())
    try:
        provider = RateLimitedProvider(**options)
        provider.start()
    except (OSError, ValueError) as exc:
        raise SystemExit(f"error: {getattr(exc, 'strerror', None) or exc}") from exc
    _print(provider.base_url)
    if takes_commands:
        # Ctrl-C goes to all processes of a terminal; the parent says when this one ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for line in sys.stdin:
            _print(json.dumps(_obey(provider, *json.loads(line))))
    else:
        stopped.wait()
    provider.stop()
    if not takes_commands:
        _print(json.dumps(asdict(provider.statistics())))


def _obey(provider: RateLimitedProvider, command: str, arguments: dict[str, Any]) -> Any:
    """Return the answer to a command, and the kind and text of an error."""
    try:
        return carry_out(provider.enforcer, command, arguments), None
    except (TypeError, ValueError) as exc:
        return None, (type(exc).__name__, str(exc))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m asyncbucket.testing.provider",
        description=inspect.getdoc(Options),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for option in fields(Options):
        if option.name != "clock":
            parser.add_argument(f"--{option.name.replace('_', '-')}", type=_value)
    parser.add_argument("--commands", action="store_true", help="read commands from standard input")
    return parser


def _value(text: str) -> Any:
    """Read a number, a range such as 0.2:0.6, or a name; `Options` checks it."""
    low, colon, high = text.partition(":")
    for read in (int, float):
        try:
            return (float(low), float(high)) if colon else read(text)
        except ValueError:
            pass
    return text


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command's output


if __name__ == "__main__":
    main()
