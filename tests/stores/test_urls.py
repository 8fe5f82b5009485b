"""URLs: what they lead to, what is refused, and that no password is ever shown."""

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncbucket import Limiter
from asyncbucket.stores import open_store, without_password
from asyncbucket.stores.redis import RedisStore


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:s3cret@127.0.0.1:1/0?db=1", "redis://***@127.0.0.1:1/0"),
        ("redis://s3cret@host:6379/0", "redis://***@host:6379/0"),
        ("redis://user:s3://cret@host", "redis://***@host"),
        ("redis://:s3cret", "redis://***"),
        ("redis://user:s3cret/0", "redis://***"),
        ("s3cret:s3cret@host", "***@host"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://[::1]", "redis://[::1]"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("redis+sentinel://user:s3cret@a:1,b/main?x=1", "redis+sentinel://***@a:1,b/main"),
        ("sqlite:limits.db", "***"),
        ("sqlite:///a@b:c.db", "sqlite:///a@b:c.db"),
    ],
)
def test_url_is_shown_without_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgres://user:s3cret@host/db", r"'postgres://\*\*\*@host/db' is not a store: write"),
        ("user:s3cret@host:6379/0", "is not a store"),
        ("redis:user:s3cret@host", "is not a store"),
        (
            "redis+sentinel://host:1",
            "cannot be read: name the service: redis.sentinel://host:26379,",
        ),
        ("redis+else://host:1/main", "is not a store"),
        ("redis://:s3[cret@host/0", r"'redis://\*\*\*@host/0' cannot be read"),
        ("redis://:s3\uff1acret@host/0", r"\*\*\*@host/0' cannot be read"),
        ("redis://:s3cret", r"\*\*\*.* cannot be read"),
        ("redis://user:s3cret/more@host:6379/0", "special characters of a password as %2F for /"),
        ("rediss://127.0.0.1?ssl_cert_reqs=no", "cannot be read: Invalid SSL Certificate"),
        ("redis://127.0.0.1/production", "cannot be read: write redis://user:password@host:6379/0"),
        (
            "redis://127.0.0.1/0?timeout=5",
            "cannot be read: .*unexpected keyword argument 'timeout'",
        ),
        (
            "sqlite://user:s3cret@host/limits.db",
            "names no file .* share: write sqlite:///limits.db",
        ),
        ("sqlite:///", "names no file"),
        ("sqlite:///limits.db?mode=ro&patience=1", "sets mode: only patience can be set"),
        ("sqlite:///limits.db?patience=soon", "patience must be a positive number of seconds"),
        ("sqlite:///limits.db?patience=0", "patience must be a positive number of seconds"),
    ],
)
def test_unusable_url_is_refused_at_once_and_shows_no_password(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as wrong:
        Limiter("10 RPM", store=url)
    assert "cret" not in str(wrong.value)


def test_what_is_no_url_is_refused_and_not_shown() -> None:
    stores: Any = (Path("limits.db"), Redis())
    for store, kind in zip(stores, ("PosixPath", "Redis"), strict=True):
        with pytest.raises(TypeError, match=rf"URL such as .*RedisStore.of\(client\), not {kind}$"):
            Limiter(store=store)
    with pytest.raises(TypeError, match=r"^a client must be .*, not a str$"):
        RedisStore.of("redis://user:s3cret@host")


async def test_url_scheme_selects_redis_store() -> None:
    hosts = (f"{scheme}://127.0.0.1" for scheme in ("redis", "rediss", "valkey", "valkeys"))
    for url in (*hosts, "redis://host:6379/0?client_name=me@here", "unix:///run/valkey.sock"):
        store = open_store(url)
        assert isinstance(store, RedisStore)
        assert store.url.startswith(url.partition("://")[0])


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:////var/limits.db", "/var/limits.db"),
        ("sqlite:///a%20b%3F.db?patience=2", "a b?.db"),
    ],
)
def test_sqlite_url_leads_to_the_same_file(
    url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(url)
    monkeypatch.chdir("/")
    assert repr(store) == f"<SQLiteStore {tmp_path / path}>"
    again = open_store(store.url)
    assert (repr(again), again.url) == (repr(store), store.url)
