"""A small SentencePiece vocabulary of each of SigLIP's kinds, in the files in which the real ones come."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

# Of each, the first is the likeliest; a word that is none of these is spelled.
WORDS = ("▁a", "▁dog", "▁cat", "▁red", "s", "▁photo", "▁of", "▁two", "▁square", "▁snow", "ing")
LETTERS = (*"▁abcdefghijklmnopqrstuvwxyz0123456789", "é", "ü", "狗", "€")
MARKS = {"siglip": ["<pad>", "</s>", "<unk>"], "siglip2": ["<pad>", "<eos>", "<bos>", "<unk>"]}


def write_vocabulary(folder: pathlib.Path, kind: str = "siglip") -> pathlib.Path:
    """Writes tokenizer.json and tokenizer_config.json; rows of SigLIP are filled with its end, of SigLIP 2 with <pad>."""
    marks = MARKS[kind]
    pieces = [(mark, 0.0) for mark in marks]
    pieces += [(word, -2.0 - 0.1 * i) for i, word in enumerate(WORDS)] + [(letter, -9.0) for letter in LETTERS]
    vocabulary = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=marks.index("<unk>"), byte_fallback=False))
    vocabulary.normalizer = normalizers.NFKC()
    vocabulary.pre_tokenizer, vocabulary.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    end = marks[1]
    vocabulary.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    vocabulary.add_special_tokens(marks)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.save(str(folder / "tokenizer.json"))
    padding = end if kind == "siglip" else "<pad>"
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": padding, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder / "tokenizer.json"
