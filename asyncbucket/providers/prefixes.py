"""Which prompts a provider has in its cache, so that a call is charged as the provider will charge it.

Agents send the same long prefix again and again, and the provider reads it from its prompt cache.
Some providers don't count what is read from there against their limits. That is known when the
reply comes; a call that reserves its whole prompt until then keeps others waiting for nothing.

*Knowing a prefix.* A prompt is hashed cumulatively, in the order in which providers cache it: tools,
system, messages. It has a *cut* after each block of these. What asks to cache (``cache_control``,
``cachePoint``) is no part of the hash: clients move it from message to message. `Prefixes` remembers
for a cut how many tokens a call reads there, and until when the provider keeps it. It has hashes
alone, and at most `MOST` of them: about 3 MB.

*Believing the reply, not the request.* Only the usage in a reply makes a prefix warm, in a stream
that of its first event, and a reply that says that nothing was read makes it cold. Whether a provider
reads what it writes is tried by one call. Once a reply shows that it does, all rely on it. After one
that shows that it did not, nobody does until a reply shows a read again, and then one call tries first:
an account may be spread over several machines, each with a cache of its own.

Tokens are those of the estimate, which for a prompt of this provider may be off by a constant
factor: what a reply reports is scaled to it, so what is left of a prompt is off by no more.

*Who waits.* A call in line costs what is left of its prompt. When a prefix turns warm or cold, the
calls that carry it are repriced in their places. A call whose whole prompt exceeds a limit, but not
what is left of it once it is cached, is cut to the limit: so it goes out alone, and its reply corrects the limit.

*Leading.* If asked to, one of the calls with the same cold prefix goes first, and the others wait
until its reply begins, so that the prefix is written once, not by all of them. One that fails, or gives
up, hands over to the next.
"""

import asyncio
import marshal
import math
import operator
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from asyncbucket.engine.dispatchers import Lock
from asyncbucket.engine.lease import Lease
from asyncbucket.engine.limiter import Limiter
from asyncbucket.levels import (
    admitted_now,
    amounts_of,
    count_cached,
    excess_at,
    left_at,
    provider_of,
    reprice,
    shared,
)
from asyncbucket.providers.profiles import Profile
from asyncbucket.providers.usage import Usage
from asyncbucket.waiting import IO

#: What calls with the same cold prefix do: all go, or one leads.
CacheMode: TypeAlias = Literal["count", "lead"]

#: The most prefixes that are remembered; the ones unused for the longest time go.
MOST: Final = 16_384
#: For how long (s) a provider keeps a prefix, unless the request asks for an hour: Anthropic's and
#: Bedrock's documentation, read in 2026.
_TTL: Final = 300.0
_LONG_TTL: Final = 3_600.0
#: Below so many tokens no provider caches, or not all do. (Anthropic: 1,024 to 4,096, by model.)
LEAST: Final = 1_024
_SURE: Final = 4_096
#: What part of a prefix counts as all of it: providers round what was read down to blocks of tokens,
#: and messages are not of equal density.
_NEARLY: Final = 0.8
#: How long (s) a call waits for the one that leads.
PATIENCE: Final = 5.0

#: The members of a body in the order in which they are cached.
_ORDER: Final = (
    *("tools", "functions", "toolConfig", "system", "instructions", "systemInstruction"),
    *("system_instruction", "messages", "contents", "input", "prompt"),
)
_TURNS: Final = ("messages", "contents", "input")
#: What asks to cache, and what is no part of how a message begins.
_ASKS: Final = ("cache_control", "cachePoint")
_BESIDE: Final = ("content", "parts", "cache_control")
_PLAIN: Final = ("role", "content")
#: What a prompt counts as.
_COUNTED: Final = ("input_tokens", "tokens")
#: Who may rely on what a site has in its cache, if not one call alone, to try that.
_ALL: Final = -1
_NOBODY: Final = 0

#: Where a prompt may be cached up to: its hash and its characters up to there, and for how long (s) the
#: request asks to cache it; 0 if it does not. (Tuples, of which a call makes several.)
Cut: TypeAlias = tuple[int, int, float]
#: What replies have told of a prefix: how many tokens of it are read, 0 if the provider has not cached
#: it; and until when that holds, in seconds of the limiter's clock.
_Entry: TypeAlias = tuple[float, float]
_UNKNOWN: Final[_Entry] = (0, -math.inf)
#: Tells whether a request asks to cache up to a cut.
_asks: Final = operator.itemgetter(2)


