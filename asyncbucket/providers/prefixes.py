"""Which prompts a provider has in its cache, so that a call is charged as the provider will charge it.

Agents send the same long prefix again and again, and the provider reads it from its prompt cache.
Some providers don't count what is read from there against their limits. That is known when the
reply comes; a call that reserves its whole prompt until then keeps others waiting for nothing.

*Knowing a prefix.* A prompt is hashed cumulatively, in the order in which providers cache it: tools,
system, messages. It has a *cut* after each block of these. What asks to cache (``cache_control``,
``cachePoint``) is no part of the hash: clients move it from message to message. `Prefixes` remembers
for a cut how many tokens a call reads there, when a reply last said so, and until when the provider
keeps it. It has hashes alone, with a secret of the process in them, and at most `MOST` of them: about
4 MB.

*Believing the reply, not the request.* Only the usage in a reply makes a prefix warm, in a stream
that of its first event, and a reply that says that nothing was read makes it cold. A reply says
nothing of what turned warm after its call had left. Whether a provider reads what it writes is tried
by one call. Once a reply shows that it does, all rely on it; after one that shows that it did not,
nobody does until the next that shows a read.

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
import os
import weakref
from collections.abc import Iterable, Mapping
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
    excess_of,
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
#: What a prompt counts as.
_COUNTED: Final = ("input_tokens", "tokens")
#: Makes the hashes useless to whoever reads this process's memory and guesses prompts.
_SECRET: Final = os.urandom(16)

#: Where a prompt may be cached up to: its hash and its characters up to there, and for how long (s) the
#: request asks to cache it; 0 if it does not. (Tuples, of which a call makes several.)
Cut: TypeAlias = tuple[int, int, float]
#: What replies have told of a prefix: how many tokens of it are read, 0 if the provider has not cached it;
#: when the latest did so, in seconds of the limiter's clock; and until when the provider keeps it.
_Entry: TypeAlias = tuple[float, float, float]
_UNKNOWN: Final[_Entry] = (0, -math.inf, -math.inf)
#: Tells whether a request asks to cache up to a cut.
_asks: Final = operator.itemgetter(2)


def cuts_of(body: Mapping[str, Any], site: str) -> list[Cut]:
    """Return where a prompt may be cached up to; the first place is before anything that it sends.

    Python's own hash is keyed, takes a fifth of what SHA-256 does, and has 64 bits: enough, since
    nobody gains by a collision, whose price is one wrong estimate.
    """
    cuts: list[Cut] = [(hash((_SECRET, site)), 0, 0.0)]
    for name in filter(body.get, _ORDER):
        items = body[name]
        if isinstance(items, dict):  # Bedrock's tools, Gemini's system
            items = items.get("tools") or items.get("parts")
        for item in items if isinstance(items, list) else (items,):
            if isinstance(item, dict) and (content := item.get("content") or item.get("parts")):
                head = item.get("role")
                if not isinstance(head, str) or len(item) > 2 + ("cache_control" in item):
                    head = _dumps([part for part in item.items() if part[0] not in _BESIDE])
                for block in content if isinstance(content, list) else (content,):
                    _add(cuts, head, block)
                if "cache_control" in item:
                    _add(cuts, "", {"cache_control": item["cache_control"]})
            else:
                _add(cuts, "", item)
    if "cache_control" in body:
        _add(cuts, "", {"cache_control": body["cache_control"]})
    return cuts


def _add(cuts: list[Cut], head: str | bytes, block: Any) -> None:
    """Add the cut after ``block``, of a message that begins with ``head``; or mark the last one."""
    data, ttl = block, 0.0
    if isinstance(block, dict):
        if mark := block.get("cache_control") or block.get("cachePoint"):
            is_long = isinstance(mark, dict) and mark.get("ttl") == "1h"
            ttl = _LONG_TTL if is_long else _TTL
        data = block.get("text")
        if not isinstance(data, str) or len(block) > 2 + ("cache_control" in block):
            data = [part for part in block.items() if part[0] not in _ASKS]  # no plain text
    digest, size, _ = cuts[-1]
    if data:
        data = data if isinstance(data, str) else _dumps(data)
        cuts.append((hash((digest, head, data)), size + len(data), ttl))
    elif ttl and size:
        cuts[-1] = digest, size, ttl


def _dumps(piece: Any) -> bytes:
    try:
        return marshal.dumps(piece, 2)  # as quick as can be; it has no references in this version
    except ValueError:  # an object, or nested very deeply
        return repr(piece).encode("utf-8", "replace")


@dataclass(eq=False, repr=False)
class Prompt:
    """Know what one call sends, from its admission to its reply."""

    table: "Prefixes"
    #: How the provider counts.
    profile: Profile
    #: Whose cache it is, and for which model.
    site: str
    body: Mapping[str, Any]
    #: The units of each limit that it meets, on each way.
    limits: Iterable[Iterable[tuple[str, int]]]
    #: Whether one of the calls with the same cold prefix goes first; and what the others wait for.
    leads: bool
    leading: "Future[bool] | None" = field(default=None, init=False)
    #: The hash of the longest warm prefix, and whether the call is charged for the rest alone.
    prefix: int | None = field(default=None, init=False)
    relies: bool = field(default=False, init=False)
    #: The tokens of the whole prompt, as estimated.
    tokens: int = field(default=0, init=False)
    #: What it costs if nothing is read, and how many tokens less it is charged.
    _cold: Mapping[str, int] = field(init=False)
    _free: int = field(default=0, init=False)
    #: Its lease while it is in line, and what reprices it when its prefix expires.
    _lease: Lease | None = field(default=None, init=False)
    _timer: asyncio.TimerHandle | None = field(default=None, init=False)
    _cuts: list[Cut] | None = field(default=None, init=False)

    @property
    def cuts(self) -> list[Cut]:
        """Where it may be cached up to, in order; not worked out for a site that caches nothing."""
        if self._cuts is None:
            self._cuts = cuts_of(self.body, self.site)
        return self._cuts

    @property
    def wanted(self) -> list[Cut]:
        """Where the request asks to cache; or else everywhere, if the provider does so by itself."""
        return [*filter(_asks, self.cuts)] or self.cuts

    def tokens_at(self, size: int) -> int:
        """Return the tokens of so many characters from the beginning."""
        return self.tokens * size // (self.cuts[-1][1] or 1)

    @property
    def may_be_free(self) -> bool:
        """Whether what is read is probably never counted. If nobody knows: so the request asks to cache."""
        return not self.profile.reserves_cached

    async def admit(self, lease: Lease, io: IO) -> None:
        """Wait for the admission of ``lease``, which costs what is left of the prompt.

        Raises:
            Exception: as for `Limiter.acquire`.
        """
        self._cold, self._free = {**amounts_of(lease)}, 0
        self.tokens = self._cold.get("input_tokens", 0)
        try:
            if self.leads:
                await self._follow(io)
            self._price(lease)
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
        self._lease = lease
        self.table.enter(self)
        try:
            self.reprice()
            await io.admit(lease)
        finally:
            self._lease = None
            self.table.leave(self)
            if self._timer is not None:
                self._timer.cancel()

    def reprice(self) -> None:
        """Have the call, if it is in line, cost what is left of its prompt now.

        One that can never pass whole, but could without what it asks to cache, may go out alone.
        """
        if self._lease is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        excess = excess_of({name: self._cold.get(name, 0) for name in _COUNTED}, self.limits)
        can_pass = self.may_be_free and excess <= self.tokens_at(self.wanted[-1][1])
        until = self._price(self._lease, excess if can_pass else 0)
        loop = asyncio._get_running_loop()  # noqa: SLF001 - None outside
        if until < math.inf and loop is not None:
            self._timer = loop.call_later(until - self.table.now(), self.reprice)

    def _price(self, lease: Lease, excess: int = 0) -> float:
        """Have ``lease`` cost what is left of the prompt, less ``excess``; return until when it does."""
        free, until = self.table.tokens_read(self)
        free = max(free, excess)
        if free != self._free:
            self._free, cold = free, self._cold
            reprice(lease, {name: max(0, cold[name] - free) for name in _COUNTED if name in cold})
        return until

    def replied(self, usage: Usage, lease: Lease, *, sent_at: float) -> None:
        """Learn which prefixes are warm from the reply to the call, which was sent at ``sent_at``."""
        cached, beside, written = usage.cached_tokens, usage.cached_beside, usage.written_tokens
        if cached or beside or written:
            saved = beside + cached * (not self.profile.counts_cached)
            count_cached(lease, read=cached + beside > 0, written=written > 0, saved=saved)
        elif self.prefix is None and not self.leads:
            return  # as known
        scale = self.tokens / (usage.input_tokens + beside or 1)
        # If nobody knows how it counts, it counts what is part of the input.
        read = beside if self.profile.reserves_cached is None else cached + beside
        self.table.learn(self, read * scale, written * scale, sent_at)
        if self.leading is not None:
            self.over(began=True)

    def over(self, *, began: bool = False) -> None:
        """End; those who wait for it go if its reply has begun, or else one of them leads."""
        leading, self.leading = self.leading, None
        if leading is not None:
            leading.set_result(began)


class Prefixes:
    """Remember which prefixes a provider has in its cache; `of` returns those of a limiter.

    Safe on several threads; what they learn at the same moment costs one wrong guess at most.
    """

    def __init__(self, limiter: Limiter) -> None:
        self.now = limiter.now
        self._lock = Lock()
        #: What is known, by the hashes of prefixes; the latest news is last.
        self._entries: dict[int | None, _Entry] = {}
        #: How many more calls may rely on what a site has in its cache: one, to try that; all, once one
        #: has read what it was to read; none, after one has not.
        self._trust: dict[str, float] = {}
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
        trust = self._trust.get(prompt.site)
        if trust is None:
            return 0, math.inf
        if prompt.relies:
            trust += 1  # until it is found again that it may
        prompt.prefix, prompt.relies, found = None, False, (0, math.inf)
        for digest, _, _ in reversed(prompt.cuts):
            tokens, _, until = self._entries.get(digest, _UNKNOWN)
            if tokens and self.now() < until:
                prompt.prefix, prompt.relies = digest, trust > 0 and prompt.may_be_free
                found = (int(tokens), until) if prompt.relies else found
                break
        self._trust[prompt.site] = trust - prompt.relies
        return found

    def learn(self, prompt: Prompt, read: float, written: float, sent_at: float) -> None:
        """Take in how many tokens of ``prompt`` were read and written, as a reply says.

        Where a request does not ask to cache, the provider does by itself, and says what was read alone.
        """
        self._trust.setdefault(prompt.site, 1.0)
        waiting = self._judge(prompt, read) if read or prompt.prefix is not None else {}
        now, wanted = self.now(), prompt.wanted
        _, last, asks = wanted[-1]
        whole = read + written if asks else prompt.tokens
        for digest, size, ttl in wanted:
            tokens, at, until = self._entries.get(digest, _UNKNOWN)
            found = whole * size / (last or 1)
            if not asks or (size < last and found < _SURE):
                found = min(found, read) if found * _NEARLY <= read else 0
            if found or ((tokens or ttl) and at <= sent_at):  # else the reply says nothing of it
                self._entries.pop(digest, None)
                self._entries[digest] = found, now, sent_at + (ttl or _TTL)
                if self._waiting and (found > 0) != (tokens > 0 and now < until):
                    waiting |= self._waiting.get(digest, {})
        if len(self._entries) > MOST:  # many at once: to find the first, all gone are passed
            for each in [*self._entries][: MOST // 16]:
                self._entries.pop(each, None)
        for call in waiting:
            call.reprice()

    def _judge(self, prompt: Prompt, read: float) -> dict[Prompt, None]:
        """Compare what was read with what was to be read; return who waits, if others may rely on it now."""
        before = self._trust[prompt.site]
        if read and read >= self._entries.get(prompt.prefix, _UNKNOWN)[0] * _NEARLY:
            self._trust[prompt.site] = trust = math.inf
        else:
            self._trust[prompt.site] = trust = -math.inf
            self._entries.pop(prompt.prefix, None)
        return {} if trust == before else {**self._waiting.get(prompt.cuts[0][0], {})}

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
        for digest, size, _ in prompt.wanted:
            _, _, until = self._entries.get(digest, _UNKNOWN)
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
