"""The options of `asyncbucket demo`."""

from typing import Annotated, Final

import typer

from asyncbucket.cli.demo.scenario import Wish
from asyncbucket.cli.ends import in_a_line
from asyncbucket.cli.typed import Rpm, Tpm, count, named, switch, words

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
    agents: Annotated[int | None, count("How many agents run at once.", most=10_000)] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    concurrency: Annotated[int | None, count("Calls in flight at most, when paced.")] = None,
    model: Annotated[str | None, named("A chat model of a real provider.")] = None,
    api_base: Annotated[
        str | None, words("A real provider; default: OpenAI.", metavar="URL")
    ] = None,
    embed_model: Annotated[str | None, named("An embedding model of it; default: none.")] = None,
    compare: Annotated[bool, switch("Also run it without asyncbucket.", "--compare")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(min=2, max=3600, metavar="S", help="How long the paced run should take."),
    ] = None,
    quick: Annotated[bool, switch("The same as --seconds 6.", "--quick")] = False,
    as_json: Annotated[bool, switch("Print the figures as JSON.", "--json")] = False,
) -> None:
    """Run LlamaIndex agents under a provider's limits, without asyncbucket and with it.

    The provider is bundled: it runs on this machine, costs nothing, and answers 429 above its limits.
    Use --model or --api-base to call a real one, with the key in OPENAI_API_KEY; that costs money.
    Say with --rpm or --tpm what the key allows. A real provider is called without asyncbucket only
    if you add --compare.
    """
    wish = Wish(
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
    with in_a_line("the demo"):
        from asyncbucket.cli.demo import command

        raise typer.Exit(command.run(wish, as_json=as_json))
