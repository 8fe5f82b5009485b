import importlib.util
import json
import random
import socket
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import llama_index.core
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from asyncbucket.llama_index import tokens
from asyncbucket.llama_index.tokens import bundled_tokenizer, by_characters, count

CACHE = Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"

TEXTS = {
    "prose": (
        "It is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of a wife. However little known the feelings or views of such a "
        "man may be on his first entering a neighbourhood, this truth is so well fixed."
    ),
    "code": Path(tokens.__file__).read_text("utf-8"),
    "json": json.dumps(
        [
            {"type": "function", "name": f"get_weather_{n}", "parameters": {"city": "a city"}}
            for n in range(9)
        ]
    ),
    "german": (
        "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft "
        "und Gewissen begabt und sollen einander im Geiste der Brüderlichkeit begegnen."
    ),
    "polish": (
        "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni "
        "obdarzeni rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa."
    ),
    "hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון.",
    "arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا.",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "chinese": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "emoji": "🚀🎉😀👍🏽❤️🔥 launch today 🎂🥳",
}


@pytest.fixture(name="reference", scope="module")
def load_reference() -> Iterator[tiktoken.Encoding]:
    """Load tiktoken's own cl100k_base from the same file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        yield tiktoken.get_encoding("cl100k_base")


def test_bundled_tokenizer_is_cl100k_base(reference: tiktoken.Encoding) -> None:
    """Every token is the same as in tiktoken's own encoding of that name."""
    encode = bundled_tokenizer()
    assert encode is not None
    for text in TEXTS.values():
        assert encode(text) == reference.encode_ordinary(text)


@given(text=st.text(max_size=300))
def test_bundled_tokenizer_takes_any_text(reference: tiktoken.Encoding, text: str) -> None:
    """All text is counted, and special tokens count as the characters they consist of."""
    encode = bundled_tokenizer()
    assert encode is not None
    assert encode(f"{text}<|endoftext|>\ud800") == reference.encode_ordinary(
        f"{text}<|endoftext|>\ud800"
    )


def test_bundled_tokenizer_never_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It does not matter if the user's cache folder, where tiktoken would download, is empty."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", None)
    monkeypatch.setattr(socket.socket, "connect", None)

    assert tokens.bundled_tokenizer.__wrapped__() is not None
    assert list(tmp_path.iterdir()) == []


def test_bundled_tokenizer_leaves_llama_indexs_global_alone() -> None:
    """The application's tokenizer, set or not, stays as it is."""
    before = llama_index.core.global_tokenizer
    _ = tokens.bundled_tokenizer.__wrapped__()

    assert llama_index.core.global_tokenizer is before


@pytest.mark.parametrize("content", [None, b"", b"no ranks at all", b"AA== x\n"])
def test_missing_or_broken_encoding_file_gives_no_tokenizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    """If llama_index.core has no such file, or a broken one, no call fails."""
    if content is not None:
        folder = tmp_path / "_static" / "tiktoken_cache"
        folder.mkdir(parents=True)
        for name in (file.name for file in CACHE.iterdir()):
            _ = (folder / name).write_bytes(content)
    spec = ModuleSpec("llama_index.core", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]

    def find_spec(name: str) -> ModuleSpec:
        assert name == spec.name
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    assert tokens.bundled_tokenizer.__wrapped__() is None


@pytest.mark.parametrize("name", TEXTS)
def test_estimate_by_characters_fits_every_script(name: str, reference: tiktoken.Encoding) -> None:
    """Without a tokenizer the count is 0.7 to 1.4 times the true one, in any script."""
    text = TEXTS[name]

    assert 0.7 <= by_characters(text) / len(reference.encode_ordinary(text)) <= 1.4


def test_estimate_by_characters_handles_empty_text_and_surrogates() -> None:
    """An empty text counts 0, and even half a surrogate pair counts something."""
    assert by_characters("") == 0
    assert by_characters("a") == 1
    assert by_characters("\ud800") > 0
    assert count(["a" * 35, "ü" * 11], None) == 10 + 10


@pytest.mark.parametrize("name", TEXTS)
def test_long_text_is_sampled_to_within_3_percent(name: str, reference: tiktoken.Encoding) -> None:
    """The estimate for a long text is within 3 %, though most of the text is not read."""
    text = TEXTS[name] * (200_000 // len(TEXTS[name]))
    encoded: list[int] = []

    def encode(text: str) -> list[int]:
        encoded.append(len(text))
        return reference.encode_ordinary(text)

    estimated = count([text], encode)
    assert sum(encoded) == 16_000
    assert estimated == pytest.approx(len(reference.encode_ordinary(text)), rel=0.03)


def test_samples_are_spread_over_all_texts(reference: tiktoken.Encoding) -> None:
    """Many texts of different kinds are sampled as one text."""
    texts = [TEXTS[random.Random(n).choice(list(TEXTS))] for n in range(3000)]
    exact = sum(len(reference.encode_ordinary(text)) for text in texts)

    assert count(texts, bundled_tokenizer()) == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("length", [tokens.MAX_EXACT_CHARACTERS, tokens.MAX_EXACT_CHARACTERS + 1])
def test_count_reads_every_character_up_to_documented_length(length: int) -> None:
    """Up to `MAX_EXACT_CHARACTERS` characters in all texts together, every character is read."""
    encoded: list[int] = []

    def encode(text: str) -> str:
        encoded.append(len(text))
        return text

    half = length // 2
    _ = count(["a" * half, "", "b" * (length - half)], encode)

    assert (sum(encoded) == length) == (length == tokens.MAX_EXACT_CHARACTERS)


@pytest.mark.real_clock
@pytest.mark.parametrize("text", ["a", " ", "word ", "我能吞下玻璃而不伤身体", "👩‍🚀🎉"])
@pytest.mark.parametrize("length", [tokens.MAX_EXACT_CHARACTERS, 5_000_000])
def test_counting_worst_case_text_stays_fast(text: str, length: int) -> None:
    """The worst and the longest texts take a few times as long as usual ones: milliseconds."""
    long = (text * (length // len(text) + 1))[:length]
    usual = ("some usual words of a text " * tokens.MAX_EXACT_CHARACTERS)[
        : tokens.MAX_EXACT_CHARACTERS
    ]
    encode = bundled_tokenizer()
    # A busy machine may spoil some.
    ratios = (_seconds_of([long], encode) / _seconds_of([usual], encode) for _ in range(20))

    assert any(ratio < 20 for ratio in ratios)


def _seconds_of(texts: list[str], encode: tokens.Tokenizer | None) -> float:
    started = time.perf_counter()
    _ = count(texts, encode)
    return time.perf_counter() - started
