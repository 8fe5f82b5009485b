"""Published limits: what there is, where it comes from, and when it is said to be old."""

from datetime import date, timedelta
from urllib.parse import urlsplit

import pytest

from asyncbucket import Limit, Limiter
from asyncbucket.core.presets import PresetWarning, preset, preset_names

NOW = date(2026, 11, 25)


def test_preset_can_be_unpacked_into_a_limiter() -> None:
    limiter = Limiter(*preset("openai/tier-2/gpt-4o-mini", today=NOW), concurrency=20)

    assert [str(limit) for limit in limiter.limits] == [
        "5,000 requests per 60 s",
        "2,000,000 tokens per 60 s",
    ]


@pytest.mark.parametrize("name", preset_names())
def test_preset_has_limits_date_and_provider_page(name: str) -> None:
    found = preset(name, today=NOW)

    provider, tier, model = name.split("/")
    page = urlsplit(found.source)
    assert found.name == name
    assert all((provider, tier, model, found.limits))
    assert page.scheme == "https"
    assert provider in page.netloc.replace("claude", "anthropic")
    assert date(2026, 1, 1) < found.dated <= NOW


def test_daily_limit_of_preset_is_not_paced() -> None:
    (daily,) = (
        limit
        for limit in preset("groq/free/gpt-oss-20b", today=NOW)
        if limit.per > 60 and limit.resource == "requests"
    )

    assert daily == Limit("requests", 1_000, per=86_400)


def test_preset_older_than_half_a_year_warns_and_names_source() -> None:
    dated = preset("groq/free/gpt-oss-20b", today=NOW).dated

    with pytest.warns(
        PresetWarning,
        match=r"'groq/free/gpt-oss-20b' were read 181 days ago, .* with https://console\.groq\.com",
    ):
        found = preset("groq/free/gpt-oss-20b", today=dated + timedelta(days=181))
    assert found.limits


def test_recent_preset_does_not_warn() -> None:
    dated = preset("groq/free/gpt-oss-20b", today=NOW).dated

    assert preset("groq/free/gpt-oss-20b", today=dated + timedelta(days=180)).dated == dated


def test_unknown_preset_error_suggests_similar_name() -> None:
    with pytest.raises(ValueError, match=r"try e\.g\. openai/tier-1/gpt-4o-mini"):
        preset("openai/tier1/gpt-4o-mini")


def test_preset_error_without_similar_name_points_to_preset_names() -> None:
    with pytest.raises(ValueError, match=r"preset_names\(\) names all"):
        preset("?")
