"""What undoes pacing is switched off for each call, or warned of with the remedy."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.rate_limiter import TokenBucketRateLimiter
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI
from openai import AsyncOpenAI
from pydantic import PrivateAttr

from asyncbucket import Limiter, pace
from tests.llama_index.conftest import KEY


def test_native_rate_limiter_warning_points_to_callers_line() -> None:
    native = TokenBucketRateLimiter(requests_per_minute=10)
    inner = OpenAI(api_key=KEY, rate_limiter=native)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Limiter("100 RPM").wrap([inner])
        pace(inner, rpm=5)
    said = "OpenAI has a rate_limiter of its own"
    assert [str(each.message).partition(":")[0] for each in seen] == [said] * 2
    assert [each.filename for each in seen] == [__file__] * 2


async def test_retries_that_wrap_switches_off_cause_no_warning() -> None:
    limiter = Limiter("100 RPM")
    async with AsyncOpenAI(api_key=KEY, max_retries=9) as client:
        limiter.wrap(OpenAI(api_key=KEY, max_retries=9, async_openai_client=client))
        limiter.wrap(OpenAIEmbedding(api_key=KEY, max_retries=9))


def integration(module: str, base: type[Any], **names: Any) -> Any:
    return type("Model", (base,), {"__module__": f"llama_index.{module}.base", **names})


class Recording(MockLLM):
    """A model that notes what it is called with, and calls nothing."""

    additional_kwargs: dict[str, Any] | None = None

    def chat(self, *_: Any, **kwargs: Any) -> Any:
        return kwargs


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("llms.litellm", {"num_retries": 0}),
        ("llms.cohere", {"request_options": {"max_retries": 0}}),
        ("llms.openai", {}),
    ],
)
def test_sdk_beneath_a_model_is_asked_not_to_retry(module: str, options: dict[str, Any]) -> None:
    llm = Limiter("100 RPM").wrap(integration(module, Recording)())
    assert llm.chat([], seed=7) == {"seed": 7, **options}
    assert llm.chat([], **dict.fromkeys(options, 1)) == dict.fromkeys(options, 1)
    llm.additional_kwargs = dict.fromkeys(options, 2)
    assert llm.chat([]) == {}


def test_retries_of_a_google_embedding_model_read_zero_and_stay_a_field() -> None:
    base = integration(
        "embeddings.google_genai", MockEmbedding, retries=3, __annotations__={"retries": int}
    )
    inner = base(embed_dim=2)
    paced = Limiter("100 RPM").wrap(inner)
    assert (paced.retries, inner.retries) == (0, 3)
    assert paced.to_dict() == inner.to_dict()


class Botocore:
    """A client of botocore, which retries four times if nothing else is said."""

    def __init__(self, **retries: Any) -> None:
        self.meta = SimpleNamespace(config=SimpleNamespace(retries=retries))


Botocore.__module__ = "botocore.client"


class Bedrock(MockEmbedding):
    """A model on such a client."""

    _client: Any = PrivateAttr()

    def __init__(self, **retries: Any) -> None:
        super().__init__(embed_dim=2)
        self._client = Botocore(**retries)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        ("embeddings.cohere", r"pass httpx_client=limiter.http_client\(sync=True\) and"),
        ("embeddings.litellm", "set DEFAULT_MAX_RETRIES=0 in the environment"),
        ("embeddings.together", r"use OpenAILikeEmbedding\(api_base="),
        (Bedrock, r"make it with botocore_config=Config\(retries="),
        (lambda: Bedrock(max_attempts=10), r"make it with botocore_config=Config\(retries="),
    ],
)
def test_retries_that_nobody_can_switch_off_are_warned_of(make: Any, remedy: str) -> None:
    limiter = Limiter("100 RPM")
    model = integration(make, MockEmbedding)(embed_dim=2) if isinstance(make, str) else make()
    with pytest.warns(UserWarning, match=f"tries failed requests again by itself, .*{remedy}"):
        limiter.wrap(model)
    limiter.wrap(model, retry=False)
    limiter.wrap(Bedrock(total_max_attempts=1))
