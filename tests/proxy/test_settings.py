"""What a proxy is told, in a file and on the command line."""

import textwrap
from pathlib import Path
from typing import Any

import pytest

from asyncbucket import Limit
from asyncbucket.cli.proxy import ProxyOptions
from asyncbucket.cli.proxy.app import Proxy

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
retries = 2
"""


def read(tmp_path: Path, text: str, **typed: Any) -> ProxyOptions:
    """Read a file, with typed options over it."""
    file = tmp_path / "proxy.toml"
    file.write_text(text)
    return ProxyOptions(config=file, **typed)


def test_file_says_all_and_typed_options_override_it(tmp_path: Path) -> None:
    options = read(tmp_path, FILE, rpm=60, also=["10k RPD"], status="4290")
    assert set(options.limits) == {
        Limit("requests", 60, per=60),
        Limit("tokens", 200_000, per=60),
        Limit("requests", 10_000, per=86_400),
    }
    assert options.terms == {"concurrency": "auto", "name": "api.openai.com"}
    assert options.addresses == (("::1", 9000), ("127.0.0.1", 4290))
    assert (options.tenants_by_key, options.key, options.retries) == (True, None, 2)
    other = read(tmp_path, FILE.replace("retries = 2", "retries = 0"), listen="9001", concurrency=5)
    assert (other.addresses[0], other.terms["concurrency"]) == (("127.0.0.1", 9001), 5)
    assert other.retries == 0


def test_without_a_file_or_limits_the_options_suffice() -> None:
    found = ProxyOptions(upstream="http://gpu:8000/api")
    with pytest.raises(ValueError, match=r"cache must be .count. or .lead., not 'both'"):
        Proxy(ProxyOptions(upstream="http://gpu:8000", cache="both"))
    assert (found.limits, found.terms) == ((), {"name": "gpu"})
    assert found.addresses == (("127.0.0.1", 4295), ("127.0.0.1", 4294))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[proxy]", "say where calls go: --upstream https://api.openai.com"),
        ("rpm = 5", r"must have the tables \[asyncbucket\], .* and \[proxy\].*has rpm"),
        (FILE.replace("listen", "listne"), r"\[proxy\] has no entry 'listne'; known: upstream, po"),
        (FILE.replace("rpm", "rmp"), r"entry 'rmp' of .*proxy.toml, \[asyncbucket\] is not known"),
        (FILE.replace("https:", "ftp:"), "upstream must begin with http:// or https://"),
        (FILE.replace("//api", "//me:secret@api"), "upstream must be .* URL without a key"),
        (FILE.replace("= 2", '= "2"'), "retries must be a whole number, not '2'"),
        (FILE.replace("= true", '= "yes"'), "tenants_by_key must be true or false, not 'yes'"),
        (FILE + 'key_env = "sk-secret"', "key_env must name an environment variable that holds"),
        (FILE + 'status = "9000"', "listen and status are both at port 9000: change one"),
        (FILE.replace("[::1]:9000", "here"), "'here' is not an address to listen at, such as 4295"),
        (FILE.replace("upstream", "pool"), "500 req.*, concurrency cannot go with a pool: write"),
    ],
)
def test_mistakes_are_named_at_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
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
    assert options.key == "sk-any"
    assert "sk-any" not in repr(options)
