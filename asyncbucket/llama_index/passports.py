"""What stands for a limiter in a pickle: its passport, by which it is recognized.

A limiter cannot be pickled: its budget lives in this process. A passport that comes back into this
process stands for the limiter that it was issued for. In another process it stands for a limiter
made there on the same terms, with those above it, and always for the same one.
"""

import os
import threading
import uuid
import weakref
from dataclasses import dataclass, field
from typing import Any

from asyncbucket.core.levels import levels, terms_of
from asyncbucket.core.limiter import Limiter
from asyncbucket.core.limits import Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Passport:
    """Stand for a limiter in a pickle, with those above it."""

    key: str
    pid: int
    #: Its own name, without those above it.
    name: str
    limits: tuple[Limit, ...]
    #: Everything else it was made with, by keyword.
    terms: dict[str, Any]
    parent: "Passport | None"


@dataclass(slots=True)
class Passports:
    """Know the limiters of this process by their passports."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    issued: weakref.WeakKeyDictionary[Limiter, Passport] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    limiters: weakref.WeakValueDictionary[str, Limiter] = field(
        default_factory=weakref.WeakValueDictionary
    )
    #: Limiters of other processes, as remade in this one.
    remade: dict[tuple[int, str], Limiter] = field(default_factory=dict)

    def issue(self, limiter: Limiter) -> Passport:
        """Return the passport of ``limiter``, with its limits as they are now."""
        with self.lock:
            return self._issue_locked(limiter)

    def _issue_locked(self, limiter: Limiter) -> Passport:
        known, parent = self.issued.get(limiter), limiter.parent
        passport = self.issued[limiter] = Passport(
            key=uuid.uuid4().hex if known is None else known.key,
            pid=os.getpid(),
            name=limiter.name if parent is None else limiter.name.rpartition("/")[2],
            limits=limiter.limits,
            terms=terms_of(limiter),
            parent=None if parent is None else self._issue_locked(parent),
        )
        self.limiters[passport.key] = limiter
        return passport

    def resolve(self, passport: Passport) -> tuple[Limiter, bool]:
        """Return the limiter that ``passport`` stands for here, and whether it was just made."""
        with self.lock:
            return self._resolve_locked(passport)

    def _resolve_locked(self, passport: Passport) -> tuple[Limiter, bool]:
        pid = os.getpid()
        limiter = self.limiters.get(passport.key) if passport.pid == pid else None
        limiter = limiter or self.remade.get((pid, passport.key))
        if limiter is not None:
            return limiter, False
        if passport.parent is None:
            limiter = Limiter(*passport.limits, name=passport.name, **passport.terms)
        else:
            parent, _ = self._resolve_locked(passport.parent)
            make = parent.key if passport.name.startswith("*") else parent.child
            limiter = make(passport.name, *passport.limits, **passport.terms)
        self.remade[pid, passport.key] = limiter
        return limiter, True


def is_shared(limiter: Limiter) -> bool:
    """Tell whether other processes share the limits of ``limiter``."""
    *_, root = levels(limiter)
    return "store" in terms_of(root)