def cuts_of(body: Mapping[str, Any], site: str) -> list[Cut]:
    """Return where a prompt may be cached up to; the first place is before anything that it sends.

    Python's own hash has a secret of the process in it, takes a fifth of what SHA-256 does, and has 64
    bits: enough, since nobody gains by a collision, whose price is one wrong estimate.
    """
    digest, size = hash(site), 0
    cuts: list[Cut] = [(digest, 0, 0.0)]
    for head, block in _blocks(body):
        data, ttl = block, 0.0
        if isinstance(block, dict):
            data = block.get("text")  # a text alone is the same
            if mark := block.get("cache_control") or block.get("cachePoint"):
                is_long = isinstance(mark, dict) and mark.get("ttl") == "1h"
                ttl = _LONG_TTL if is_long else _TTL
            if not data:
                data = [part for part in block.items() if part[0] not in _ASKS]
        if data:
            if not isinstance(data, str):
                data = _dumps(data)
            digest = hash((digest, head, data))
            size += len(data)
            cuts.append((digest, size, ttl))
        elif ttl and size:  # a mark of what came before
            cuts[-1] = digest, size, ttl
    return cuts


def _blocks(body: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each block of what is sent, with how its message begins; and what only asks to cache."""
    for name in filter(body.get, _ORDER):
        items = body[name]
        if isinstance(items, dict):  # Bedrock's tools, Gemini's system
            items = items.get("tools") or items.get("parts")
        for item in items if isinstance(items, list) else (items,):
            if isinstance(item, dict) and (content := item.get("content") or item.get("parts")):
                head = item.get("role")
                if len(item) > len(_PLAIN):
                    head = _dumps([part for part in item.items() if part[0] not in _BESIDE])
                for block in content if isinstance(content, list) else (content,):
                    yield head, block
                if "cache_control" in item:
                    yield None, {"cache_control": item["cache_control"]}
            else:
                yield None, item
    if "cache_control" in body:
        yield None, {"cache_control": body["cache_control"]}


def _dumps(piece: Any) -> bytes:
    try:
        return marshal.dumps(piece, 2)  # as quick as can be; it has no references in this version
    except ValueError:  # an object, or nested very deeply
        return repr(piece).encode("utf-8", "replace")


@dataclass(eq=False, repr=False, slots=True)
class Prompt:
    """Know what one call sends, from its admission to its reply; no text is kept."""

    table: "Prefixes"
    #: How the provider counts.
    profile: Profile
    #: Where it may be cached up to, in order.
    cuts: list[Cut]
    #: Whether one of the calls with the same cold prefix goes first; and what the others wait for.
    leads: bool = False
    leading: "Future[bool] | None" = field(default=None, init=False)
    #: The hash of the longest warm prefix.
    prefix: int | None = field(default=None, init=False)
    #: What it costs if nothing is read; and its lease, while it is in line.
    cold: Mapping[str, int] = field(init=False)
    lease: Lease | None = field(default=None, init=False)
    #: What reprices it in line when its prefix expires.
    timer: asyncio.TimerHandle | None = field(default=None, init=False)

    @property
    def marked(self) -> list[Cut]:
        """Where the request asks to cache."""
        return [*filter(_asks, self.cuts)]

    @property
    def tokens(self) -> int:
        """The tokens of the whole prompt, as estimated."""
        return self.cold.get("input_tokens", 0)

    def tokens_at(self, size: int) -> int:
        """Return the tokens of so many characters from the beginning."""
        return self.tokens * size // (self.cuts[-1][1] or 1)

    async def admit(self, lease: Lease, io: IO) -> None:
        """Wait for the admission of ``lease``, which costs what is left of the prompt.

        Raises:
            Exception: as for `Limiter.acquire`.
        """
        self.cold = {**amounts_of(lease)}
        try:
            if self.leads:
                await self._follow(io)
            read, _ = self.table.tokens_read(self)
            if read:
                self._charge(lease, read)
            if not admitted_now(lease):
                await self._wait(lease, io)
        except BaseException:
            self.over()
            raise

    async def _follow(self, io: IO) -> None:
        """Wait for the reply to the call that leads to begin; or lead, if none does."""
        until = self.table.now() + PATIENCE
        while (leader := self.table.leader_of(self)) is not None:
            await io.wait(leader, max(0.0, until - self.table.now()))
            if not leader.done() or leader.result():
                return

    async def _wait(self, lease: Lease, io: IO) -> None:
        """Wait in line, and be repriced meanwhile."""
        self.lease = lease
        self.table.enter(self)
        try:
            self.reprice()
            await io.admit(lease)
        finally:
            self.lease = None
            self.table.leave(self)
            if self.timer is not None:
                self.timer.cancel()

    def reprice(self) -> None:
        """Have the call, if it is in line, cost what is left of its prompt now.

        One that can never pass whole, but could without what it asks to cache, may go out alone.
        """
        lease = self.lease
        if lease is None:
            return
        if self.timer is not None:
            self.timer.cancel()
        read, until = self.table.tokens_read(self)
        if not read:
            self.table.end_trial(self)
        excess = excess_at(lease, {name: self.cold.get(name, 0) for name in _COUNTED})
        _, last, _ = (self.marked or self.cuts)[-1]
        if not self.profile.reserves_cached and excess <= self.tokens_at(last):
            read = max(read, excess)
        self._charge(lease, read)
        loop = asyncio._get_running_loop()  # noqa: SLF001 - None outside
        if until < math.inf and loop is not None:
            self.timer = loop.call_later(until - self.table.now(), self.reprice)

    def _charge(self, lease: Lease, free: int) -> None:
        """Have ``lease`` cost ``free`` tokens less than the whole prompt."""
        cold = self.cold
        new = {name: max(0, cold[name] - free) for name in _COUNTED if name in cold}
        if new.items() - amounts_of(lease).items():
            reprice(lease, new)

    def replied(self, usage: Usage, lease: Lease) -> None:
        """Learn which prefixes are warm from the usage in the reply to the call."""
        cached, beside, written = usage.cached_tokens, usage.cached_beside, usage.written_tokens
        read = cached + beside
        if not (read or written or self.leads or self.prefix is not None):
            return  # as known
        scale = self.tokens / (usage.input_tokens + beside or 1)
        # If nobody knows how it counts, it counts what is part of the input.
        if self.profile.reserves_cached is None:
            read = beside
        self.table.learn(self, read * scale, written * scale, left_at(lease))
        if self.leading is not None:
            self.over(began=True)

    def over(self, *, began: bool = False) -> None:
        """End; those who wait for it go if its reply has begun, or else one of them leads."""
        leading, self.leading = self.leading, None
        if not began:
            self.table.end_trial(self)
        if leading is not None:
            leading.set_result(began)


def count_use(lease: Lease, usage: Usage, profile: Profile) -> None:
    """Count a call whose prompt was read from the provider's cache, or written to it."""
    read = usage.cached_tokens + usage.cached_beside
    saved = usage.cached_beside if profile.counts_cached else read
    count_cached(lease, read=read > 0, written=usage.written_tokens > 0, saved=saved)


class Prefixes:
    """Remember which prefixes a provider has in its cache; `of` returns those of a limiter.

    Safe on several threads; what they learn at the same moment costs one wrong guess at most.
    """

    def __init__(self, limiter: Limiter) -> None:
        self.now = limiter.now
        self._lock = Lock()
        #: What is known, by the hashes of prefixes; the latest news is last.
        self._entries: dict[int | None, _Entry] = {}
        #: Who relies on what a site has in its cache, by its hash: one call, to try that; `_ALL`, once
        #: one has read what it was to read; `_NOBODY`, after one has not.
        self._who_relies: dict[int, int] = {}
        #: The calls in line, by the hashes of their prefixes, in order.
        self._waiting: dict[int, dict[Prompt, None]] = {}
        #: What calls wait for, by the hash of the prefix. A call that is dropped leads no longer.
        self._leaders = weakref.WeakValueDictionary[int, Future[bool]]()

    @classmethod
    def of(cls, limiter: Limiter) -> "Prefixes":
        """Return what all know who make calls of the provider that limits ``limiter``."""
        return shared(cls, provider_of(limiter), "_prefixes")

    def tokens_read(self, prompt: Prompt) -> tuple[int, float]:
        """Return how many tokens of ``prompt`` will be read and not be counted, and until when."""
        prompt.prefix = None
        for digest, _, _ in reversed(prompt.cuts):
            entry = self._entries.get(digest)
            if entry is not None and entry[0] and self.now() < entry[1]:
                prompt.prefix = digest
                if not prompt.profile.reserves_cached:
                    who = self._who_relies.setdefault(prompt.cuts[0][0], id(prompt))
                    if who in (_ALL, id(prompt)):
                        return int(entry[0]), entry[1]
                break
        return 0, math.inf

    def end_trial(self, prompt: Prompt) -> None:
        """Let another call find out whether the site reads what it writes, if ``prompt`` has not."""
        site = prompt.cuts[0][0]
        if self._who_relies.get(site) == id(prompt):
            del self._who_relies[site]
            for call in [*self._waiting.get(site, ())]:
                call.reprice()

    def learn(self, prompt: Prompt, read: float, written: float, sent_at: float) -> None:
        """Take in how many tokens of ``prompt`` were read and written, as a reply says.

        Where a request does not ask to cache, the provider does by itself, and says what was read alone.
        """
        turned = self._judge(prompt, read) if read or prompt.prefix is not None else {}
        marked = prompt.marked
        wanted, whole = (marked, read + written) if marked else (prompt.cuts, prompt.tokens)
        last = wanted[-1][1] or 1
        for digest, size, ttl in wanted:
            found = whole * size / last
            if not marked or (size < last and found < _SURE):
                found = min(found, read) if found * _NEARLY <= read else 0
            if found or ttl:
                before = self._entries.pop(digest, _UNKNOWN)
                self._entries[digest] = found, sent_at + (ttl or _TTL)
                if self._waiting and (found > 0) != (before[0] > 0 and self.now() < before[1]):
                    turned |= self._waiting.get(digest, {})
        if len(self._entries) > MOST:  # many at once: to find the first, all gone are passed
            for each in [*self._entries][: MOST // 16]:
                self._entries.pop(each, None)
        for call in turned:
            call.reprice()

    def _judge(self, prompt: Prompt, read: float) -> dict[Prompt, None]:
        """Compare what was read with what was to be read; return who waits, if others may rely on it now."""
        site, expected = prompt.cuts[0][0], self._entries.get(prompt.prefix, _UNKNOWN)[0]
        is_read = read > 0 and read >= expected * _NEARLY
        if not is_read:
            self._entries.pop(prompt.prefix, None)
        before = self._who_relies.pop(site, None)
        if not is_read:
            self._who_relies[site] = _NOBODY
        elif before != _NOBODY:  # else one call tries first
            self._who_relies[site] = _ALL
        return {} if self._who_relies.get(site) == before else {**self._waiting.get(site, {})}

    def enter(self, prompt: Prompt) -> None:
        """Reprice ``prompt`` whenever one of its prefixes turns warm or cold."""
        with self._lock:
            for digest, _, _ in prompt.cuts:
                self._waiting.setdefault(digest, {})[prompt] = None

    def leave(self, prompt: Prompt) -> None:
        """Reprice it no longer."""
        with self._lock:
            for digest, _, _ in prompt.cuts:
                calls = self._waiting[digest]
                del calls[prompt]
                if not calls:
                    del self._waiting[digest]

    def leader_of(self, prompt: Prompt) -> "Future[bool] | None":
        """Return what resolves when the reply to the call that leads begins, or when it has failed.

        None if ``prompt`` leads from now on, or all of it is known, or not worth caching.
        """
        for digest, size, _ in prompt.marked or prompt.cuts:
            _, until = self._entries.get(digest, _UNKNOWN)
            if prompt.tokens_at(size) >= LEAST and until <= self.now():
                leader = self._leaders.get(digest)
                if leader is not None and not leader.done():
                    return leader
                prompt.leading = self._leaders[digest] = Future[bool]()
                prompt.leading.set_running_or_notify_cancel()  # who waits can't cancel it
                break
        return None


def asks_to_cache(content: bytes | None) -> bool:
    """Tell whether a request's body, if it is in memory, probably asks to cache some of it."""
    return content is not None and (b'"cache_control"' in content or b'"cachePoint"' in content)


def conversation_of(body: Mapping[str, Any], site: str) -> str | None:
    """Return what the calls of one conversation share: the hash of what is sent up to the user's first turn.

    None if no turn is the user's. What many conversations share, such as a system prompt, is soon warm
    at each member of a pool; the rest of a conversation only where its last call was.
    """
    for name in _TURNS:
        turns: Any = body.get(name)
        for number, turn in enumerate(turns if isinstance(turns, list) else (), 1):
            if isinstance(turn, dict) and turn.get("role") == "user":
                return f"{cuts_of({**body, name: turns[:number]}, site)[-1][0]:x}"
    return None


def read_mode(mode: object) -> CacheMode:
    """Return how calls with the same cold prefix go.

    Raises:
        ValueError: it is no such mode.
    """
    if mode not in ("count", "lead"):
        raise ValueError(f'cache must be "count" or "lead", not {mode!r}')
    return mode
