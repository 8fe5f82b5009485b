"""A model or tool behind a child is charged once per level, and can be moved further down."""

import asyncio
import contextlib
import multiprocessing
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from llama_index.core.llms import ChatMessage, CustomLLM, MockLLM
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAI
from pydantic import BaseModel

import asyncbucket
from asyncbucket import AcquireTimeout, CostExceedsLimit, Limit, Limiter
from asyncbucket.core.limiter import passports
from asyncbucket.llama_index import RateLimitedLLM
from asyncbucket.llama_index.mixin import pacing_of
from asyncbucket.testing import RateLimitedProvider, VirtualTime

if TYPE_CHECKING:
    from tests.llama_index.conftest import ScriptedOpenAI

API_BASE = "https://llm.test/v1"


class Person(BaseModel):
    """What structured prediction fills in."""

    name: str


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def admitted(*limiters: Limiter) -> list[int]:
    """Return how many calls each has admitted."""
    return [limiter.statistics().admitted for limiter in limiters]


def test_wrap_by_child_name_creates_child_once() -> None:
    """The name makes it, and finds the same one the next time."""
    limiter = Limiter("100 RPM", name="openai")

    llm: Any = limiter.wrap(MockLLM(), child="chat")
    again: Any = limiter.wrap(MockLLM(), child="chat")

    assert llm.limiter is again.limiter is limiter.children["chat"]
    assert llm.limiter.name == "openai/chat"


def test_child_option_accepts_any_descendant_and_refuses_others() -> None:
    """It may be any limiter under this one, even a tenant's; others are refused."""
    limiter = Limiter("100 RPM", name="openai")
    deep = limiter.child("acme").child("chat")

    for child in (deep, limiter.key("acme"), limiter):
        llm: Any = limiter.wrap(MockLLM(), child=child)
        assert llm.limiter is child
    with pytest.raises(ValueError, match=r"<Limiter 'openai', .*> is not under <Limiter 'openai/"):
        deep.wrap(MockLLM(), child=limiter)


def test_call_is_charged_once_at_each_level() -> None:
    """Requests and tokens are charged at the child and above."""
    limiter = Limiter("100 RPM", "10k TPM")
    chat = limiter.child("chat", "5k TPM")
    llm = limiter.wrap(MockLLM(max_tokens=3), child=chat)

    llm.complete("hi")

    assert admitted(limiter, chat) == [1, 1]
    assert limiter.statistics().limits[1].used == chat.statistics().limits[0].used > 0


def test_paced_model_can_be_moved_to_a_descendant() -> None:
    """A model paced by the root can be wrapped again below; its calls count once per level."""
    limiter = Limiter("100 RPM")
    first = limiter.wrap(MockLLM(max_tokens=3), retry=2)
    acme = limiter.child("acme")

    second = acme.wrap(first)
    third = limiter.wrap(first, child="chat")
    second.complete("hi")
    third.complete("hi")

    assert type(second) is type(first)
    assert isinstance(second, RateLimitedLLM)
    assert second.limiter is acme
    assert isinstance(first, RateLimitedLLM)
    assert pacing_of(second).options["retry"] == 2
    assert pacing_of(second).estimator is pacing_of(first).estimator
    assert admitted(limiter, acme, limiter.children["chat"]) == [2, 1, 1]


def test_wrapping_what_a_descendant_paces_returns_it_unchanged() -> None:
    """Its calls already pass this limiter."""
    limiter = Limiter("100 RPM")
    llm = limiter.child("chat").wrap(MockLLM())
    tool = limiter.child("tools").wrap(FunctionTool.from_defaults(add))

    assert limiter.wrap(llm) is llm
    assert limiter.wrap([llm, tool]) == [llm, tool]


