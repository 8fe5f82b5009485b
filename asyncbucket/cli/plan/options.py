"""The options of `asyncbucket plan`."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, overload

import typer

from asyncbucket.cli.exits import errors_in_one_line
from asyncbucket.cli.option_types import (
    Preset,
    Rpd,
    Rpm,
    Tpd,
    Tpm,
    count_option,
    file_option,
    flag_option,
    name_option,
    preset_limits,
    read_count,
    text_option,
)
from asyncbucket.core.limits import KEYWORDS, Limit, read_limits
from asyncbucket.plan import AgentTree, Arrivals, Plan, Poisson, Tenant
from asyncbucket.plan import plan as make_plan

#: A backspace keeps the lines of a paragraph as they are.
EXAMPLES: Final = """\b
Examples:
  asyncbucket plan --calls 10000 --tokens 800 --rpm 500 --tpm 200000
  asyncbucket plan --tokens prompts.jsonl --preset openai/tier-1/gpt-4o-mini
  asyncbucket plan --rpm 60 --tenant "a weight=2 calls=9" --tenant "b calls=9"
  asyncbucket plan --agents 20 --depth 3 --fan-out 4 --rpm 500 --out plan.png
"""

#: What a tenant may have besides limits.
_TENANT_KEYS: Final = ("weight", "tokens", "input_tokens", "output_tokens", "latency", "poisson")


def _samples_option(text: str) -> Any:
    return text_option(text, metavar="N|FILE")


def plan(  # noqa: PLR0913 - one for each option
    *,
    # What is asked.
    calls: Annotated[int | None, count_option("How many calls; default: all samples.")] = None,
    tokens: Annotated[
        str | None, _samples_option("Tokens a call, or JSONL: prompts, requests, numbers.")
    ] = None,
    input_tokens: Annotated[str | None, _samples_option("Tokens sent, if limited apart.")] = None,
    output_tokens: Annotated[str | None, _samples_option("Tokens expected back.")] = None,
    used_tokens: Annotated[
        str | None, _samples_option("Tokens really used; default: as reserved.")
    ] = None,
    latency: Annotated[
        str, text_option("Seconds a call takes, or JSONL of them.", metavar="S|FILE")
    ] = "0",
    # What is allowed.
    rpm: Rpm = None,
    tpm: Tpm = None,
    rpd: Rpd = None,
    tpd: Tpd = None,
    limits: Annotated[
        list[str] | None,
        text_option('Any other limit, e.g. "40k ITPM" or "10/s burst 1".', "--also"),
    ] = None,
    preset: Preset = None,
    concurrency: Annotated[int | None, count_option("Calls in flight at most.")] = None,
    # When calls come, and whose they are.
    poisson: Annotated[
        float | None, text_option("Calls come by chance, so many a second.", metavar="RATE")
    ] = None,
    agents: Annotated[int | None, count_option("Agents, each with calls in a row.")] = None,
    steps: Annotated[int, count_option("Calls of each agent.")] = 1,
    depth: Annotated[int, count_option("Generations of agents.")] = 1,
    fan_out: Annotated[int, count_option("Agents that each one calls when it is done.")] = 1,
    tenant: Annotated[
        list[str] | None,
        text_option('Who shares the limits, e.g. "acme weight=2 calls=500 rpm=60".'),
    ] = None,
    profile: Annotated[
        str, name_option("How requests are charged: openai, anthropic, ...")
    ] = "openai",
    # What is found out, and shown.
    what_if: Annotated[
        bool | None, flag_option("Say what other limits would bring.", "--what-if/--no-what-if")
    ] = None,
    seed: Annotated[int, text_option("Seed of all random numbers.", metavar="N")] = 0,
    out: Annotated[Path | None, file_option("Draw it: .png, .svg or .pdf.")] = None,
    dark: Annotated[bool, flag_option("Draw on a dark background.", "--dark")] = False,
    as_json: Annotated[bool, flag_option("Print the plan as JSON.", "--json")] = False,
) -> None:
    """Say how long calls take under limits, what binds, and what other limits would bring.

    The calls run through the real limiter on virtual time: nothing is sent, nothing waits.
    """
    with errors_in_one_line("plan"):
        planned = make_plan(
            *(limits or ()),
            *preset_limits(preset),
            calls=calls,
            tokens=_samples(tokens),
            input_tokens=_samples(input_tokens),
            output_tokens=_samples(output_tokens),
            used_tokens=_samples(used_tokens),
            latency=_samples(latency),
            concurrency=concurrency,
            arrivals=_arrivals(poisson, agents, depth=depth, fan_out=fan_out, steps=steps),
            tenants=_tenants(tenant or ()),
            profile=profile,
            what_if=what_if,
            seed=seed,
            rpm=rpm,
            tpm=tpm,
            rpd=rpd,
            tpd=tpd,
        )
        _show(planned, as_json=as_json, out=out, dark=dark)


def _show(planned: Plan, *, as_json: bool, out: Path | None, dark: bool) -> None:
    if out is not None:
        from asyncbucket.cli.plan import picture

        picture.draw(planned, out, dark=dark)
    if as_json:
        typer.echo(json.dumps(planned.as_dict(), indent=2))
        return
    from asyncbucket.cli.plan import report

    report.show(planned)
    if out is not None:
        typer.echo(f"drawn: {out}")


@overload
def _samples(text: str) -> float | Path: ...
@overload
def _samples(text: None) -> None: ...
def _samples(text: str | None) -> float | Path | None:
    """Return a number, or else the path of a file.

    Raises:
        ValueError: it is neither.
    """
    if text is None:
        return None
    for read in (float, read_count):
        with contextlib.suppress(ValueError):
            return read(text)
    if not Path(text).exists():
        raise ValueError(f"{text!r} is neither a number nor a file that is there")
    return Path(text)


def _tenants(texts: Iterable[str]) -> dict[str, Tenant]:
    found: dict[str, Tenant] = {}
    for name, tenant in map(_tenant, texts):
        if name in found:
            raise ValueError(f"--tenant {name!r} is given twice: each is one tenant of its own")
        found[name] = tenant
    return found


def _tenant(text: str) -> tuple[str, Tenant]:
    """Read a tenant: its name, and words such as ``weight=2``.

    Raises:
        ValueError: a word is not known.
    """
    name, *words = text.split() or [""]
    if not name or "=" in name:
        raise ValueError(f'--tenant {text!r}: a name comes first, e.g. "acme weight=2 calls=500"')
    fields: dict[str, Any] = {}
    limits: list[Limit] = []
    for word in words:
        key, _, value = word.partition("=")
        if key in KEYWORDS:
            limits += read_limits((), {key: _whole(key, value)})
        elif key in ("calls", "concurrency"):
            fields[key] = _whole(key, value)
        elif key in _TENANT_KEYS and value:
            fields[key] = Poisson(_number(key, value)) if key == "poisson" else _samples(value)
        elif key == "priority":
            fields[key] = value
        else:
            known = ", ".join((*_TENANT_KEYS, "calls", "concurrency", "priority", *KEYWORDS))
            raise ValueError(
                f"--tenant {text!r}: {word!r} is not of the form weight=2; known: {known}"
            )
    if "poisson" in fields:
        fields["arrivals"] = fields.pop("poisson")
    return name, Tenant(limits=tuple(limits), **fields)


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"--tenant: {key} must be a number, not {value!r}") from None


def _whole(key: str, value: str) -> int:
    try:
        return read_count(value)
    except ValueError as error:
        raise ValueError(f"--tenant: {key}: {error}") from None


def _arrivals(
    poisson: float | None, agents: int | None, *, depth: int, fan_out: int, steps: int
) -> Arrivals:
    if agents is not None:
        if poisson is not None:
            raise ValueError("--poisson and --agents are two ways for calls to come: choose one")
        return AgentTree(agents=agents, depth=depth, fan_out=fan_out, steps=steps)
    if (depth, fan_out, steps) != (1, 1, 1):
        raise ValueError(
            "--depth, --fan-out and --steps are about agents: say how many with --agents"
        )
    return None if poisson is None else Poisson(poisson)
