"""Text to token ids for SigLIP and SigLIP 2: canonical text, then the SentencePiece vocabulary beside the weights.

The vocabularies (32,000 pieces of English C4, 250,000 of mC4, Gemma's 256,000) are read from the `tokenizer.json` that
comes with the weights, through the `tokenizers` library.  Text is made canonical as open_clip does for all of them
(open_clip `tokenizer.py:canonicalize_text`, after big_vision): no punctuation, single spaces, lower case.
"""

import dataclasses
import pathlib
import string

import numpy as np
import tokenizers
from jaxtyping import Int32

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.tokenizer import mend

# What ends a text, and what fills a row.
MARKS = {"siglip": ("</s>", "</s>"), "siglip-i18n": ("</s>", "</s>"), "siglip2": ("<eos>", "<pad>")}

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


@dataclasses.dataclass(frozen=True)
class SigLIPTokenizer:
    """Texts to rows of one length: the text, an end, padding."""

    vocabulary: tokenizers.Tokenizer
    end: int
    padding: int
    context_length: int

    @classmethod
    def read(cls, file: pathlib.Path, config: CLIPConfig) -> "SigLIPTokenizer":
        """From a `tokenizer.json`, which has to fit the model."""
        try:
            vocabulary = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library has no narrower one
            raise UserError(f"{file}: not a tokenizer ({str(error).splitlines()[0]}); copy or download it again") from error
        marks = MARKS[config.tokenizer]
        end, padding = map(vocabulary.token_to_id, marks)
        size, expected = vocabulary.get_vocab_size(with_added_tokens=False), config.text.vocabulary_size
        if end is None or padding is None or size > expected:
            raise UserError(
                f"{file}: not the tokenizer of {config.name}: expected {' and '.join(dict.fromkeys(marks))} in it and at most "
                f"{expected:,} pieces, found {size:,}; copy the one that belongs to the weights"
            )
        vocabulary.no_padding(), vocabulary.no_truncation()
        return cls(vocabulary, end, padding, config.text.context_length)

    def __call__(self, texts: str | list[str], truncate: bool = False) -> Int32[np.ndarray, "B T"]:
        """Token ids of each text, as the text tower takes them.

        Raises:
          UserError: a text is too long and `truncate` is false.
        """
        texts = [texts] if isinstance(texts, str) else texts
        tokens = np.full((len(texts), self.context_length), self.padding, np.int32)
        pieces = self.vocabulary.encode_batch([canonicalize(text) for text in texts], add_special_tokens=False)
        for row, text, encoded in zip(tokens, texts, pieces):
            ids = encoded.ids
            if len(ids) >= self.context_length:
                if not truncate:
                    raise UserError(
                        f"text of {len(ids) + 1} tokens, expected at most {self.context_length} with the end: "
                        f"{text[:60]!r}; shorten it, or pass truncate=True"
                    )
                ids = ids[: self.context_length - 1]
            row[: len(ids)], row[len(ids)] = ids, self.end
        return tokens


def canonicalize(text: str) -> str:
    """Mended, without punctuation, with single spaces, in lower case."""
    return " ".join(mend(text).translate(_NO_PUNCTUATION).lower().split())
