"""`python -m asyncbucket.testing.provider`: one line with the URL, and at the end the statistics."""

import argparse
import ast
import inspect
import json
import signal
import threading
from dataclasses import asdict, fields
from typing import Any

from asyncbucket.testing.provider.options import Options
from asyncbucket.testing.provider.running import RateLimitedProvider


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m asyncbucket.testing.provider",
        description=inspect.getdoc(Options),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for option in fields(Options):
        if option.name != "clock":
            parser.add_argument(f"--{option.name.replace('_', '-')}", type=_value)
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stopped.set())
    try:
        with RateLimitedProvider(**vars(parser.parse_args())) as provider:
            print(provider.base_url, flush=True)  # noqa: T201 - a command's output
            stopped.wait()
    except (OSError, ValueError) as exc:
        raise SystemExit(f"error: {getattr(exc, 'strerror', None) or exc}") from exc
    print(json.dumps(asdict(provider.statistics())))  # noqa: T201 - a command's output


def _value(text: str) -> Any:
    """Read a number, a range such as (0.2, 0.6), or a name; `Options` checks it."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    main()