def test_paced_tool_moved_to_a_descendant_keeps_its_cost() -> None:
    """It keeps its cost."""
    limiter = Limiter("100 RPM", "100 images/m")
    tool = limiter.wrap(FunctionTool.from_defaults(add), cost={"images": 2})

    moved = limiter.wrap(tool, child="tools")
    moved(a=1, b=2)

    assert admitted(limiter, limiter.children["tools"]) == [1, 1]
    assert limiter.statistics().limits[1].used == 2


@pytest.mark.parametrize("thing", [MockLLM(), FunctionTool.from_defaults(add)])
def test_paced_object_is_refused_by_sibling_and_unrelated_limiter(thing: Any) -> None:
    """Two queues in a row would hold one budget while waiting for the other."""
    limiter = Limiter("100 RPM", name="openai")
    paced = limiter.wrap(thing, child="chat")

    for other in (limiter.child("embeddings"), Limiter("100 RPM", name="b")):
        with pytest.raises(
            ValueError,
            match=rf"^Paced.*<Limiter 'openai/chat', .* paced already and can't be paced by "
            rf"<Limiter '{other.name}', .* make one of them a child of the other",
        ):
            other.wrap(paced)


def test_moving_structured_llm_to_child_moves_its_inner_model() -> None:
    """The model in it pays at the child."""
    limiter = Limiter("100 RPM")

    paced: Any = limiter.wrap(
        limiter.wrap(MockLLM().as_structured_llm(Person)), child=limiter.child("chat")
    )

    assert paced.llm.limiter.name == "default/chat"


class Outer(CustomLLM):
    """A model that calls another one."""

    inner: Any

    @property
    def metadata(self) -> Any:
        return self.inner.metadata

    def complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        return self.inner.complete(prompt)

    def stream_complete(self, prompt: str, *_: Any, **__: Any) -> Any:
        return self.inner.stream_complete(prompt)


def test_inner_model_is_not_charged_where_outer_model_has_paid() -> None:
    """A lease of the child counts at the root, too."""
    limiter = Limiter("100 RPM", concurrency=1)
    inner = limiter.wrap(MockLLM(max_tokens=2))

    limiter.wrap(Outer(inner=inner), child="chat").complete("hi")

    assert admitted(limiter, limiter.children["chat"]) == [1, 1]


@pytest.mark.parametrize(("outside", "inside"), [(None, "chat"), ("router", "chat")])
def test_inner_model_at_child_does_not_wait_for_outer_models_slot(
    outside: str | None, inside: str
) -> None:
    """The inner call counts at its own child; the outer call lends it the slot they share."""
    limiter = Limiter("100 RPM", concurrency=1, timeout=5)
    inner = limiter.wrap(MockLLM(max_tokens=2), child=inside)
    outer = limiter.wrap(Outer(inner=inner), child=outside)

    assert outer.complete("hi").text == "text text"
    assert [each.delta for each in outer.stream_complete("hi")] == ["text ", "text"]

    now = limiter.statistics()
    assert (now.admitted, now.in_flight, now.overridden) == (4, 0, 0)
    assert limiter.children[inside].statistics().admitted == 2
    assert "concurrency 0/1" in repr(limiter)


async def test_model_does_not_deadlock_with_its_http_client_at_sibling() -> None:
    """Its HTTP client belongs to another child: each has its limits, and they share a slot."""
    limiter = Limiter("100 RPM", concurrency=1)
    provider = RateLimitedProvider()
    transport = limiter.child("http").transport(provider.mock_transport())
    async with httpx.AsyncClient(transport=transport) as client:
        plain = OpenAI("gpt-4o-mini", api_key="k", api_base=API_BASE, async_http_client=client)
        llm = limiter.wrap(plain, child="chat")
        async with asyncio.timeout(60):
            await asyncio.gather(llm.acomplete("hi"), llm.acomplete("hi"))

    assert admitted(limiter, *limiter.children.values()) == [4, 2, 2]
    assert (limiter.statistics().in_flight, limiter.statistics().overridden) == (0, 0)


