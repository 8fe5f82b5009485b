"""`python -m asyncbucket.testing.provider`: one line with the URL, and at the end the statistics."""

import argparse
import ast
import inspect
import json
import re
import signal
import threading
from dataclasses import asdict, fields
from typing import Any, Final

from asyncbucket.testing.provider.options import Options
from asyncbucket.testing.provider.running import RateLimitedProvider

#: An attribute in the docstring of `Options`: its name, and what it is.
_ATTRIBUTE: Final = re.compile(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m asyncbucket.testing.provider",
        description="Serve a provider that answers 429 above its limits, until Ctrl-C. It prints its "
        "base URL, and at the end what it saw.",
        argument_default=argparse.SUPPRESS,
    )
    texts = dict(_ATTRIBUTE.findall(inspect.getdoc(Options) or ""))
    for option in fields(Options):
        if option.name != "clock":
            name, text = option.name.replace("_", "-"), " ".join(texts[option.name].split())
            parser.add_argument(f"--{name}", type=_value, metavar="VALUE", help=text)
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
