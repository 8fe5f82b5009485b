"""Anthropic's models are paced where they are installed."""

from typing import TYPE_CHECKING, Any

import pytest

from asyncbucket import Limiter
from asyncbucket.testing import RateLimitedProvider
from tests.llama_index.conftest import (
    MESSAGES,
    PROMPT,
    Person,
    Reader,
    admitted,
    charged,
    in_flight,
)

if TYPE_CHECKING:
    from asyncbucket.testing.pytest_plugin import ProviderFactory

anthropic = pytest.importorskip("anthropic")
integration = pytest.importorskip("llama_index.llms.anthropic")


@pytest.fixture
def provider(rate_limited_provider: "ProviderFactory") -> RateLimitedProvider:
    return rate_limited_provider(charge="usage")


def model_of(provider: RateLimitedProvider, **options: Any) -> Any:
    options |= {"base_url": provider.base_url.removesuffix("/v1"), "api_key": "k"}
    options["default_headers"] = {"connection": "close"}  # nobody closes the client
    return integration.Anthropic(model="claude-sonnet-4-5", **options)


async def test_each_call_is_one_request_admitted_once_and_settled(
    provider: RateLimitedProvider, reader: Reader
) -> None:
    limiter = Limiter("100k TPM", concurrency=1)
    llm = limiter.wrap(model_of(provider))
    await reader.call(llm.achat, llm.chat, MESSAGES)
    await reader.call(llm.acomplete, llm.complete, "hi")
    await reader.read(llm)
    await reader.read(llm, "stream_complete", "hi")
    assert admitted(limiter) == provider.statistics().requests == 4
    assert (in_flight(limiter), charged(limiter)) == (0, [provider.statistics().tokens])


@pytest.mark.filterwarnings("ignore:The 'output_format' parameter:DeprecationWarning")
async def test_structured_prediction_through_sdk_client_is_paced(
    provider: RateLimitedProvider, reader: Reader
) -> None:
    limiter = Limiter("100 RPM", concurrency=1)
    llm = limiter.wrap(model_of(provider))
    on_loop, here = llm.astructured_predict, llm.structured_predict
    one = await reader.call(on_loop, here, Person, PROMPT)
    many = await reader.read(llm, "stream_structured_predict", Person, PROMPT)
    assert isinstance(one, Person)
    assert isinstance(many[-1], Person)
    assert admitted(limiter) == provider.statistics().requests == 2
    assert in_flight(limiter) == 0


def test_refused_call_makes_five_requests_as_sdk_does_not_retry(
    provider: RateLimitedProvider,
) -> None:
    provider.fail_next(50, status=429, retry_after=0.001)
    limiter = Limiter("1000 RPM")
    with pytest.raises(anthropic.RateLimitError):
        limiter.wrap(model_of(provider)).chat(MESSAGES)
    assert provider.statistics().requests == admitted(limiter) == 5
