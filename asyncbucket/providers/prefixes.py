"""Which prompts a provider has in its cache, so that a call is charged as the provider will charge it.

Agents send the same long prefix again and again, and the provider reads it from its prompt cache.
Some providers don't count what is read from there against their limits. That is known when the
reply comes; a call that reserves its whole prompt until then keeps others waiting for nothing.

*Knowing a prefix.* A prompt is hashed cumulatively, in the order in which providers cache it: tools,
system, messages. It has a *cut* where the request asks to cache up to there (``cache_control``,
``cachePoint``), and after each message. What asks to cache is no part of the hash: clients move it
from message to message. `Prefixes` remembers for a cut how many tokens a call reads there, when the
provider last read or wrote it, and for how long it is kept. It has hashes alone, with a secret of
the process in them, and at most `MOST` of them: about 4 MB.

*Believing the reply, not the request.* Only the usage in a reply makes a prefix warm, in a stream
that of its first event, and a reply that says that nothing was read makes it cold. A reply says
nothing of what turned warm after its call had left. A provider that drops a prefix earlier than
it says teaches for how long it keeps any; the next one that is read later than that corrects it.

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
import itertools
import marshal
import math
import os
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from asyncbucket.engine.dispatchers import Lock
from asyncbucket.engine.limiter import Limiter
from asyncbucket.levels import (
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

if TYPE_CHECKING:
    from asyncbucket.engine.lease import Lease

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
#: By how much a provider's count of what was read may be below the size of the prefix: it is rounded
#: down to blocks of tokens, and messages are not of equal density.
_BLOCK: Final = 128
_SLACK: Final = 0.98
#: If so many calls may rely on a cache at once, all may.
_TRUSTED: Final = 32
#: How long (s) a call waits for the one that leads.
PATIENCE: Final = 5.0

#: The members of a body in the order in which they are cached.
_ORDER: Final = (
    *("tools", "functions", "toolConfig", "system", "instructions", "systemInstruction"),
    *("system_instruction", "messages", "contents", "input", "prompt"),
)
_TURNS: Final = ("messages", "contents", "input")
#: What asks to cache; what is no part of how a message begins; and what shows that a body asks.
_ASKS: Final = ("cache_control", "cachePoint")
_BESIDE: Final = ("content", "parts", "cache_control")
MARKS: Final = (b'"cache_control"', b'"cachePoint"')
#: What a prompt counts as.
_COUNTED: Final = ("input_tokens", "tokens")
#: Makes the hashes useless to whoever reads this process's memory and guesses prompts.
_SECRET: Final = os.urandom(16)


class Cut(NamedTuple):
    """Where a prompt may be cached up to."""

    digest: int
    #: Characters up to here.
    size: int
    #: For how long (s) the request asks to cache it; 0 if it does not.
    ttl: float


@dataclass(slots=True)
class _Entry:
    """What replies have told of a prefix."""

    #: How many tokens of it are read; 0 if the provider has not cached it.
    tokens: int
    #: When the latest reply told of it, in seconds of the limiter's clock; and until when the provider
    #: says that it keeps it.
    at: float
    until: float

    def is_read_by(self, read: float) -> bool:
        """Tell whether a call that has ``read`` so many tokens has read it; providers round down."""
        return read >= self.tokens * _SLACK - _BLOCK


class _Site:
    """What is known of a provider's cache for one model.

    Calls rely on it gradually: at first one at a time, and each that reads what it was to read adds
    two, until all may. One that does not begins anew.
    """

    def __init__(self) -> None:
        #: For how long (s) entries last after their latest use; and for how long some did.
        self.unused, self.seen_unused = math.inf, 0.0
        #: How many calls may rely on it at once, those that do, and those in line that would.
        self.credit = 1
        self.relying: weakref.WeakSet[Prompt] = weakref.WeakSet()
        self.doubting: dict[Prompt, None] = {}
        #: Whether the limits count what is read, as replies show.
        self.counts = False

    def lets_rely(self, prompt: "Prompt", unused: float) -> bool:
        """Tell whether ``prompt`` may be charged as warm, by an entry that nobody used for so long (s)."""
        if self.counts or not prompt.may_be_free:
            return False
        most = self.credit if unused <= self.seen_unused else 1
        if most < _TRUSTED and prompt not in self.relying:
            if len(self.relying) >= most:
                self.doubting[prompt] = None
                return False
            self.relying.add(prompt)
        self.doubting.pop(prompt, None)
        return True

    def hit(self, unused: float = 0.0) -> None:
        """Let more calls rely on it: one has read an entry that nobody used for so long (s)."""
        self.seen_unused = max(self.seen_unused, unused)
        self.unused = max(self.unused, self.seen_unused)
        self.credit = min(self.credit + 2, _TRUSTED)

    def missed(self, unused: float) -> None:
        """Begin anew: a call was to read an entry, which nobody used for so long (s), and did not."""
        if unused > self.seen_unused:
            self.unused = min(self.unused, max(self.seen_unused, unused / 2))
        self.credit = 1
        self.relying.clear()


def cuts_of(body: Mapping[str, Any], site: str) -> list[Cut]:
    """Return where a prompt may be cached up to.

    Python's own hash is keyed, takes a fifth of what SHA-256 does, and has 64 bits: enough, since
    nobody gains by a collision, whose price is one wrong estimate.
    """
    digest, size, cuts = hash((_SECRET, site)), 0, list[Cut]()
    for name in _ORDER:
        items = body.get(name)
        if isinstance(items, dict):  # Bedrock's tools, Gemini's system
            items = items.get("tools") or items.get("parts")
        if not items:
            continue
        for item in items if isinstance(items, list) else (items,):
            content = (item.get("content") or item.get("parts")) if isinstance(item, dict) else None
            head, blocks = _head_of(item) if content else "", content or item
            for block in blocks if isinstance(blocks, list) else (blocks,):
                data, ttl = (block, 0.0) if isinstance(block, str) else _plain(block)
                if data:
                    digest, size = hash((digest, head, data)), size + len(data)
                if ttl:
                    _cut(cuts, digest, size, ttl)
            if content:
                _cut(cuts, digest, size, _ttl_of(item) if "cache_control" in item else 0.0)
        _cut(cuts, digest, size, 0.0)
    _cut(cuts, digest, size, _ttl_of(body))
    return cuts


def _cut(cuts: list[Cut], digest: int, size: int, ttl: float) -> None:
    """Add a cut, unless it is there already; that one may ask for more now."""
    if not cuts or cuts[-1].size != size:
        cuts.append(Cut(digest, size, ttl))
    elif ttl:
        cuts[-1] = Cut(digest, size, ttl)


def _head_of(message: Mapping[str, Any]) -> str | bytes:
    """Return the role of a message, and whatever else it has beside its content."""
    if len(message) == 2 and isinstance(message.get("role"), str):  # noqa: PLR2004
        return message["role"]  # type: ignore[no-any-return]
    rest = [part for part in message.items() if part[0] not in _BESIDE]
    return rest[0][1] if len(rest) == 1 and isinstance(rest[0][1], str) else _dumps(rest)


def _plain(block: Any) -> tuple[str | bytes, float]:
    """Return a block without what asks to cache it, and for how long (s) that asks; 0 if it does not."""
    ttl = 0.0
    if isinstance(block, dict):
        if "cache_control" in block or "cachePoint" in block:
            ttl = _ttl_of(block)
            block = {name: part for name, part in block.items() if name not in _ASKS}
        if len(block) == 2 and block.get("type") == "text":  # noqa: PLR2004
            block = block.get("text")
    return block if isinstance(block, str) else _dumps(block) if block else b"", ttl


def _ttl_of(holder: Any) -> float:
    """Return for how long (s) ``holder`` asks to cache what ends with it; 0 if it does not."""
    mark = isinstance(holder, dict) and (holder.get("cache_control") or holder.get("cachePoint"))
    if not mark:
        return 0.0
    return _LONG_TTL if isinstance(mark, dict) and mark.get("ttl") == "1h" else _TTL


def _dumps(piece: Any) -> bytes:
    try:
        return marshal.dumps(piece, 2)  # as quick as can be; it has no references in this version
    except ValueError:  # an object, or nested very deeply
        return repr(piece).encode("utf-8", "replace")


class Prompt:
    """Know what one call sends, from its admission to its reply.

    Args:
        table: the prefixes that are known.
        profile: how the provider counts.
        site: whose cache it is, and for which model.
        body: the request.
        limits: the units of each limit that it meets, on each way.
        leads: whether one of the calls with the same cold prefix goes first.
    """

    def __init__(
        self,
        table: "Prefixes",
        profile: Profile,
        site: str,
        body: Mapping[str, Any],
        limits: list[list[tuple[str, int]]],
        *,
        leads: bool,
    ) -> None:
        self.profile, self.site, self.leads, self._table = profile, site, leads, table
        self._body, self._limits = body, limits
        #: What it costs if nothing is read, and its lease as it waits.
        self._cold: Mapping[str, int] = {}
        self._lease: Lease | None = None
        #: How many tokens it is not charged, and what reprices it when that expires.
        self._free = 0
        self._timer: asyncio.TimerHandle | None = None
        #: The longest prefix that may be warm, and the one that it is charged as reading.
        self.longest: _Entry | None = None
        self.believed: _Entry | None = None
        #: What others wait for if it leads.
        self.leading: Future[bool] | None = None

    @cached_property
    def cuts(self) -> list[Cut]:
        """Where it may be cached up to, in order; not worked out for a site that caches nothing."""
        return cuts_of(self._body, self.site)

    @cached_property
    def wanted(self) -> list[Cut]:
        """Where the request asks to cache; or else everywhere, if the provider does so by itself."""
        return [cut for cut in self.cuts if cut.ttl] or self.cuts

    @property
    def asks(self) -> bool:
        """Whether the request asks to cache it."""
        return self.wanted[-1].ttl > 0

    @property
    def tokens(self) -> int:
        """The tokens of the whole prompt, as estimated."""
        return self._cold.get("input_tokens", 0)

    def tokens_at(self, cut: Cut) -> int:
        """Return the tokens up to ``cut``, by its share of the characters."""
        return self.tokens * cut.size // max(1, self.cuts[-1].size)

    @property
    def may_be_free(self) -> bool:
        """Whether what is read is probably never counted."""
        reserves = self.profile.reserves_cached
        return self.asks if reserves is None else not reserves

    async def admit(self, lease: Any, io: IO) -> None:
        """Wait for the admission of ``lease``, which costs what is left of the prompt.

        Raises:
            Exception: as for `Limiter.acquire`.
        """
        cost = amounts_of(lease)
        self._cold = {name: cost.get(name, 0) for name in _COUNTED}
        self._free = 0
        try:
            if self.leads:
                await self._follow(io)
            self._lease = lease
            self._table.enter(self)
            self.reprice()
            await io.admit(lease)
        except BaseException:
            self.over()
            raise
        finally:
            self._lease = None
            if self._timer is not None:
                self._wake_at(math.inf)
            self._table.leave(self)

    async def _follow(self, io: IO) -> None:
        """Wait for the reply to the call that leads to begin; or lead, if none does."""
        table = self._table
        until = table.now() + PATIENCE
        while (leader := table.leader_of(self)) is not None:
            await io.wait(leader, max(0.0, until - table.now()))
            if not leader.done() or leader.result():
                return

    def reprice(self) -> None:
        """Have the call, which waits, cost what is left of its prompt now."""
        lease, cold = self._lease, self._cold
        if lease is None:
            return
        free, until = self._table.tokens_read(self)
        if until < math.inf or self._timer is not None:
            self._wake_at(until)
        excess = excess_of(cold, self._limits)
        if excess > free and self.may_be_free and excess <= self.tokens_at(self.wanted[-1]):
            free = excess  # it goes out alone
        if free != self._free:
            self._free = free
            reprice(lease, {name: max(0, amount - free) for name, amount in cold.items()})

    def _wake_at(self, when: float) -> None:
        """Look at the price again at ``when``, if it still waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when == math.inf:
            return
        loop = asyncio._get_running_loop()  # noqa: SLF001 - None outside
        if loop is not None:
            self._timer = loop.call_later(when - self._table.now(), self.reprice)

    def replied(self, usage: Usage, lease: "Lease", *, sent_at: float) -> None:
        """Learn which prefixes are warm from the reply to the call, which was sent at ``sent_at``."""
        read, written = usage.cached_tokens + usage.cached_beside, usage.written_tokens
        self._table.learn(self, usage, sent_at)
        if read or written:
            saved = usage.cached_beside + usage.cached_tokens * (not self.profile.counts_cached)
            count_cached(lease, read=bool(read), written=bool(written), saved=saved)
        self._hand_over(began=True)

    def over(self) -> None:
        """End; if others wait for it, one of them leads."""
        self._table.end(self)
        self._hand_over(began=False)

    def _hand_over(self, *, began: bool) -> None:
        leading, self.leading = self.leading, None
        if leading is not None:
            self._table.forget(self, leading)
            leading.set_result(began)


