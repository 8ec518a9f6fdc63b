import dataclasses

import numpy as np
import pytest
from vocabulary import write_vocabulary
from weights import SMALL, rich_weights

import clip_jax
from clip_jax import convert
from clip_jax.errors import UserError
from clip_jax.evaluation.encoder import Encoder
from clip_jax.siglip_tokenizer import SigLIPTokenizer, canonicalize

SIGLIP = SMALL["siglip"]


def test_text_is_canonical():
    assert canonicalize("  A_Dog's   caf\u00c3\u00a9, (2) &amp; more! ") == "a dogs café 2 more"


@pytest.mark.parametrize("kind, padding", [("siglip", 1), ("siglip2", 0)])
def test_rows_are_text_end_and_padding(kind, padding, tmp_path):
    config = dataclasses.replace(SIGLIP, tokenizer=kind)
    tokenizer = SigLIPTokenizer.read(write_vocabulary(tmp_path, kind), config)
    tokens = tokenizer(["A dog!", "two cats"])
    words = [tokenizer.vocabulary.id_to_token(i) for i in tokens[1]]
    assert tokens.shape == (2, 16) and tokens.dtype == np.int32
    assert words[:4] == ["▁two", "▁cat", "s", {"siglip": "</s>", "siglip2": "<eos>"}[kind]]
    assert (tokens[0, :2] == [len({"siglip": "123", "siglip2": "1234"}[kind]), tokens[0, 0] + 1]).all()
    assert tokens[0, 2] == 1 and (tokens[0, 3:] == padding).all()
    assert (tokenizer("A dog!") == tokens[:1]).all()


def test_a_long_text_is_refused_or_cut_and_keeps_its_end(tmp_path):
    tokenizer = SigLIPTokenizer.read(write_vocabulary(tmp_path), SIGLIP)
    assert tokenizer("dog " * 15)[0, -1] == 1
    with pytest.raises(UserError, match=r"text of 17 tokens, expected at most 16 with the end: 'dog dog"):
        tokenizer("dog " * 16)
    tokens = tokenizer("dog " * 16, truncate=True)[0]
    assert (tokens == tokenizer("dog " * 15)[0]).all()


def test_a_vocabulary_that_is_not_the_models_is_refused(tmp_path):
    file = write_vocabulary(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.json: not the tokenizer of small-siglip: expected <eos> and <pad> in it"):
        SigLIPTokenizer.read(file, dataclasses.replace(SIGLIP, tokenizer="siglip2"))
    smaller = dataclasses.replace(SIGLIP, text=dataclasses.replace(SIGLIP.text, vocabulary_size=50))
    with pytest.raises(UserError, match=r"expected </s> in it and at most 50 pieces, found 55; copy the one"):
        SigLIPTokenizer.read(file, smaller)
    file.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer \(.*\); copy or download it again"):
        SigLIPTokenizer.read(file, SIGLIP)


def test_the_vocabulary_travels_with_the_weights(tmp_path):
    convert.write("hf", SIGLIP, rich_weights(SIGLIP), tmp_path / "theirs")
    write_vocabulary(tmp_path / "theirs")
    convert.main([str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "orbax"])
    convert.main([str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "hf"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    texts = ["a dog", "a photo of two cats"]
    tokens = [clip_jax.get_tokenizer(tmp_path / place)(texts) for place in ("theirs", "ours", "ours/checkpoints/0", "again")]
    assert all((found == tokens[0]).all() for found in tokens)
    # An encoder without it takes pictures alone.
    model, _ = clip_jax.load(tmp_path / "ours")
    with pytest.raises(UserError, match=r"custom: its vocabulary comes with its weights; pass tokenizer="):
        Encoder(model, 2).texts(texts)
    features = Encoder(model, 2, clip_jax.get_tokenizer(tmp_path / "ours")).texts(texts)
    expected = np.asarray(model.encode_text(tokens[0], normalize=True))
    np.testing.assert_allclose(features, expected, atol=4e-7)  # measured 1.3e-7 of values up to 0.24


def test_weights_are_converted_without_a_vocabulary_too(tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    convert.write("hf", SIGLIP, rich_weights(SIGLIP), tmp_path / "theirs")
    convert.main([str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "orbax"])
    said = capsys.readouterr().err
    assert "will be without its vocabulary" in said and "run `hf download timm/ViT-B-16-SigLIP`" in said
    with pytest.raises(UserError, match=r"^\S+ours/tokenizer.json: cannot get timm/ViT-B-16-SigLIP from"):
        clip_jax.get_tokenizer(tmp_path / "ours")


def test_clips_tokenizer_is_made_for_its_length(tmp_path):
    convert.write("open_clip", SMALL["vit"], rich_weights(SMALL["vit"]), tmp_path / "vit")
    assert (clip_jax.get_tokenizer(tmp_path / "vit")(["a dog"]) == clip_jax.tokenize(["a dog"], 16)).all()
