"""`asyncbucket run --pool`: several real providers on loopback serve one file of requests."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import AcquireTimeout
from asyncbucket.http import read_pool
from asyncbucket.testing.pytest_plugin import ProviderFactory
from tests.cli.test_run import (
    SECRET,
    batch,
    in_a_folder_with_a_key,  # noqa: F401 - a fixture  # pyright: ignore[reportUnusedImport]
    lines_of,
    server_answering,  # noqa: F401 - a fixture  # pyright: ignore[reportUnusedImport]
    typed,
)

pytestmark = pytest.mark.real_clock


def pool_of(*base_urls: str, limit: str = 'limits = ["6k RPM burst 100"]') -> str:
    tables = (
        f'[member.p{number}]\nbase_url = "{url}"\nkey_env = "OPENAI_API_KEY"\n{limit}\n'
        for number, url in enumerate(base_urls)
    )
    Path("pool.toml").write_text('prefer = "first"\n' + "".join(tables))
    return "pool.toml"


def test_members_share_a_run_which_goes_on_without_one_that_died(
    rate_limited_provider: ProviderFactory,
) -> None:
    providers = [rate_limited_provider(latency=0.01) for _ in range(3)]
    pool = pool_of(*(each.base_url for each in providers))
    providers[0].stop()
    results = [
        typed(batch(count), "-o", "out.jsonl", "--pool", pool, *more)
        for count, more in [(40, ["--dry-run"]), (40, []), (60, []), (60, ["--json"])]
    ]
    assert [each.exit_code for each in results] == [0, 0, 0, 0], results[1].output
    assert "40 requests to send" in results[0].output
    assert "in.jsonl, 40 lines; pool.toml\np0: 6,000 requests per 60 s; p1: 6" in results[1].stderr
    assert "40 answered and 0 earlier" not in results[2].stderr
    assert "20 answered and 40 earlier" in results[2].stderr
    assert json.loads(results[3].stdout)["requests"] == 0
    assert len({line["custom_id"] for line in lines_of("out.jsonl")}) == 60
    assert sum(each.statistics().requests for each in providers[1:]) == 60
    other = typed(batch(60), "-o", "out.jsonl", "--rpm", "6000")
    assert "out.jsonl holds answers made with {'model': None, 'api': 'pool.toml', " in other.stderr


def test_bookings_of_each_member_outlive_the_run(
    rate_limited_provider: ProviderFactory,
) -> None:
    provider = rate_limited_provider()
    pool = pool_of(provider.base_url, provider.base_url + "/", limit='limits = ["3 requests/hour"]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/")
        result = typed(batch(3), "-o", "out.jsonl", "--pool", pool)
    assert result.exit_code == 0, result.output

    async def go_on() -> None:
        after, _ = read_pool(pool, store=f"sqlite:///{Path('out.jsonl.limits').resolve()}")
        await after.members[1].acquire(timeout=5)
        with pytest.raises(AcquireTimeout):
            await after.members[0].acquire(timeout=1)
        await after.aclose()

    asyncio.run(go_on())


def test_run_ends_if_no_member_takes_its_key_which_is_never_shown(
    server_answering: Callable[..., str],  # noqa: F811
) -> None:
    base = server_answering(f"Incorrect API key: {SECRET}".encode(), 401).rpartition("@")[2]
    pool = pool_of(f"http://{base}", f"http://{base}", limit="concurrency = 60")
    result = typed(batch(60), "-o", "out.jsonl", "--pool", pool)
    written = "".join(path.read_bytes().decode("latin-1") for path in Path().iterdir())
    assert result.exit_code == 2
    assert "error: no request succeeds" in result.stderr
    assert "pool.toml" in result.stderr.splitlines()[-1]
    assert SECRET not in result.output + written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rpm", "5", "--api-base", "x"],
            "--rpm, --api-base cannot go with --pool: write it int",
        ),
        ([], "pool.toml: it has no members"),
    ],
)
def test_what_does_not_fit_a_pool_is_refused(arguments: list[Any], message: str) -> None:
    result = typed(batch(1), "-o", "out.jsonl", "--pool", pool_of(), *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert not Path("out.jsonl").exists()
