"""A forked child starts anew: its parent's locks, loops and slots do not bind it."""

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")

#: What every program begins with, for a fork copies the locks of all threads of its process.
HEAD = """
import asyncio, os, signal, sys, threading
from asyncbucket import Limiter, TokenBucket
def in_child(check):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        check()
        sys.exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
def state(limiter):
    now = limiter.statistics()
    return now.waiting, now.in_flight, [use.used for use in now.limits]
def thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    return thread
"""


def run(code: str) -> None:
    """Run a program in a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c"]
    code = HEAD + textwrap.dedent(code)
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_shadow_of_a_forked_process_has_a_line_of_its_own() -> None:
    run("""
        limiter = Limiter(concurrency=1, shadow=True)
        held = [limiter.acquire_nowait() for _ in range(3)]
        def check():
            first, second = limiter.acquire_nowait(), limiter.acquire_nowait()
            first.release()
            assert limiter.statistics().shadow.would_wait == 1
            assert not limiter._node.bystander._pacer.waiting
            second.release()
            held.clear()
        in_child(check)
        assert limiter.statistics().shadow.would_wait == 2
    """)


def test_forked_process_has_all_slots_free_and_keeps_used_units() -> None:
    """The parent's leases neither count in the child nor give back or settle anything there."""
    run("""
        limiter = Limiter("100 TPM", concurrency=2)
        bucket = TokenBucket(rate=0.001, burst=3)
        bucket.acquire_nowait()
        held = [limiter.acquire_nowait(tokens=10) for _ in range(2)]
        def check():
            assert state(limiter) == (0, 0, [20])
            mine = [limiter.acquire_sync(timeout=0), limiter.acquire_sync(timeout=0)]
            held[0].settle(tokens=0)
            held[1]._undo()
            for lease in held:
                lease.release()
            assert state(limiter) == (0, 2, [20])
            for lease in mine:
                lease.release()
            held.clear()
            assert state(limiter) == (0, 0, [20])
            bucket.acquire_nowait(2)
            assert bucket.statistics().available == 0
        in_child(check)
        bucket.acquire_nowait(2)
        assert state(limiter) == (0, 2, [20])
        for lease in held:
            lease.release()
        assert state(limiter) == (0, 0, [20])
    """)


@pytest.mark.parametrize("lock", ["limiter._node.pacer.lock", "limiter._all_tenants()._lock"])
def test_lock_held_by_other_thread_at_fork_does_not_deadlock_forked_process(lock: str) -> None:
    run(f"""
        limiter = Limiter("100 TPM", concurrency=1)
        limiter.observe(lambda _: None)
        inside, out = threading.Event(), threading.Event()
        def hold():
            with {lock}:
                inside.set()
                out.wait(20)
        holder = thread(hold)
        inside.wait(20)
        def check():
            limiter.acquire_nowait(tokens=5).release()
            limiter.key("tenant").observe(print)()
            limiter.observe(lambda _: None)()
            with limiter.acquire_sync(tokens=95):
                pass
        in_child(check)
        out.set()
        holder.join()
    """)


def test_calls_of_parent_process_that_end_in_forked_process_are_not_counted() -> None:
    """Cancelled, closed or just admitted, they give nothing back; the child's line is its own."""
    run("""
        limiter = Limiter(concurrency=1)
        chat = limiter.child("chat")
        async def own():
            lease = await limiter.acquire()
            waiting = asyncio.ensure_future(chat.acquire())
            await asyncio.sleep(0)
            assert (limiter.statistics().waiting, chat.statistics().waiting) == (1, 1)
            lease.release()
            (await waiting).release()
        def check():
            for call in calls:
                call.cancel()
                call.get_coro().close()
            for each in (limiter, chat):
                now = each.statistics()
                assert (now.waiting, now.cancelled, now.in_flight) == (0, 0, 0), now
            thread(lambda: asyncio.run(own())).join()
            os._exit(0)
        async def main():
            lease = await limiter.acquire()
            asked = [limiter.acquire(), chat.acquire(), chat.acquire()]
            calls.extend(asyncio.ensure_future(call) for call in asked)
            await asyncio.sleep(0.01)
            lease.release()
            while not calls[0]._fut_waiter.done():
                await asyncio.sleep(0)
            in_child(check)
            for call in calls:
                call.cancel()
            await asyncio.sleep(0.01)
            assert (limiter.statistics().waiting, limiter.statistics().cancelled) == (0, 3)
        calls = []
        asyncio.run(main())
    """)
