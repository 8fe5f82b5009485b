"""A passport stands for a limiter in a pickle."""

import dataclasses
import pickle

from asyncbucket import Limiter
from asyncbucket.core.passports import Passport, Passports, is_shared


def elsewhere(passport: Passport) -> Passport:
    """Return the passport as it arrives in another process."""
    parent = None if passport.parent is None else elsewhere(passport.parent)
    return dataclasses.replace(through_pickle(passport), pid=-1, parent=parent)


def through_pickle(passport: Passport) -> Passport:
    """Return a pickled and unpickled passport."""
    found: Passport = pickle.loads(pickle.dumps(passport))  # noqa: S301 - our own
    return found


def test_passport_back_in_its_own_process_gives_same_limiter() -> None:
    """The same holds for a child."""
    known = Passports()
    limiter = Limiter(rpm=500, name="key")
    child = limiter.child("chat", tpm=1_000)

    for each in (limiter, child):
        assert known.resolve(through_pickle(known.issue(each))) == (each, False)


def test_passport_in_other_process_gives_limiter_with_same_terms_and_parent() -> None:
    """All passports of a tenant stand for the same one, and do not show its name."""
    home, away = Passports(), Passports()
    limiter = Limiter(rpm=500, concurrency=(2, 8), max_queue=7, timeout=3.0, name="key")
    child = limiter.child("chat", tpm=1_000, weight=2.0, priority=1)
    tenant = limiter.key("acme", rpm=10)

    chat, is_new = away.resolve(elsewhere(home.issue(child)))
    again, is_new_again = away.resolve(elsewhere(home.issue(child)))
    acme, _ = away.resolve(elsewhere(home.issue(tenant)))

    assert (is_new, is_new_again, again) == (True, False, chat)
    assert (chat.name, chat.limits) == ("key/chat", child.limits)
    assert chat.parent is not None
    assert acme.parent is chat.parent
    assert (chat.parent.limits, chat.parent.max_queue) == (limiter.limits, 7)
    assert home.issue(chat).terms == home.issue(child).terms
    assert acme.limits == tenant.limits
    assert "acme" not in acme.name
    assert not is_shared(acme)
