"""URLs: what they lead to, what is refused, and that no password is ever shown."""

import traceback

import pytest

from asyncbucket import Limiter, StoreError
from asyncbucket.stores import LimitConfig, open_store, without_password
from asyncbucket.stores.redis import RedisStore


async def test_repr_and_errors_show_url_without_password() -> None:
    store = open_store("redis://user:s3cret@127.0.0.1:1/0?health_check_interval=0")
    assert "s3cret" not in repr(store)
    assert store.url == "redis://user:***@127.0.0.1:1/0"
    with pytest.raises(StoreError) as error:
        await store.open("x", LimitConfig())
    assert "cannot be reached" in str(error.value)
    assert "s3cret" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read") as wrong:
        open_store("redis+sentinel://:s3cret@host/mymaster")
    assert "s3cret" not in str(wrong.value)
    for url in ("redis://:s3[cret@host/0", "redis://:s3\uff1acret@host/0"):
        with pytest.raises(ValueError, match=r"'redis://:\*\*\*@host/0' is not a URL") as wrong:
            open_store(url)
        assert "cret" not in str(wrong.value)
    assert without_password("unix:///run/redis.sock?db=1") == "unix:///run/redis.sock"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://s3cret@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:s3cret", "redis://:***"),
        ("redis://user:s3cret/0", "redis://user:***/0"),
        ("redis+cluster://a:1,b:s3cret", "redis+cluster://a:1,b:***"),
        ("redis+cluster://a:1,b:2", "redis+cluster://a:1,b:2"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://[::1]", "redis://[::1]"),
        ("sqlite:limits.db", "sqlite:limits.db"),
        ("sqlite:///a@b:c.db", "sqlite:///a@b:c.db"),
    ],
)
def test_misplaced_password_in_url_is_hidden_too(url: str, shown: str) -> None:
    assert without_password(url) == shown
    if "s3cret" in shown or "***" in shown.rpartition("@")[2]:
        with pytest.raises(ValueError, match=r"\*\*\*") as wrong:
            open_store(url)
        assert "s3cret" not in "".join(traceback.format_exception_only(wrong.value))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://127.0.0.1/production", "a database must be a number, not 'production': redis://"),
        ("redis://127.0.0.1/1/2", "a database must be a number, not '1/2'"),
        ("redis://127.0.0.1/0?timeout=5", "unexpected keyword argument 'timeout'"),
        ("redis://127.0.0.1:1,127.0.0.1:2/0", r"for several servers write redis\+cluster:// or"),
    ],
)
def test_meaningless_redis_url_is_refused_when_limiter_is_made(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^'redis://127.0.0.1[^?]*' cannot be read: .*{why}"):
        Limiter("10 RPM", store=url)


@pytest.mark.parametrize(
    "url",
    [
        "user:s3cret@host:6379/0",
        ":s3cret@host:6379",
        "redis:user:s3cret@host",
        *(f"redis://user:s3cret{sign}more@host:6379/0" for sign in "/#?"),
        "redis://user:1/s3cret@host:6379/0",
        "redis+sentinel://user:s3cret/more@host:1/main",
        "sqlite://user:s3cret@host/limits.db",
        "sqlite://host/limits.db?password=s3cret",
    ],
)
def test_malformed_url_is_refused_without_showing_password(url: str) -> None:
    with pytest.raises(ValueError) as wrong:
        open_store(url)
    assert "s3cret" not in str(wrong.value)


def test_error_explains_unescaped_character_in_password() -> None:
    with pytest.raises(ValueError, match="write special characters of a password as %2F for /"):
        open_store("redis://user:s3cret/more@host:6379/0")
    assert isinstance(open_store("redis://host:6379/0?client_name=me@here"), RedisStore)


def test_url_passed_instead_of_client_is_not_shown_in_error() -> None:
    with pytest.raises(TypeError, match=r"^a client must be .*, not a builtins\.str$"):
        RedisStore.of("redis://user:s3cret@host")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "redis+cluster://127.0.0.1:1",
            r"the store redis\+cluster://127\.0\.0\.1:1 cannot be reached: .*; see whether it runs",
        ),
        (
            "redis+sentinel://127.0.0.1:1/mymaster/0",
            r"cannot be reached: No master found for 'mymaster'; see whether the Sentinels run",
        ),
    ],
)
async def test_unreachable_cluster_or_sentinel_raises_store_error(url: str, message: str) -> None:
    store = open_store(url)
    with pytest.raises(StoreError, match=message) as error:
        await store.open("x", LimitConfig())
    assert "<redis." not in str(error.value)
    await store.aclose()
