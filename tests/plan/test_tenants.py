"""Plans of several tenants: real children of a real limiter, on virtual time."""

import asyncio
from typing import Any

import pytest

from asyncbucket import CostExceedsLimit, Limiter, priority, tenant
from asyncbucket.plan import AgentTree, Plan, PlannedTenant, Poisson, Tenant, plan
from asyncbucket.testing import virtual_time


def plan_of_two_tenants(**others: Any) -> Plan:
    """Plan for a heavy tenant and a light one."""
    tenants = {"acme": Tenant(calls=400, weight=2), "bob": Tenant(calls=400)}
    return plan(tokens=1_000, tpm=60_000, latency=1.0, tenants=tenants, what_if=False, **others)


def test_tenant_with_a_higher_weight_finishes_first() -> None:
    """Two thirds go to the heavy tenant until it has all it wants."""
    planned = plan_of_two_tenants()

    acme, bob = planned.tenants["acme"], planned.tenants["bob"]
    assert planned.calls == 800
    assert acme.duration == pytest.approx(10 * 60, rel=0.15)
    assert bob.duration == planned.duration == pytest.approx(13 * 60, rel=0.1)
    assert acme.waits.p50 < bob.waits.p50


def test_planned_tenants_agree_with_children_of_a_limiter() -> None:
    """The figures are those of tasks that call the children."""
    planned = plan_of_two_tenants(concurrency=7)
    done: dict[str, float] = {}

    with virtual_time() as time:
        limiter = Limiter(tpm=60_000, concurrency=7, clock=time.clock)

        async def call(child: Limiter) -> None:
            async with child.acquire(tokens=1_000):
                await asyncio.sleep(1.0)
            done[child.name] = time.now

        async def main() -> None:
            children = [limiter.child("acme", weight=2), limiter.child("bob")]
            await asyncio.gather(*(call(child) for child in children for _ in range(400)))

        time.run(main())

    for name, each in planned.tenants.items():
        assert each.duration == pytest.approx(done[f"default/{name}"], abs=1.0)
    assert planned.duration == pytest.approx(time.now, abs=0.01)


def test_limit_of_one_tenant_does_not_delay_another() -> None:
    """The plan also says what doubling its limit is worth."""
    planned = plan(
        rpm=600,
        latency=1.0,
        tenants={
            "slow": Tenant(calls=60, limits=("12 RPM burst 1",)),
            "fast": Tenant(calls=200, arrivals=Poisson(4.0)),
        },
    )

    slow, fast = planned.tenants["slow"], planned.tenants["fast"]
    assert (slow.bound_by, fast.bound_by) == ("requests", None)
    assert slow.duration > 5 * 59 > fast.duration
    own = next(limit for limit in planned.limits if limit.tenant == "slow")
    assert own.if_doubled == pytest.approx(planned.duration / 2, rel=0.05)
    assert "slow: 12 requests per 60 s" in str(planned)
    assert planned.bound_by == "requests"


def test_tenants_own_limit_binds_where_no_shared_limit_does() -> None:
    """This holds with a shared limit that nobody waits for, and without any."""
    slow = Tenant(calls=60, limits=("12 RPM burst 1",))
    planned = plan(rpd=9_000, latency=1.0, tenants={"slow": slow, "fast": Tenant(calls=9)})
    assert planned.summary == "4 min 57 s, requests bind: 69 calls"

    planned = plan(latency=1.0, tenants={"slow": slow, "fast": Tenant(calls=9)})
    assert planned.summary == "4 min 57 s, requests bind: 69 calls"
    assert planned.binding is planned.limits[0]


def test_each_tenant_gets_all_samples_of_a_generator() -> None:
    """Samples and instants may come from generators, and each tenant gets all of them."""
    planned = plan(
        "9 images/10s",
        tpm=1_000,
        tokens=(100 * number for number in (1, 2, 3)),
        resources={"images": iter([1, 1, 1])},
        arrivals=iter([0.0, 1.0, 2.0]),
        latency=1,
        tenants={"acme": Tenant(), "bob": Tenant()},
    )

    assert planned.calls == 6
    assert [each.tokens for each in planned.tenants.values()] == [600, 600]


def test_resource_may_be_limited_for_one_tenant_only() -> None:
    """The others' use of it is not counted."""
    painter, writer = Tenant(calls=3, limits=("1 images/10s",)), Tenant(calls=3)
    planned = plan(rps=9, resources={"images": 1}, tenants={"painter": painter, "writer": writer})

    assert planned.tenants["painter"].bound_by == "images"
    assert planned.limits[1].if_removed == pytest.approx(5 / 9)
    assert planned.tenants["writer"].duration < 1

    too_long = Tenant(calls=3, tokens=[1, 900, 1])
    both = {"painter": painter, "writer": too_long}
    planned = plan(tpm=100, tokens=1, resources={"images": 1}, tenants=both)
    assert planned.refused == 1
    assert "cost of 900 tokens exceeds" in str(planned.refusal)