def test_output_forecast_is_cut_to_lowest_limit_of_any_level() -> None:
    """As it is only a guess, a small limit above must not make the call impossible."""
    limiter = Limiter("100 TPM")
    chat = limiter.child("chat", "10k TPM")

    limiter.wrap(MockLLM(), child=chat).complete("hi")

    assert admitted(limiter, chat) == [1, 1]
    with pytest.raises(CostExceedsLimit, match="exceeds the limit of 100 tokens"):
        limiter.wrap(MockLLM(max_tokens=200), child=chat).complete("hi")


def test_output_forecast_is_cut_to_tenants_limit() -> None:
    """A tenant's limits count only within `tenant`."""
    limiter = Limiter("10k TPM")
    limiter.per_key("50 TPM")

    with asyncbucket.tenant("acme"):
        limiter.wrap(MockLLM()).complete("hi")

    assert admitted(limiter, limiter.key("acme")) == [1, 1]


async def test_429_at_child_pauses_root_for_all_that_share_the_key(
    openai_api: "ScriptedOpenAI", refusal: Any
) -> None:
    """A 429 at one child holds back its siblings, too, as they share the key."""
    limiter = Limiter("100 RPM")
    openai_api.script = [refusal(429, {"retry-after": "30"})]
    llm = limiter.wrap(
        OpenAI(api_key="k", api_base=API_BASE), child=limiter.child("acme", rpm=50), retry=False
    )

    with pytest.raises(Exception, match="scripted"):
        await llm.achat([ChatMessage("hi")])

    assert 25 < limiter.statistics().paused <= 30
    assert limiter.children["acme"].statistics().paused == 0


@pytest.mark.parametrize("tenant", ["", "/*"])
async def test_retried_event_names_limiter_that_admitted_the_call(
    openai_api: "ScriptedOpenAI", refusal: Any, tenant: str
) -> None:
    """Its event names the same limiter as the admissions, so the two can be compared."""
    limiter = Limiter("100 RPM", name="openai")
    heard: list[str] = []
    limiter.observe(lambda event: heard.append(f"{type(event).__name__} {event.limiter}"))
    openai_api.script = [refusal(503, {"retry-after-ms": "1"})]
    llm = limiter.wrap(OpenAI(api_key="k", api_base=API_BASE), child="chat")

    with asyncbucket.tenant("acme") if tenant else contextlib.nullcontext():
        await llm.achat([ChatMessage("hi")])

    assert heard.count(f"Admitted openai/chat{tenant}") == 2
    assert [each for each in heard if each.startswith("Retried")] == [
        f"Retried openai/chat{tenant}"
    ]


async def test_429_pauses_no_level_above_highest_one_with_limits(
    openai_api: "ScriptedOpenAI", refusal: Any
) -> None:
    """Above the highest level with limits there may be other providers."""
    everything = Limiter(concurrency=100)
    openai = everything.child("openai", "100 RPM")
    openai_api.script = [refusal(429, {"retry-after": "30"})]
    llm = openai.wrap(OpenAI(api_key="k", api_base=API_BASE), child="chat", retry=False)

    with pytest.raises(Exception, match="scripted"):
        await llm.achat([ChatMessage("hi")])

    assert openai.statistics().paused > 25
    assert everything.statistics().paused == 0


def test_child_over_its_own_limit_does_not_delay_siblings(virtual_time: VirtualTime) -> None:
    """While one tenant waits for its minute, the other's calls pass at once."""
    limiter = Limiter("1000 RPM burst 1000", clock=virtual_time.clock)
    llm = limiter.wrap(MockLLM(max_tokens=1))
    small = limiter.child("small", "1 RPM").wrap(llm)
    large = limiter.child("large").wrap(llm)

    async def main() -> None:
        waiting = asyncio.gather(*(small.acomplete("hi") for _ in range(2)))
        await asyncio.gather(*(large.acomplete("hi") for _ in range(100)))
        assert virtual_time.now == 0
        await waiting
        assert virtual_time.now >= 60

    virtual_time.run(main())


