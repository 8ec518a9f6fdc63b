"""Text to token ids: OpenAI's byte-level BPE, id for id.

The order of operations is OpenAI's (openai/CLIP `clip/simple_tokenizer.py`): mend the encoding,
undo HTML escapes, collapse white space, lower-case, split with a regular expression, and merge byte
pairs within each piece.

It is plain Python with a cache of words (benchmarks/tokenizer.py).  The Rust `tokenizers` library, given the
same cleaned text, pattern and merges, took more than twice as long for the ASCII strings of
tests/golden/tokens.jsonl.gz, splits by Unicode tables of its own, and differed on 279 of 3,977 golden
strings, all of them with a special token written out.
"""

import functools
import gzip
import hashlib
import html
import importlib.resources
import json
from collections.abc import Callable

import ftfy
import numpy as np
import regex
from jaxtyping import Int32

from clip_jax.errors import UserError

Tokenizer = Callable[..., Int32[np.ndarray, "B T"]]  # (texts, truncate=False)

CONTEXT_LENGTH = 77
VOCABULARY_SIZE = 49408
START_OF_TEXT = 49406
END_OF_TEXT = 49407

# The vocabulary file holds more merges than CLIP uses: 256 bytes, each also as the end of a word,
# and two special tokens leave room for 48,894 of them.
_MERGES = slice(1, VOCABULARY_SIZE - 256 - 256 - 2 + 1)

_SPECIAL = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}

# IGNORECASE matters although the text is lower case: it lets the long s (U+017F) match `'s`.
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_SPACES = regex.compile(r"\s+")
_ESCAPE = regex.compile(r"&[^ ]")  # the start of one, or of nothing


def tokenize(
    texts: str | list[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> Int32[np.ndarray, "B T"]:
    """Token ids of each text, as the text tower takes them: SOT, the text, EOT, then zeros.

    Args:
      texts: one text, or several.
      context_length: T, the length of every row.
      truncate: cut a text that is too long; its last id is then EOT.

    Raises:
      UserError: a text is too long and `truncate` is false.
    """
    texts = [texts] if isinstance(texts, str) else texts
    tokens = np.zeros((len(texts), context_length), np.int32)
    for row, text in zip(tokens, texts):
        ids = [START_OF_TEXT, *encode(text), END_OF_TEXT]
        if len(ids) > context_length:
            if not truncate:
                raise UserError(
                    f"text of {len(ids)} tokens, expected at most {context_length} with both ends: "
                    f"{text[:60]!r}; shorten it, or pass truncate=True"
                )
            ids = [*ids[: context_length - 1], END_OF_TEXT]
        row[: len(ids)] = ids
    return tokens


def encode(text: str) -> list[int]:
    """The ids of a text of any length, without SOT and EOT."""
    ids = []
    for word in clean(text).split(" "):
        ids += _word_ids(word)
    return ids


def decode(ids: list[int]) -> str:
    """The cleaned text of these ids; bytes that are not UTF-8 become U+FFFD."""
    characters = "".join(_vocabulary()[1][i] for i in ids)
    to_byte = {c: b for b, c in _byte_characters().items()}
    text = bytearray(to_byte[c] for c in characters).decode("utf-8", errors="replace")
    return text.replace("</w>", " ")


def clean(text: str) -> str:
    """Mended, with single spaces, in lower case."""
    if _is_plain(text):
        return " ".join(text.lower().split())
    return _SPACES.sub(" ", mend(text).strip()).strip().lower()


def mend(text: str) -> str:
    """Encoding errors undone, and HTML escapes, twice."""
    if _is_plain(text):
        return text
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _is_plain(text: str) -> bool:
    """Whether there is nothing to mend: printable ASCII without an escape.  Mending is most of the cost."""
    return text.isascii() and text.isprintable() and ("&" not in text or not _ESCAPE.search(text))


@functools.lru_cache(maxsize=2**17)
def _word_ids(word: str) -> tuple[int, ...]:
    """Those of what stands between two spaces: no piece goes beyond."""
    return tuple(i for piece in _PIECES.findall(word) for i in _piece_ids(piece))


def _piece_ids(piece: str) -> tuple[int, ...]:
    """Merges the byte pairs of one piece, lowest rank first."""
    if piece in _SPECIAL:
        return (_SPECIAL[piece],)
    ids, _ = _vocabulary()
    ranks = _merge_ranks()
    characters = _byte_characters()
    word = [characters[b] for b in piece.encode("utf-8")]
    word[-1] += "</w>"
    while len(word) > 1:
        pairs = list(zip(word, word[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(word):
            if i + 1 < len(word) and (word[i], word[i + 1]) == best:
                merged.append(word[i] + word[i + 1])
                i += 2
            else:
                merged.append(word[i])
                i += 1
        word = merged
    return tuple(ids[part] for part in word)


@functools.cache
def _byte_characters() -> dict[int, str]:
    """Each byte as a printable character; those that are not printable move to 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(moved)}


@functools.cache
def _merge_ranks() -> dict[tuple[str, str], int]:
    file = importlib.resources.files("clip_jax") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[_MERGES]
    return {tuple(line.split()): rank for rank, line in enumerate(lines)}


@functools.cache
def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """Ids by token, and tokens by id: bytes, bytes that end a word, merges, special tokens."""
    characters = list(_byte_characters().values())
    tokens = [*characters, *(c + "</w>" for c in characters)]
    tokens += ["".join(pair) for pair in _merge_ranks()] + list(_SPECIAL)
    return {token: i for i, token in enumerate(tokens)}, tokens


@functools.cache
def vocabulary_sha256() -> str:
    """The SHA-256 of the vocabulary: its tokens in the order of their ids, one a line."""
    return hashlib.sha256("\n".join(_vocabulary()[1]).encode()).hexdigest()


def hf_tokenizer_files(context_length: int) -> dict[str, str]:
    """This tokenizer as transformers' CLIPTokenizer reads it: its files, by name."""
    ids, _ = _vocabulary()
    start, end = _SPECIAL
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "do_lower_case": True,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    return {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, _merge_ranks()), ""]),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
