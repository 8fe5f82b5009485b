"""The options of `asyncbucket demo`."""

from typing import Annotated, Final

import typer

from asyncbucket.cli.demo.scenario import DemoOptions
from asyncbucket.cli.exits import errors_in_one_line
from asyncbucket.cli.option_types import (
    Rpm,
    Tpm,
    count_option,
    flag_option,
    name_option,
    text_option,
)

#: A backspace keeps the lines of a paragraph as they are.
EXAMPLES: Final = """\b
Examples:
  asyncbucket demo
  asyncbucket demo --agents 500 --rpm 2400
  export OPENAI_API_KEY=...
  asyncbucket demo --model gpt-4o-mini --rpm 500 --tpm 200000 --agents 20
"""


def demo(  # noqa: PLR0913 - one for each option
    *,
    agents: Annotated[
        int | None, count_option("How many agents run at once.", maximum=10_000)
    ] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Annotated[int | None, count_option("Calls in flight at most, when paced.")] = None,
    model: Annotated[str | None, name_option("A chat model of a real provider.")] = None,
    api_base: Annotated[
        str | None, text_option("A real provider; default: OpenAI.", metavar="URL")
    ] = None,
    embed_model: Annotated[
        str | None, name_option("An embedding model of it; default: none.")
    ] = None,
    compare: Annotated[bool, flag_option("Also run it without asyncbucket.", "--compare")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(min=2, max=3600, metavar="S", help="How long the paced run should take."),
    ] = None,
    quick: Annotated[bool, flag_option("The same as --seconds 6.", "--quick")] = False,
    as_json: Annotated[bool, flag_option("Print the figures as JSON.", "--json")] = False,
) -> None:
    """Run LlamaIndex agents under a provider's limits, without asyncbucket and with it.

    The provider is bundled: it runs on this machine, costs nothing, and answers 429 above its limits.
    Use --model or --api-base to call a real one, with the key in OPENAI_API_KEY; that costs money.
    Say with --rpm or --tpm what the key allows. A real provider is called without asyncbucket only
    if you add --compare.
    """
    options = DemoOptions(
        agents=agents,
        rpm=rpm,
        tpm=tpm,
        concurrency=concurrency,
        model=model,
        api_base=api_base,
        embed_model=embed_model,
        compare=compare,
        seconds=6.0 if quick and seconds is None else seconds,
    )
    with errors_in_one_line("the demo"):
        from asyncbucket.cli.demo import command

        raise typer.Exit(command.run(options, as_json=as_json))
