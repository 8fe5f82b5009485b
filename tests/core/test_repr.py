import asyncio

from asyncbucket import Limiter, LimitSyntaxError
from asyncbucket.core.meters import Bucket, Slots, Window
from asyncbucket.testing import VirtualTime


def test_limiter_repr_shows_name_limits_slots_and_waiting_calls(virtual_time: VirtualTime) -> None:
    """Its repr shows its name, limits, slots, and how many calls wait."""

    async def main() -> None:
        limiter = Limiter(
            "14,400 RPD", "40k ITPM", concurrency=2, name="groq", clock=virtual_time.clock
        )
        held = [await limiter.acquire() for _ in range(2)]
        waiting = asyncio.ensure_future(limiter.acquire())
        await virtual_time.all_blocked()
        assert repr(limiter) == (
            "<Limiter 'groq', 14,400 requests per 86,400 s, 40,000 input tokens per 60 s, "
            "concurrency 2/2, 1 waiting>"
        )
        for lease in held:
            lease.release()
        await waiting

    virtual_time.run(main())
    assert repr(Limiter()) == "<Limiter 'default', 0 waiting>"


def test_acquisition_repr_shows_cost_and_says_to_await_it() -> None:
    """The repr helps to find it in a debugger."""
    acquisition = Limiter().acquire(tokens=500)
    assert repr(acquisition) == (
        "<Acquisition Cost(requests=1, tokens=500, input_tokens=500, output_tokens=500): "
        "await it, or enter it by async with>"
    )
    acquisition.close()


def test_meters_have_no_instance_dict_and_plain_error_shows_its_text() -> None:
    """Meters have no instance dictionary, and a plain error shows just its text."""
    for meter in (Bucket(rate=1, burst=1), Window(amount=1, window=1000), Slots(size=1)):
        assert not hasattr(meter, "__dict__")
    assert str(LimitSyntaxError("what")) == "what"