def tree() -> tuple[Limiter, Limiter]:
    """Return a limiter and one two levels below, with every kind of term set."""
    root = Limiter("100 RPM burst 7", concurrency=5, name="openai", timeout=50, max_queue=90)
    acme = root.child("acme", "10k TPM", weight=3, priority="batch", max_queue=9)
    return root, acme.child("chat", "5k TPM", concurrency=2, timeout=20)


def terms(limiter: Limiter) -> list[Any]:
    """Return the terms of a limiter, and of those above it."""
    level: Limiter | None = limiter
    found: list[Any] = []
    while level is not None:
        found.append((level.name, level.limits, passports.terms_of(level)))
        level = level.parent
    return found


@pytest.mark.parametrize(("given", "kept"), [("auto", (1, 1_000)), ((2, 8), (2, 8)), (3, 3)])
def test_terms_for_copies_keep_adaptive_concurrency_bounds(given: Any, kept: Any) -> None:
    """It searches within the same bounds, and does not stay at its starting value."""
    assert passports.terms_of(Limiter(concurrency=given))["concurrency"] == kept


def test_unpickled_model_shares_the_child_within_a_process() -> None:
    """A copy spends from the same budgets, at each level."""
    root, chat = tree()
    paced: Any = root.wrap(MockLLM(max_tokens=2), child=chat)

    twin = pickle.loads(pickle.dumps(paced))  # noqa: S301 - our own

    assert twin.limiter is chat


def _unpickle(pickled: list[bytes]) -> dict[str, Any]:
    """Run in another process: return what paces the copies there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        first, second, tenant = [pickle.loads(each) for each in pickled]  # noqa: S301 - our own
    first.complete("hi")
    second.complete("hi")
    root = second.limiter
    return {
        "terms": terms(first.limiter),
        "admitted": [root.statistics().admitted, first.limiter.statistics().admitted],
        "tree": first.limiter.parent.parent is root is tenant.limiter.parent,
        "tenant": tenant.limiter.limits,
    }


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_copies_in_another_process_share_one_rebuilt_limiter_tree(method: str) -> None:
    """The limits above hold there, too, for all copies together."""
    root, chat = tree()
    llm = MockLLM(max_tokens=2)
    acme = root.key("acme", "7 RPM")
    models = [root.wrap(llm, child=chat), root.wrap(llm), root.wrap(llm, child=acme)]
    pickled = [pickle.dumps(model) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from 3.12 on
        with multiprocessing.get_context(method).Pool(1) as pool:
            seen = pool.apply(_unpickle, (pickled,))

    assert seen["terms"] == terms(chat)
    assert seen["admitted"] == [2, 1]
    assert seen["tree"]
    assert seen["tenant"] == (Limit("requests", 7),)
    assert root.statistics().admitted == 0


def _spend(pickled: bytes) -> list[str]:
    """Run in another process: make two calls, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = pickle.loads(pickled)  # noqa: S301 - our own
        twin.complete("one")
        twin.complete("two")
    return [str(each.message) for each in caught if each.category is RuntimeWarning]


@pytest.mark.real_clock
def test_copy_in_another_process_shares_limit_in_a_store(tmp_path: Path) -> None:
    """It is the same limit, so there is no warning. The store needs the machine's clock."""
    store = f"sqlite:///{tmp_path}/limits.db?patience=5"
    limiter = Limiter("3 RPM burst 3", name="openai", store=store)
    paced = limiter.wrap(MockLLM(max_tokens=2), child="chat")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_spend, (pickle.dumps(paced),)) == []

    paced.complete("three")

    with (
        pytest.raises(AcquireTimeout, match="a call of 1 request cannot pass"),
        asyncbucket.deadline(0.2),
    ):
        paced.complete("four")
