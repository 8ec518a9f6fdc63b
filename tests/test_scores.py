"""Zero-shot metrics: by hand, on any number of devices, and beside CLIP_benchmark's."""

import jax
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation.scores import ROWS, classification_metrics, ranks_of, retrieval_metrics, share
from clip_jax.sharding import data_mesh


def mesh(devices: int = 1) -> jax.sharding.Mesh:
    return data_mesh(jax.devices()[:devices])


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def features(count: int, seed: int, width: int = 16) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((count, width)))


def classified(images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    ranks = ranks_of(images, classes, labels, np.arange(len(classes)), mesh(), first_wins=True)
    return classification_metrics(ranks, labels, len(classes))


def test_a_collapsed_model_scores_nothing():
    same, own = unit(np.ones((20, 8))), np.arange(20)
    assert classified(same, same, own)["acc1"] == 1 / 20  # the first class, always
    assert retrieval_metrics(same, same, own, mesh())["image_retrieval_recall@1"] == 0


def test_classification_by_hand():
    classes = unit(np.eye(8))
    images = unit(np.eye(8)[[0, 1, 2, 3]] + 0.9 * np.eye(8)[[1, 1, 0, 7]])
    metrics = classified(images, classes, np.array([0, 1, 0, 6]))
    # Right; right; second; not among the two that score, and after four of the six that tie at zero.
    assert metrics["acc1"] == 0.5 and metrics["acc5"] == 0.75
    twins = classes.copy()
    twins[4] = twins[1]  # two classes of one name
    assert classified(images[:2], twins, np.array([0, 1]))["acc1"] == 1 and classified(images[1:2], twins, np.array([4]))["acc1"] == 0
    assert metrics["acc1_chance"] == 1 / 8 and metrics["acc5_chance"] == 5 / 8
    assert metrics["mean_per_class_recall"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert metrics["acc1_interval"] == pytest.approx(1.96 * 0.25, rel=1e-4)


def test_retrieval_by_hand():
    images, texts = unit(np.eye(4)), unit(np.eye(4)[[1, 0, 2, 3]])
    metrics = retrieval_metrics(images, texts, np.arange(4), mesh())
    assert metrics["image_retrieval_recall@1"] == metrics["text_retrieval_recall@1"] == 0.5
    skewed = unit(np.array([[1, 0.1], [1, 0.2]]))
    metrics = retrieval_metrics(skewed, unit(np.array([[1.0, 0.0], [0.0, 1.0]])), np.arange(2), mesh())
    assert (metrics["text_retrieval_recall@1"], metrics["image_retrieval_recall@1"]) == (0.5, 1.0)
    # Two texts of one picture: the nearer one counts, and the other one is no rival.
    texts, owners = unit(np.array([[1, 0], [0.1, 1], [0.2, 1]])), np.array([0, 0, 1])
    metrics = retrieval_metrics(unit(np.eye(2)), texts, owners, mesh())
    assert metrics["text_retrieval_recall@1"] == 0.5 and metrics["image_retrieval_recall@1"] == 2 / 3
    assert metrics["text_retrieval_recall@1_chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert metrics["text_retrieval_median_rank"] == 1.5 and metrics["image_retrieval_median_rank"] == 1


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_any_number_of_devices_and_of_rows_at_once_gives_the_dense_ranks(devices, monkeypatch):
    images, texts = features(53, 0), features(131, 1)
    owners = np.random.default_rng(2).permutation(np.arange(131) % 53)
    similarity = texts @ images.T
    dense = (similarity >= similarity[np.arange(131), owners][:, None]).sum(axis=1) - 1
    best = np.array([similarity[owners == i, i].max() for i in range(53)])
    dense_texts = np.array([(similarity[owners != i, i] >= best[i]).sum() for i in range(53)])
    for elements in (ROWS, 53 * 7):
        monkeypatch.setattr("clip_jax.evaluation.scores.ROWS", elements)
        assert (ranks_of(texts, images, owners, np.arange(53), mesh(devices)) == dense).all()
        assert (ranks_of(images, texts, np.arange(53), owners, mesh(devices)) == dense_texts).all()
        # As classes, of equal ones the first wins; of signs, whose products have no rounding and often tie.
        cosines, labels = np.sign(images) @ np.sign(texts[:13]).T, np.arange(53) % 13
        own = cosines[np.arange(53), labels][:, None]
        before = (cosines > own) | (cosines == own) & (np.arange(13)[None] < labels[:, None])
        assert (ranks_of(np.sign(images), np.sign(texts[:13]), labels, np.arange(13), mesh(devices), True) == before.sum(axis=1)).all()


def test_what_cannot_be_is_named():
    with pytest.raises(UserError, match="picture 1 and 0 others have no text"):
        retrieval_metrics(features(2, 0), features(2, 1), np.zeros(2, int), mesh())
    with pytest.raises(UserError, match="not finite"):
        retrieval_metrics(features(2, 0), np.full((2, 16), np.nan, np.float32), np.arange(2), mesh())
    with pytest.raises(UserError, match="features of 8 numbers and of 16"):
        retrieval_metrics(features(2, 0), features(2, 1, 8), np.arange(2), mesh())


@pytest.mark.pytorch
@pytest.mark.filterwarnings("ignore")  # theirs
def test_clip_benchmark_gives_the_same_numbers(monkeypatch):
    classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    torch = pytest.importorskip("torch")
    from sklearn.metrics import balanced_accuracy_score

    # CLIP_benchmark makes a float of an array of one element, which NumPy 2.4 refuses.
    original = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: original(self).squeeze())

    classes, labels = features(37, 0), np.random.default_rng(3).integers(0, 37, 501)
    images = unit(features(501, 1) + 0.5 * classes[labels])
    metrics = classified(images, classes, labels)
    logits = 100 * torch.from_numpy(images @ classes.T)
    acc1, acc5 = classification.accuracy(logits, torch.from_numpy(labels), topk=(1, 5))
    assert 0.2 < metrics["acc1"] < 0.9 and (metrics["acc1"], metrics["acc5"]) == (acc1, acc5)
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)), abs=1e-15)

    owners = np.arange(205) % 41
    images = features(41, 4)
    texts = unit(features(205, 5) + 0.4 * images[owners])
    scores, positive = torch.from_numpy(texts @ images.T), torch.from_numpy(owners[:, None] == np.arange(41))
    metrics = retrieval_metrics(images, texts, owners, mesh())
    for k in (1, 5, 10):
        theirs = [
            (retrieval.batchify(retrieval.recall_at_k, x, y, 64, "cpu", k=k) > 0).float().mean().item()
            for x, y in ((scores, positive), (scores.T, positive.T))
        ]
        for name, value in zip(("image_retrieval_recall", "text_retrieval_recall"), theirs):
            assert np.float32(metrics[f"{name}@{k}"]) == pytest.approx(value, abs=6e-8)  # theirs is a float32 mean
    assert 0.1 < metrics["image_retrieval_recall@1"] < 0.95


def test_a_share_has_its_interval():
    assert share("a", np.array([True, False]), 2.0) == {"a": 0.5, "a_chance": 1.0, "a_interval": pytest.approx(0.6930, abs=1e-4)}
