"""How many tokens a text is, without a download and without holding up the event loop.

LlamaIndex's own `get_tokenizer` may download (if ``TIKTOKEN_CACHE_DIR`` is set), and a model's own
tokenizer may ask its provider over HTTP. So only the cl100k_base file inside llama_index.core is
used, read in 0.1 s once a process. OpenAI's newer o200k_base needs as many tokens for English and
code and fewer for anything else, so the estimate errs on the safe side.

Encoding takes 50 ns a character, for some texts 200 ns. Calls of more than `MAX_EXACT_CHARACTERS`
are counted by samples, so counting takes a millisecond or two at most, however long the text is. If
the file is missing, `by_characters` counts.
"""

import base64
import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Final, TypeAlias

Tokenizer: TypeAlias = Callable[[str], Sized]
"""LlamaIndex's notion of a tokenizer: it turns a text into tokens, of which only the number matters."""

MAX_EXACT_CHARACTERS: Final = 40_000
"""Calls of up to this many characters are encoded completely: 2 ms, at worst 8."""
_SAMPLE_COUNT: Final = 16
_SAMPLE_SIZE: Final = 1_000

_ASCII_CHARACTERS_PER_TOKEN: Final = 3.5
"""ASCII characters per token; English prose has 4.8, code 4.3, JSON 3.6, hashes 2.4."""
_OTHER_BYTES_PER_TOKEN: Final = 2.2
"""Bytes of other UTF-8 per token; Russian has 4, Chinese and Arabic 2.4, Greek 2, emoji 1.6."""

_ENCODING_URL: Final = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
_PATTERN: Final = (
    # From tiktoken_ext/openai_public.py; tests compare with tiktoken's own encoding.
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def count(texts: Sequence[str], tokenizer: Tokenizer | None) -> int:
    """Return how many tokens `texts` have together: exactly if they are short, else by samples.

    A sample is a slice; 16 of them, evenly spread over all texts, stand for the whole.
    """
    if tokenizer is None:
        return sum(map(by_characters, texts))
    length = sum(map(len, texts))
    if length <= MAX_EXACT_CHARACTERS:
        return sum(len(tokenizer(text)) for text in texts if text)
    whole = "".join(texts)
    step = (length - _SAMPLE_SIZE) / (_SAMPLE_COUNT - 1)
    starts = (round(step * number) for number in range(_SAMPLE_COUNT))
    tokens = sum(len(tokenizer(whole[start : start + _SAMPLE_SIZE])) for start in starts)
    return math.ceil(tokens * length / (_SAMPLE_COUNT * _SAMPLE_SIZE))


def by_characters(text: str) -> int:
    """Estimate a text's tokens from its characters; those other than ASCII count by their bytes.

    The result is 0.7 to 1.4 times cl100k_base for prose, code and JSON and in twenty languages, and
    1.7 times for Russian.
    """
    if text.isascii():
        return math.ceil(len(text) / _ASCII_CHARACTERS_PER_TOKEN)
    # Lone surrogates can't be encoded otherwise; they are three bytes as their neighbours are.
    size = len(text.encode("utf-8", "surrogatepass"))
    ascii_size = len(text.encode("ascii", "ignore"))
    return math.ceil(
        ascii_size / _ASCII_CHARACTERS_PER_TOKEN + (size - ascii_size) / _OTHER_BYTES_PER_TOKEN
    )


@functools.cache
def bundled_tokenizer() -> Tokenizer | None:
    """Return the encoder of the cl100k_base file inside llama_index.core, or None if there is none.

    It reads one file of 1.7 MB; it uses no network, no environment variable and no global state.
    """
    core = importlib.util.find_spec("llama_index.core")
    name = hashlib.sha1(_ENCODING_URL.encode(), usedforsecurity=False).hexdigest()
    folders = () if core is None else core.submodule_search_locations or ()
    for folder in folders:
        file = Path(folder, "_static", "tiktoken_cache", name)
        if file.is_file():
            return _encoder(file)
    return None


def _encoder(file: Path) -> Tokenizer | None:
    try:
        from tiktoken import Encoding

        lines = (line.split() for line in file.read_bytes().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        encoding = Encoding(
            "cl100k_base", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
    except (ImportError, OSError, ValueError):  # an estimate is no reason to fail
        return None
    return encoding.encode_ordinary
