"""The bundled provider's cache of prompts: what of a prompt was read from it, and what was written.

An entry becomes readable when the reply that writes it begins, and lives a while after it was last
written or read. Only the hashes of prefixes are kept.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias

Json: TypeAlias = Mapping[str, Any]
_HOUR: Final = 3_600


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """How prompts are cached.

    Attributes:
        lives: Seconds that an entry lives, unless the request says an hour.
        renews: Whether it lives that long from its last use on, or from when it was written.
        least: Tokens below which nothing is cached.
        marked: Prompts are cached up to their last `cache_control`, else after each message.
        machines: How many caches there are; a call comes to any of them.
    """

    lives: float = 300.0
    renews: bool = True
    least: int = 0
    marked: bool = True
    machines: int = 1


class Block(NamedTuple):
    """A part of a prompt: its JSON, its characters, and its `cache_control`, if it has one."""

    content: Any
    characters: int
    mark: Json | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the cache does for one call.

    Attributes:
        read: Tokens that were read.
        written: Tokens that will be.
        entries: What is stored when the reply begins: on which machine, the prefixes with the
            seconds that they live.
    """

    read: int = 0
    written: int = 0
    machine: int = 0
    entries: Mapping[bytes, float] = field(default_factory=dict[bytes, float])


class PromptCache:
    """Remember prefixes of prompts. For one thread."""

    def __init__(self, options: Cache) -> None:
        self._options = options
        #: For each machine and prefix, when it is forgotten (s).
        self._until: dict[tuple[int, bytes], float] = {}
        self._machines = random.Random(2)  # noqa: S311 - repeatable, not secret

    def look_up(self, model: str, blocks: Sequence[Block], now: float) -> Prompt:
        """Return what of a prompt is read now, and what will be written."""
        options = self._options
        machine = self._machines.randrange(options.machines)
        if options.marked:  # what follows the last mark is neither read nor written
            marked = [place for place, block in enumerate(blocks, 1) if block.mark is not None]
            blocks = blocks[: max(marked, default=0)]
        read = written = 0
        entries: dict[bytes, float] = {}
        for prefix, tokens, mark in _prefixes(model, blocks):
            if tokens < options.least:
                continue
            is_warm = self._until.get((machine, prefix), 0.0) > now
            if is_warm:
                read, written = tokens, 0
                if not options.renews:
                    continue
            elif mark is not None or not options.marked:
                written = tokens - read
            else:
                continue
            entries[prefix] = _HOUR if mark and mark.get("ttl") == "1h" else options.lives
        return Prompt(read, written, machine, entries)

    def begin(self, prompt: Prompt, now: float) -> None:
        """Store what a call writes, and keep what it read."""
        for prefix, lives in prompt.entries.items():
            self._until[prompt.machine, prefix] = now + lives


def _prefixes(model: str, blocks: Sequence[Block]) -> Iterator[tuple[bytes, int, Json | None]]:
    """Yield for each prefix its hash, its tokens, and the mark at its end."""
    digest = hashlib.blake2b(model.encode(), digest_size=16)
    characters = 0
    for block in blocks:
        digest.update(json.dumps(block.content).encode())
        characters += block.characters
        yield digest.digest(), -(-characters // 4), block.mark
