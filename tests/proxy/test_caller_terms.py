"""The terms on which callers wait, from their headers."""

from asyncbucket.core.context import inherited
from asyncbucket.proxy.caller_terms import CallerTerms
from asyncbucket.testing import VirtualClock


def test_headers_say_what_a_call_inherits() -> None:
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


def agent_in(terms: CallerTerms, name: bytes, tenant: bytes = b"acme") -> object:
    headers = [(b"asyncbucket-agent", name), (b"asyncbucket-tenant", tenant)]
    with terms.applied(headers, tenants_by_key=False):
        found = inherited.get()
    return None if found is None else found.agent


def test_agent_is_over_after_a_minute_without_a_call() -> None:
    clock = VirtualClock()
    terms = CallerTerms(lambda: clock() * 1e-9)
    first = agent_in(terms, b"a17")
    clock.advance(59)

    assert agent_in(terms, b"a17") is first
    assert agent_in(terms, b"a17", b"other") is not first
    clock.advance(61)
    assert agent_in(terms, b"b") is not first
    assert getattr(first, "is_over", False)
    assert agent_in(terms, b"a17") is not first


def test_agent_with_an_open_call_is_not_over() -> None:
    clock = VirtualClock()
    terms = CallerTerms(lambda: clock() * 1e-9)
    headers = [(b"asyncbucket-agent", b"a17")]
    with terms.applied(headers, tenants_by_key=False):
        found = inherited.get()
        clock.advance(3_600)
        _ = agent_in(terms, b"b")
        assert found is not None
        assert not getattr(found.agent, "is_over", True)


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
