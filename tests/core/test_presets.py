"""Published limits: what there is, where it comes from, and when it is said to be old."""

from datetime import date, timedelta
from urllib.parse import urlsplit

import pytest

from asyncbucket import Limit, Limiter
from asyncbucket.core.presets import PresetWarning, preset, preset_names

NOW = date(2026, 11, 25)
GROQ = "groq/free/gpt-oss-20b"


def test_preset_can_be_unpacked_into_a_limiter() -> None:
    limiter = Limiter(*preset("openai/tier-2/gpt-4o-mini", today=NOW), concurrency=20)
    assert limiter.limits == (Limit("requests", 5_000), Limit("tokens", 2_000_000))
    assert Limit("requests", 1_000, per=86_400, burst=None) in tuple(preset(GROQ, today=NOW))
    by_day = Limit("requests", 50, per="day", resets="00:00 UTC")
    assert by_day in tuple(preset("openrouter/free/any", today=NOW))


def test_each_preset_has_limits_date_and_provider_page() -> None:
    for name in preset_names():
        found = preset(name, today=NOW)
        provider, tier, model = name.split("/")
        page = urlsplit(found.source)
        assert found.name == name
        assert all((provider, tier, model, found.limits))
        assert page.scheme == "https"
        assert provider in page.netloc.replace("claude", "anthropic")
        assert date(2026, 1, 1) < found.dated <= NOW


def test_preset_older_than_half_a_year_warns_and_names_source() -> None:
    dated = preset(GROQ, today=NOW).dated
    assert preset(GROQ, today=dated + timedelta(days=180)).dated == dated
    told = rf"'{GROQ}' were read 181 days ago, .* with https://console\.groq\.com"
    with pytest.warns(PresetWarning, match=told):
        assert preset(GROQ, today=dated + timedelta(days=181)).limits


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("openai/tier1/gpt-4o-mini", r"try e\.g\. openai/tier-1/gpt-4o-mini"),
        ("?", r"preset_names\(\) names all"),
    ],
)
def test_error_of_unknown_preset_suggests_similar_name(name: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        preset(name)
