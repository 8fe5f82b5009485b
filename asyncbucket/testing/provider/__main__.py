"""`python -m asyncbucket.testing.provider`: one line with the URL, and at the end the statistics."""

import argparse
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any

from asyncbucket.testing.provider.policies import POLICY_NAMES
from asyncbucket.testing.provider.settings import CHARGE_RULES
from asyncbucket.testing.provider.thread import RateLimitedProvider


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGINT, SIGTERM or, with --until-eof, the end of standard input."""
    options = vars(_parser().parse_args(arguments))
    until_eof = options.pop("until_eof")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop.set())
    if until_eof:
        # Ctrl-C goes to all processes of a terminal; the parent says when this one ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_wait_for_eof, args=[stop], daemon=True).start()
    provider = _start(options)
    try:
        _print_line(provider.base_url)
        stop.wait()
    finally:
        provider.stop()
    _print_line(json.dumps(asdict(provider.statistics())))


def _start(options: dict[str, Any]) -> RateLimitedProvider:
    given = {name: value for name, value in options.items() if value is not None}
    try:
        provider = RateLimitedProvider(**given)
        provider.start()
    except ValueError as exc:
        raise SystemExit(f"error: {exc}") from exc
    except OSError as exc:
        raise SystemExit(f"error: {exc.strerror}") from exc
    return provider


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m asyncbucket.testing.provider",
        description="A rate-limited OpenAI-compatible provider on loopback.",
    )
    add = parser.add_argument
    add("--rpm", type=int, metavar="N", help="requests a minute (default: no limit)")
    add("--tpm", type=int, metavar="N", help="tokens a minute (default: no limit)")
    add("--policy", choices=POLICY_NAMES, help="how they are counted (default: token_bucket)")
    add("--charge", choices=CHARGE_RULES, help="what a call costs in tokens (default: openai)")
    add("--concurrency", type=int, metavar="N", help="calls in flight (default: no limit)")
    add("--latency", type=_latency, metavar="S|LOW:HIGH", help="seconds (default: 0)")
    add("--error-rate", type=float, metavar="SHARE", help="of calls that get a 500 (default: 0)")
    add("--always", type=int, metavar="STATUS", help="answer every call with it")
    add("--seed", type=int, metavar="N", help="of latencies and errors (default: 0)")
    add("--minute", type=float, metavar="S", help="seconds that a minute lasts (default: 60)")
    add("--default-max-tokens", type=int, metavar="N", help="for calls without it (default: 16)")
    add("--reply-tokens", type=int, metavar="N", help="length of text replies (default: short)")
    add("--dimensions", type=int, metavar="N", help="of embeddings (default: 64)")
    add("--history", type=int, metavar="N", help="arrivals kept (default: 1,000,000)")
    add("--port", type=int, metavar="N", help="(default: a free one)")
    add("--until-eof", action="store_true", help="end with standard input too")
    return parser


def _latency(text: str) -> float | tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        return (float(low), float(high)) if colon else float(low)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number such as 0.5 nor a range such as 0.2:0.6"
        ) from None


def _wait_for_eof(stop: threading.Event) -> None:
    while sys.stdin.read(4096):
        pass
    stop.set()


def _print_line(line: str) -> None:
    try:
        print(line, flush=True)  # noqa: T201 - a command's output
    except BrokenPipeError:  # the parent is gone; the exit is silent, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
