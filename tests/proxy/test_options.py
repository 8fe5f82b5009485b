"""What a proxy is told, in a file and on the command line."""

import textwrap
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limit, LimitSyntaxError
from asyncbucket.proxy.options import Address, ProxyOptions, read_options

EXAMPLES = Path(__file__).parents[2] / "examples" / "proxy"
FILE = """
[asyncbucket]
rpm = 500
tpm = "200k"
concurrency = "auto"

[proxy]
upstream = "https://api.openai.com"
listen = "[::1]:9000"
tenants_by_key = true
"""


def read(tmp_path: Path, text: str, **given: Any) -> ProxyOptions:
    """Read a file, with options and arguments of the limiter over it."""
    file = tmp_path / "proxy.toml"
    file.write_text(text)
    return read_options(file, **given)


def test_file_says_all_and_options_override_it(tmp_path: Path) -> None:
    options = read(tmp_path, FILE, rpm=60, limits=["10k RPD"], listen=None)

    assert set(options.limits) == {
        Limit("requests", 60, per=60),
        Limit("tokens", 200_000, per=60),
        Limit("requests", 10_000, per=86_400),
    }
    assert options.terms == {"concurrency": "auto", "name": "api.openai.com"}
    address = Address.read(options.listen)
    assert address == Address("::1", 9000)
    assert (address.is_local, options.tenants_by_key, options.key) == (True, True, None)


def test_without_a_file_or_limits_the_options_suffice() -> None:
    found = read_options(upstream="http://gpu:8000/api", profile=None, rpm=None, store=None)

    assert found == ProxyOptions(upstream="http://gpu:8000/api", terms={"name": "gpu"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[proxy]", "say where calls go: --upstream https://api.openai.com"),
        (
            "rpm = 5",
            r"must have the tables \[asyncbucket\], for the limits, and \[proxy\].*has rpm",
        ),
        ("[proxy", "proxy.toml is not valid TOML"),
        (FILE.replace("listen", "listne"), r"\[proxy\] has no entry 'listne'; known: upstream, po"),
        (FILE.replace("rpm", "rmp"), r"entry 'rmp' of .*proxy.toml, \[asyncbucket\] is not known"),
        (
            FILE.replace("https://api.openai.com", "api.openai.com"),
            "upstream must be the provider's URL",
        ),
        (
            FILE.replace("//api", "//me:secret@api"),
            "upstream must be the provider's URL without a key",
        ),
        (FILE.replace("= true", '= "yes"'), "tenants_by_key must be true or false, not 'yes'"),
        (FILE + "key_env = 5", "key_env must be a string, not 5"),
        (FILE + 'key_env = "sk-secret"', "key_env must name an environment variable that holds"),
        (FILE + 'key_env = "BAD_KEY"', "key_env must name an environment variable that holds"),
        (FILE + 'status = "9000"', "listen and status are both at port 9000: change one"),
        (FILE.replace("[::1]:9000", "here"), "'here' is not an address to listen at, such as 4295"),
    ],
)
def test_mistakes_are_named_at_once(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_KEY", "sk-secret\nX-Other: 1")
    with pytest.raises((ValueError, LimitSyntaxError), match=message) as error:
        read(tmp_path, text)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["proxy.toml", "sidecar.yaml"])
def test_examples_can_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-any")
    text = (EXAMPLES / name).read_text("utf-8")
    if name == "sidecar.yaml":
        text = textwrap.dedent(text.partition("proxy.toml: |\n")[2].partition("---\n")[0])
    options = read(tmp_path, text)

    assert (options.upstream, options.terms["concurrency"]) == ("https://api.openai.com", 32)
    assert len(options.limits) >= 2


def test_key_is_in_no_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REAL_KEY", "sk-secret")
    options = ProxyOptions(upstream="https://api.openai.com", key_env="REAL_KEY")

    assert options.key == "sk-secret"
    assert "secret" not in repr(options)


def test_reload_tells_what_needs_a_restart(tmp_path: Path) -> None:
    before = read(tmp_path, FILE, store="sqlite:///a.db")
    shorter = FILE.replace('tpm = "200k"\nconcurrency = "auto"\n', "")
    after = read(tmp_path, shorter, listen="9001")

    gone = ["listen", "concurrency", "store", "200,000 tokens per 60 s"]
    assert before.restarts(after) == gone
    assert read(tmp_path, FILE).restarts(read(tmp_path, FILE, concurrency=5)) == []
