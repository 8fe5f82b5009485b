"""The terms on which callers wait, from their headers."""

import asyncio
from typing import Any

from asyncbucket.core.context import inherited
from asyncbucket.proxy.caller_terms import CallerTerms
from asyncbucket.testing import VirtualTime


async def test_headers_say_what_a_call_inherits() -> None:
    terms = CallerTerms()
    headers = [
        (b"asyncbucket-tenant", b"acme"),
        (b"asyncbucket-priority", b"interactive"),
        (b"asyncbucket-agent", b"research/a17"),
        (b"asyncbucket-timeout", b"30"),
    ]
    with terms.applied(headers, tenants_by_key=False):
        found = inherited.get()
    assert found is not None
    assert (found.tenant, found.priority) == ("acme", 1)
    assert found.agent is not None
    assert (found.agent.name, found.agent.kind) == ("a17", "research")
    assert 29 < (found.seconds_left() or 0) <= 30
    assert inherited.get() is None


def agent_in(terms: CallerTerms, name: bytes, tenant: bytes = b"acme") -> Any:
    headers = [(b"asyncbucket-agent", name), (b"asyncbucket-tenant", tenant)]
    with terms.applied(headers, tenants_by_key=False):
        found = inherited.get()
    return None if found is None else found.agent


def test_agent_is_over_after_a_minute_without_a_call(virtual_time: VirtualTime) -> None:
    async def main() -> None:
        terms = CallerTerms()
        first = agent_in(terms, b"a17")
        await asyncio.sleep(59)
        assert agent_in(terms, b"a17") is first
        assert agent_in(terms, b"a17", b"other") is not first
        await asyncio.sleep(59)
        assert not first.is_over
        await asyncio.sleep(1)
        assert first.is_over

        with terms.applied([(b"asyncbucket-agent", b"a17")], tenants_by_key=False):
            found = inherited.get()
            assert found is not None
            assert found.agent is not first
            await asyncio.sleep(3_600)  # an agent with an open call is not over
            assert not getattr(found.agent, "is_over", True)

    virtual_time.run(main())


async def test_callers_cannot_make_up_any_number_of_kinds() -> None:
    """Each is a label of metrics, for good."""
    terms = CallerTerms()
    kinds = [agent_in(terms, b"k%d/a" % number).kind for number in range(150)]

    assert kinds == [f"k{number}" for number in range(100)] + [None] * 50
    assert agent_in(terms, b"k99/b").kind == "k99"


def test_tenant_of_a_key_is_the_same_for_each_of_its_calls_and_is_not_the_key() -> None:
    terms = CallerTerms()
    seen: list[str | None] = []
    for headers in (
        [(b"authorization", b"Bearer sk-one")],
        [(b"x-api-key", b"sk-one")],
        [(b"authorization", b"Bearer sk-two")],
    ):
        with terms.applied(headers, tenants_by_key=True):
            found = inherited.get()
        seen.append(None if found is None else found.tenant)
    assert seen[0] == seen[1] != seen[2]
    assert "sk-one" not in str(seen)
