"""`asyncbucket proxy`: one limit for programs in any language, by changing their base URL."""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from asyncbucket.cli import options


def proxy(  # noqa: PLR0913 - one for each option
    *,
    # Where calls come in, and where they go.
    upstream: Annotated[
        str | None, options.text("The provider, e.g. https://api.openai.com.", metavar="URL")
    ] = None,
    pool: options.PoolFile = None,
    listen: Annotated[
        str | None, options.text("Where calls come in; default: 127.0.0.1:4295.", metavar="ADDRESS")
    ] = None,
    profile: Annotated[
        str | None, options.name("The provider's name, if the URL does not show it.")
    ] = None,
    key_env: Annotated[
        str | None, options.name("The variable with the provider's key; callers need none.")
    ] = None,
    # What is allowed.
    rpm: options.Rpm = None,
    tpm: options.Tpm = None,
    limits: options.Also = None,
    preset: options.Preset = None,
    concurrency: Annotated[
        str | None, options.text("Calls in flight at most.", metavar="N|auto")
    ] = None,
    max_queue: Annotated[int | None, options.count("Calls that may wait; default: all.")] = None,
    store: Annotated[
        str | None, options.text("Keep the limits in a file or a server.", metavar="URL")
    ] = None,
    # Who shares, and who looks.
    tenants_by_key: Annotated[
        bool | None,
        options.flag("Share fairly among the callers' keys.", "--tenants-by-key"),
    ] = None,
    status: Annotated[
        str | None,
        options.text("Health, statistics, metrics; default: 127.0.0.1:4294.", metavar="ADDRESS"),
    ] = None,
    config: Annotated[
        Path | None, options.file("TOML with all of this; SIGHUP reads it again.")
    ] = None,
) -> None:
    """Pace the calls of any program that can change its base URL.

    Programs in any language call this proxy instead of the provider, and share one limit. Calls
    wait their turn here; paths, bodies and streams pass as they are. Without limits it adopts those
    that the provider's headers announce. Options override the file.

    Examples:
        asyncbucket proxy --upstream https://api.openai.com --rpm 500 --tpm 200k
        asyncbucket proxy --upstream https://api.anthropic.com --key-env MY_KEY
        asyncbucket proxy --pool pool.toml
        asyncbucket proxy --config proxy.toml
        OPENAI_BASE_URL=http://127.0.0.1:4295/v1 node agent.js
    """
    from asyncbucket.proxy.options import read_options
    from asyncbucket.proxy.serving import Serving

    reread = partial(
        read_options,
        config,
        limits=[*(limits or ()), *options.preset_limits(preset)],
        upstream=upstream,
        pool=None if pool is None else str(pool),
        listen=listen,
        status=status,
        profile=profile,
        key_env=key_env,
        tenants_by_key=tenants_by_key,
        rpm=rpm,
        tpm=tpm,
        concurrency=options.read_concurrency(concurrency),
        max_queue=max_queue,
        store=store,
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.ERROR)
    logging.getLogger("asyncbucket").setLevel(logging.INFO)
    given = reread()
    serving = Serving(given)
    limiter, calls, pages = serving.limiter, serving.address, serving.status_address
    allowed = options.allowed(limiter) or "the limits that its headers announce"
    where = given.upstream or given.pool
    typer.echo(f"base URL http://{calls} for {where}: {allowed}", err=True)
    typer.echo(f"status http://{pages}/stats, /metrics, /healthz; asyncbucket watch", err=True)
    if not calls.is_local:
        whose = "theirs" if given.key is None and given.pool is None else "yours"
        typer.echo(
            f"warning: other machines can reach {calls}, and make calls with a key of {whose}: keep "
            f"it behind a firewall, or listen at 127.0.0.1",
            err=True,
        )
    serving.run(None if config is None else reread)
