"""k-NN: beside brute force, with ties, on any number of devices."""

from collections import Counter

import numpy as np

from clip_jax.evaluation.knn import knn
from clip_jax.evaluation.scores import mean_per_class_recall


def test_knn_is_brute_force():
    # Of signs: cosines are multiples of 1/64 without an error, and most neighbours tie.
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 20, 9600)
    features = np.sign(generator.normal(size=(20, 64))[labels] + 3 * generator.normal(size=(9600, 64))).astype(np.float32)
    train, test = (features[:9000], labels[:9000]), (features[9000:], labels[9000:])  # two blocks of either, begun early
    nearest = np.argsort(-(test[0] @ train[0].T), axis=1, kind="stable")
    for k in (1, 20):
        # A Counter keeps the order in which it met the classes, nearest first, and so does `most_common` among equals.
        expected = np.array([Counter(train[1][row[:k]].tolist()).most_common(1)[0][0] for row in nearest])
        metrics = knn(*train, *test, 20, k)
        assert metrics["knn_acc1"] == (expected == test[1]).mean()
        assert metrics["knn_mean_per_class_recall"] == mean_per_class_recall(expected == test[1], test[1])
        # Which are right says less than what was said: every one as brute force has it.
        assert knn(*train, test[0], expected, 20, k)["knn_acc1"] == 1


def test_knn_ties():
    angles = np.deg2rad([0.0, 10, 20, 30, 90, 90])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels, test = np.array([2, 1, 1, 2, 0, 1]), np.array([[1, 0], [0, 3]], np.float32)
    # 2 and 1 have two votes each and 2 the nearest; at 90 degrees the earlier of two alike.
    assert knn(train, labels, test, np.array([2, 0]), 3, k=4)["knn_acc1"] >= 0.5
    assert knn(train, labels, test[:1], np.array([2]), 3, k=4)["knn_acc1"] == 1
    assert knn(train, labels, test[1:], np.array([0]), 3, k=1)["knn_acc1"] == 1
