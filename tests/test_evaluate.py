import json

import numpy as np
import pytest
from flax import nnx

from clip_jax.config import load_config, model_config
from clip_jax.errors import UserError
from clip_jax.evaluate import (
    Emoji,
    Encoder,
    classification_metrics,
    evaluate_emoji,
    format_table,
    load_emoji,
    ranks,
    retrieval_metrics,
    write_results,
    zero_shot_classifier,
)
from clip_jax.models import CLIP


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> CLIP:
    return CLIP(model_config(load_config("configs/emoji.py")), rngs=nnx.Rngs(0))


def test_ranks_count_those_that_score_as_high_or_higher():
    similarity = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]], np.float32)
    assert ranks(similarity, np.array([0, 2, 1])).tolist() == [0, 2, 2]


def test_a_collapsed_model_scores_nothing():
    same = unit(np.ones((20, 8)))
    assert classification_metrics(same, same, np.arange(20))["acc1"] == 0
    assert retrieval_metrics(same, same)["image_retrieval_recall@1"] == 0


def test_metrics_by_hand():
    classes = unit(np.eye(8))
    images = unit(np.eye(8)[[0, 1, 2, 3]] + 0.9 * np.eye(8)[[1, 1, 0, 7]])
    metrics = classification_metrics(images, classes, np.array([0, 1, 0, 6]))
    # Right; right; second; not among the two that score, but before some of the six that tie at zero.
    assert metrics["acc1"] == 0.5 and metrics["acc5"] == 0.75
    assert metrics["acc1_chance"] == 1 / 8 and metrics["acc5_chance"] == 5 / 8


def test_retrieval_looks_in_both_directions():
    images, texts = unit(np.eye(4)), unit(np.eye(4)[[1, 0, 2, 3]])
    metrics = retrieval_metrics(images, texts)
    assert metrics["image_retrieval_recall@1"] == metrics["text_retrieval_recall@1"] == 0.5
    skewed = unit(np.array([[1, 0.1], [1, 0.2]]))
    metrics = retrieval_metrics(skewed, unit(np.array([[1.0, 0.0], [0.0, 1.0]])))
    assert (metrics["text_retrieval_recall@1"], metrics["image_retrieval_recall@1"]) == (0.5, 1.0)


def test_classifier_averages_normalised_prompts(model):
    encoder = Encoder(model)
    classifier = zero_shot_classifier(encoder, ["dog", "cat"], ("{}", "a picture of {}"))
    prompts = encoder.texts(["dog", "a picture of dog", "cat", "a picture of cat"])
    np.testing.assert_allclose(np.linalg.norm(prompts, axis=1), 1, atol=1.8e-7)  # measured 6e-8
    expected = unit(np.stack([prompts[:2].mean(0), prompts[2:].mean(0)]))
    np.testing.assert_allclose(classifier, expected, atol=4.5e-8)  # measured 1.5e-8 of values up to 0.17


def test_padding_a_batch_changes_no_feature(model):
    encoder, emoji = Encoder(model), load_emoji()
    few = encoder.images(emoji.pictures[:3])
    many = encoder.images(emoji.pictures[:300])
    assert few.shape == (3, 256) and many.shape == (300, 256)
    np.testing.assert_allclose(few, many[:3], atol=3e-8)  # measured 0 of values up to 0.19


def test_an_untrained_model_is_at_chance(model):
    records = evaluate_emoji(model, "random")
    assert [(r["dataset"], r["task"]) for r in records] == [
        ("emoji_fluent", "zeroshot_classification"),
        ("emoji_held_out", "zeroshot_retrieval"),
    ]
    assert all(set(r) == {"dataset", "model", "pretrained", "task", "metrics", "language"} for r in records)
    metrics = records[0]["metrics"] | records[1]["metrics"]
    for name in ("acc1", "acc5", "text_retrieval_recall@1", "image_retrieval_recall@10"):
        chance, count = metrics[f"{name}_chance"], 1595 if name.startswith("acc") else 150
        assert metrics[name] <= chance + 5 * (chance / count) ** 0.5
    table = format_table(records)
    assert "emoji_fluent    acc1" in table and "0.05%" in table and len(table.splitlines()) == 9


def test_other_pictures_can_be_measured(model):
    whole = load_emoji("noto_v1", "train")
    assert len(whole.pictures) == 1217
    part = Emoji(whole.pictures[:40], whole.labels[:40], np.arange(20), whole.class_names)
    assert evaluate_emoji(model, "random", part)[1]["metrics"]["text_retrieval_recall@10_chance"] == 0.5


def test_results_are_json_and_an_impossible_path_is_named(tmp_path):
    write_results(tmp_path / "a" / "r.json", [{"metrics": {}}])
    assert json.loads((tmp_path / "a" / "r.json").read_text()) == [{"metrics": {}}]
    with pytest.raises(UserError, match="cannot be written"):
        write_results(tmp_path / "a" / "r.json" / "b.json", [])
