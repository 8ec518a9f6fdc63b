import gzip
import html
import json
import pathlib
import re

import ftfy
import numpy as np
import pytest

import clip_jax
from clip_jax import tokenizer
from clip_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tokens.jsonl.gz"


def test_every_golden_string_has_openais_ids():
    cases = [json.loads(line) for line in gzip.decompress(GOLDEN.read_bytes()).splitlines()]
    assert len(cases) > 5000
    wrong = [(text, ids, tokenizer.encode(text)) for text, ids in cases if tokenizer.encode(text) != ids]
    assert not wrong, f"{len(wrong)} of {len(cases)} differ, first (text, expected, found): {wrong[0]}"


def test_the_path_for_plain_ascii_changes_nothing():
    # `clean` skips ftfy for these; the golden file holds OpenAI's ids for both kinds of text.
    cases = [text for text, _ in map(json.loads, gzip.decompress(GOLDEN.read_bytes()).splitlines())]
    plain = [text for text in cases if tokenizer._is_plain(text)]
    assert 1000 < len(plain) < len(cases) - 1000
    for text in ["salt & pepper", "this &", "  A  b ", *plain]:
        whole = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert tokenizer._is_plain(text) and tokenizer.clean(text) == re.sub(r"\s+", " ", whole).strip().lower()
    assert not any(map(tokenizer._is_plain, ["AT&amp;T", "&lt;", "&#38;", "&copy 2020"]))


def test_rows_are_start_text_end_and_zeros():
    tokens = clip_jax.tokenize(["a diagram", "a dog"])
    assert tokens.shape == (2, 77) and tokens.dtype == np.int32
    assert tokens[0, :5].tolist() == [49406, 320, 22697, 49407, 0]  # the ids in openai/CLIP's notebook
    assert not tokens[:, 4:].any()


def test_one_text_is_a_batch_of_one():
    assert clip_jax.tokenize("a dog", context_length=8).tolist() == clip_jax.tokenize(["a dog"], context_length=8).tolist()


def test_a_long_text_is_refused_with_its_length_or_cut_with_its_end():
    with pytest.raises(UserError, match=r"102 tokens, expected at most 77"):
        clip_jax.tokenize("dog " * 100)
    tokens = clip_jax.tokenize("dog " * 100, truncate=True)[0]
    assert tokens[0] == 49406 and tokens[-1] == 49407 and (tokens[1:-1] == 1929).all()


def test_decode_undoes_encode():
    assert tokenizer.decode(tokenizer.encode("Hello,  naïve 東京!")) == "hello , naïve 東京 ! "