class Prefixes:
    """Remember which prefixes a provider has in its cache; `of` returns those of a limiter.

    Safe on several threads.
    """

    def __init__(self, limiter: Limiter) -> None:
        self.now = limiter.now
        self._lock = Lock()
        #: What is known, by the hashes of prefixes; the latest news is last.
        self._entries: dict[int, _Entry] = {}
        self._sites: dict[str, _Site] = {}
        #: The calls in line, by the hashes of their prefixes; and those that no news has met yet, so
        #: that most calls, which hardly wait, are never sorted in.
        self._waiting: dict[int, dict[Prompt, None]] = {}
        self._entered: dict[Prompt, None] = {}
        #: The calls that lead. One that is dropped leads no longer.
        self._leaders: weakref.WeakValueDictionary[int, Future[bool]]
        self._leaders = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, limiter: Limiter) -> "Prefixes":
        """Return what all know who make calls of the provider that limits ``limiter``."""
        return shared(cls, provider_of(limiter), "_prefixes")

    def tokens_read(self, prompt: Prompt) -> tuple[int, float]:
        """Return how many tokens of ``prompt`` will be read and not be counted, and until when."""
        now = self.now()
        prompt.longest = prompt.believed = None
        if prompt.site not in self._sites:
            return 0, math.inf
        for cut in reversed(prompt.cuts):
            entry = self._entries.get(cut.digest)
            if entry is None or not entry.tokens or now >= entry.until:
                continue
            site, prompt.longest = self._sites[prompt.site], prompt.longest or entry
            until = min(entry.until, entry.at + site.unused)
            if now < until:
                if not site.lets_rely(prompt, now - entry.at):
                    break
                prompt.believed = entry
                return entry.tokens, until
        return 0, math.inf

    def learn(self, prompt: Prompt, usage: Usage, sent_at: float) -> None:
        """Take in what a reply says was read and written."""
        read, now = usage.cached_tokens + usage.cached_beside, self.now()
        if not (read or usage.written_tokens or prompt.longest or prompt.leads):
            return  # as known
        scale = prompt.tokens / max(1, usage.input_tokens + usage.cached_beside)
        changed: list[int] = []
        with self._lock:
            if not self._judge(prompt, usage, read * scale, sent_at):
                changed = [cut.digest for cut in prompt.cuts]
            cached = self._cached(prompt, read * scale, (read + usage.written_tokens) * scale)
            for cut in prompt.cuts:
                before, tokens = self._entries.get(cut.digest), cached.get(cut, 0)
                if not tokens and (not cut.ttl if before is None else before.at > sent_at):
                    continue  # the reply says nothing of it
                was, until = 0, sent_at + (cut.ttl or _TTL)
                if before is not None and now < before.until:
                    was, until = before.tokens, max(until, before.until)
                self._entries.pop(cut.digest, None)
                self._entries[cut.digest] = _Entry(tokens, now, until)
                if tokens != was:
                    changed.append(cut.digest)
            if len(self._entries) > MOST:  # many at once: to find the first, all gone are passed
                for digest in [*itertools.islice(self._entries, MOST // 16)]:
                    del self._entries[digest]
            waiting = self._waiting_for(changed)
        for each in waiting:
            each.reprice()
        self.end(prompt)

    def _judge(self, prompt: Prompt, usage: Usage, read: float, sent_at: float) -> bool:
        """Compare what was known of a prompt with what was ``read`` of it; return whether it was true."""
        site = self._sites.get(prompt.site) or self._sites.setdefault(prompt.site, _Site())
        site.counts = prompt.profile.reserves_cached is None and usage.cached_tokens > 0
        longest, believed = prompt.longest, prompt.believed
        if longest is None:
            if read:  # it left before that was known
                site.hit()
        elif longest.is_read_by(read):
            site.hit(sent_at - longest.at)
        elif believed is not None and not believed.is_read_by(read):
            site.missed(sent_at - believed.at)
            return False
        return True

    def end(self, prompt: Prompt) -> None:
        """Have ``prompt`` rely on a cache no longer, so that another call may."""
        site = self._sites.get(prompt.site)
        if site is not None:
            site.relying.discard(prompt)
            for each in list(site.doubting):
                each.reprice()
                if each.believed is None:
                    break

    def _cached(self, prompt: Prompt, read: float, cached: float) -> dict[Cut, int]:
        """Return how many tokens a call will read at each cut that a reply shows to be cached."""
        found: dict[Cut, int] = {}
        last = prompt.wanted[-1]
        for cut in prompt.cuts if cached else ():
            before = self._entries.get(cut.digest)
            if not prompt.asks:
                tokens = prompt.tokens_at(cut)
                if tokens * _SLACK - _BLOCK <= read:
                    found[cut] = min(tokens, int(read))
            elif cut == last:
                found[cut] = int(cached)
            elif before is not None and before.tokens and before.tokens * _SLACK <= read:
                found[cut] = before.tokens
            elif cut.ttl and cached * cut.size / last.size >= _SURE:
                found[cut] = int(cached * cut.size / last.size)
        return found

    # --- who waits ---

    def enter(self, prompt: Prompt) -> None:
        """Reprice ``prompt`` whenever one of its prefixes turns warm or cold."""
        self._entered[prompt] = None

    def _waiting_for(self, changed: list[int]) -> list[Prompt]:
        """Return the calls in line with a prefix that has ``changed``."""
        for prompt in tuple(self._entered) if changed else ():
            if self._entered.pop(prompt, prompt) is None:
                for cut in prompt.cuts:
                    self._waiting.setdefault(cut.digest, {})[prompt] = None
        calls = (each for digest in changed for each in self._waiting.get(digest, ()))
        return list(dict.fromkeys(calls))

    def leave(self, prompt: Prompt) -> None:
        """Reprice it no longer."""
        if self._entered.pop(prompt, prompt) is not None:
            with self._lock:
                for cut in prompt.cuts:
                    calls = self._waiting.get(cut.digest, {})
                    calls.pop(prompt, None)
                    if not calls:
                        self._waiting.pop(cut.digest, None)
        if (site := self._sites.get(prompt.site)) is not None:
            site.doubting.pop(prompt, None)

    def leader_of(self, prompt: Prompt) -> "Future[bool] | None":
        """Return what resolves when the reply to the call that leads begins, or when it has failed.

        None if ``prompt`` leads from now on, or all of it is warm, or not worth caching.
        """
        with self._lock:
            now, cold = self.now(), list[int]()
            for cut in reversed(prompt.wanted):
                entry = self._entries.get(cut.digest)
                if (entry and now < entry.until) or prompt.tokens_at(cut) < LEAST:
                    break
                if (leader := self._leaders.get(cut.digest)) is not None:
                    return leader
                cold.append(cut.digest)
            if cold:
                prompt.leading = leading = Future[bool]()
                leading.set_running_or_notify_cancel()  # those who wait can't cancel it
                self._leaders.update(dict.fromkeys(cold, leading))
        return None

    def forget(self, prompt: Prompt, leading: "Future[bool]") -> None:
        """Have ``prompt`` lead no longer."""
        with self._lock:
            for cut in prompt.wanted:
                if self._leaders.get(cut.digest) is leading:
                    del self._leaders[cut.digest]


def conversation_of(body: Mapping[str, Any], site: str) -> str | None:
    """Return what the calls of one conversation share: the hash of what is sent up to the user's first turn.

    None if no turn is the user's. What many conversations share, such as a system prompt, is soon warm
    at each member of a pool; the rest of a conversation only where its last call was.
    """
    for name in _TURNS:
        turns: Any = body.get(name)
        for number, turn in enumerate(turns if isinstance(turns, list) else (), 1):
            if isinstance(turn, dict) and turn.get("role") == "user":
                return f"{cuts_of({**body, name: turns[:number]}, site)[-1].digest:x}"
    return None


def read_mode(mode: object) -> CacheMode:
    """Return how calls with the same cold prefix go.

    Raises:
        ValueError: it is no such mode.
    """
    if mode not in ("count", "lead"):
        raise ValueError(f'cache must be "count" or "lead", not {mode!r}')
    return mode