def test_tenant_with_a_higher_priority_waits_less() -> None:
    """A tenant's priority is that of its calls."""
    planned = plan(
        tpm=60_000,
        tokens=1_000,
        latency=1.0,
        tenants={
            "batch": Tenant(calls=300, priority="batch"),
            "chat": Tenant(calls=40, priority="interactive", arrivals=Poisson(0.2)),
        },
    )

    assert planned.tenants["chat"].waits.p95 < planned.tenants["batch"].waits.p50


def test_tenant_settings_override_those_of_the_plan() -> None:
    """What a tenant does not set is taken from the plan."""
    planned = plan(
        calls=10,
        tokens=100,
        used_tokens=50,
        latency=2.0,
        concurrency=50,
        tpm=1_000_000,
        tenants={
            "usual": Tenant(),
            "long": Tenant(latency=[5.0, 9.0, 7.0], calls=3),
            "agents": Tenant(
                tokens=300,
                used_tokens=200,
                arrivals=AgentTree(agents=2, depth=2, fan_out=2),
                calls=6,
            ),
        },
    )

    assert {
        name: (each.calls, each.tokens, each.duration) for name, each in planned.tenants.items()
    } == {
        "usual": (10, 500, 2.0),
        "long": (3, 150, 9.0),
        "agents": (6, 1_200, 4.0),
    }
    assert planned.tokens == 1_850


def test_refused_calls_of_one_tenant_do_not_affect_another() -> None:
    """An agent goes on after such a call, and the other tenants are not affected."""
    planned = plan(
        tpm=1_000,
        tenants={
            "greedy": Tenant(tokens=5_000, arrivals=AgentTree(agents=1, steps=3)),
            "modest": Tenant(calls=2, tokens=100),
        },
    )

    assert planned.tenants["greedy"] == PlannedTenant(
        calls=0,
        tokens=0,
        duration=0.0,
        waits=planned.tenants["greedy"].waits,
        refused=3,
    )
    assert planned.calls == 2
    assert "never passed: 3 calls: cost of 5,000 tokens exceeds" in str(planned)


def test_plan_in_which_no_tenant_can_pass_is_an_error() -> None:
    """The error is the same as without tenants."""
    with pytest.raises(CostExceedsLimit, match="no call can ever pass: cost of 50 tokens"):
        plan(calls=2, tokens=50, tpm=10, tenants={"a": Tenant(), "b": Tenant()})


def test_same_seed_gives_the_same_plan_of_tenants() -> None:
    """Each tenant draws values of its own."""

    def one(seed: int) -> Plan:
        tenants = {name: Tenant(arrivals=Poisson(5.0)) for name in ("a", "b")}
        return plan(
            calls=50, rpm=60, latency=lambda chance: chance.random(), tenants=tenants, seed=seed
        )

    assert one(1) == one(1)
    assert one(1) != one(2)
    assert one(1).tenants["a"] != one(1).tenants["b"]


async def test_plan_can_be_made_on_an_event_loop() -> None:
    """This is so in a notebook, even with a priority and a tenant around it."""
    with priority("interactive"), tenant("someone"):
        inside = plan_of_two_tenants()

    assert inside == plan_of_two_tenants()


def test_tenants_and_resources_of_a_wrong_type_are_refused() -> None:
    """A likely mistake is a dict with the same names."""
    tenants: Any = {"a": {"calls": 3}}
    with pytest.raises(TypeError, match=r"tenant 'a' must be a Tenant such as .*, not dict"):
        plan(rpm=60, tenants=tenants)
    unnamed: Any = [Tenant(calls=3)]
    with pytest.raises(TypeError, match=r"tenants must be given by name, such as .*, not list"):
        plan(rpm=60, tenants=unnamed)
    with pytest.raises(TypeError, match=r"resources must be given by name, such as .*, not list"):
        plan(rpm=60, calls=3, resources=unnamed)


def test_string_is_refused_as_limits_of_a_tenant() -> None:
    """The message shows how to write it."""
    one: Any = "5 RPM"
    with pytest.raises(TypeError, match=r"of tenant 'a' must be a tuple: write \('5 RPM',\)$"):
        plan(rpm=5, tenants={"a": Tenant(calls=3, limits=one)})


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ({"a": Tenant()}, "how many calls"),
        ({"a/b": Tenant(calls=2)}, "a child's name must be a string without a slash"),
        ({"a": Tenant(calls=2, weight=0)}, "weight must be a number"),
        ({"a": Tenant(calls=2, limits=("5 TPM",))}, "a limit counts tokens"),
        ({"a": Tenant(calls=2, concurrency=3)}, "concurrency=3 allows depends on how long"),
    ],
)
def test_invalid_tenant_is_refused_with_the_reason(
    tenants: dict[str, Tenant], message: str
) -> None:
    """The messages are the same as without tenants."""
    with pytest.raises(ValueError, match=message):
        plan(rpm=60, tenants=tenants)
