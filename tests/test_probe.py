import pathlib

import jax
import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation import probe
from clip_jax.evaluation.knn import knn
from clip_jax.evaluation.probe import draw, few_shot, fit, linear_probe, search
from clip_jax.evaluation.results import BESIDE
from clip_jax.evaluation.rows import split
from clip_jax.evaluation.scores import mean_per_class_recall, share
from clip_jax.sharding import data_mesh

GOLDEN = dict(np.load(pathlib.Path(__file__).parent / "golden" / "probe.npz"))


def gaussians(n: int, width: int, classes: int, seed: int = 0, distance: float = 1.0, noise: int = 0):
    """Correlated classes with a common mean, as CLIP's features have; `noise` more columns tell nothing."""
    generator = np.random.default_rng(seed)
    centres, mix = generator.normal(size=(classes, width)) * distance, generator.normal(size=(width, width)) / width**0.5
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, n - classes)])
    features = (centres[labels] + generator.normal(size=(n, width))) @ mix + 3
    return np.hstack([features, generator.normal(size=(n, noise))]).astype(np.float32), labels


def weighted(features, labels, weights, C, classes, devices=8):
    mesh = data_mesh(jax.devices()[:devices])
    return probe._fit(*(split(x, mesh) for x in (features, labels.astype(np.int32), weights)), C, classes, mesh)


def probabilities(weights, bias, features):
    logits = features.astype(np.float64) @ np.asarray(weights, np.float64) + np.asarray(bias, np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def distances(ours, features, labels, weights, bias, loss) -> dict[str, float]:
    """Of our fit from scikit-learn's; that of the weights is a share of the largest, bias included."""
    mine, theirs = (probabilities(*f, features) for f in ((ours.weights, ours.bias), (weights, bias)))
    np.testing.assert_array_equal(mine.argmax(axis=1), theirs.argmax(axis=1))
    assert ours.iterations < probe.ITERATIONS and ours.gradient <= probe.TOLERANCE
    bias_differs = np.asarray(ours.bias) - bias
    # Adding a number to every bias changes no probability; scikit-learn's biases sum to zero.
    largest = max(np.abs(weights).max(), np.abs(bias).max())
    return {
        "weights": np.abs(ours.weights - weights).max() / largest,
        "bias": np.abs(bias_differs - bias_differs.mean()).max() / largest,
        "probabilities": np.abs(mine - theirs).max(),
        "loss": abs(-np.log(mine[np.arange(len(labels)), labels]).mean() - loss) / loss,
    }


def assert_within(measured: dict[str, float], tolerances: dict[str, float]) -> None:
    assert all(measured[name] <= tolerance for name, tolerance in tolerances.items()), measured


GOLDEN_TOLERANCES = {  # by C; measured:
    1e-3: {"weights": 2.6e-6, "bias": 2.1e-5, "probabilities": 5.3e-6, "loss": 4.5e-8},  # 8.8e-7, 7.2e-6, 1.8e-6, 1.5e-8
    1.0: {"weights": 6.4e-5, "bias": 3.6e-4, "probabilities": 1.1e-4, "loss": 6.1e-5},  # 2.2e-5, 1.2e-4, 3.7e-5, 2.0e-5
    100.0: {"weights": 4.1e-4, "bias": 3.4e-3, "probabilities": 7.4e-4, "loss": 5.3e-4},  # 1.4e-4, 1.2e-3, 2.5e-4, 1.8e-4
}


@pytest.mark.parametrize("i", range(3))
def test_golden_scikit_learn(i):
    features, labels, C = GOLDEN["features"], GOLDEN["labels"].astype(np.int64), float(GOLDEN["C"][i])
    measured = distances(fit(features, labels, 6, C), features, labels, *(GOLDEN[name][i] for name in ("weights", "bias", "loss")))
    assert_within(measured, GOLDEN_TOLERANCES[C])


def test_the_gradient_is_zero_at_the_optimum():
    features, labels = gaussians(9000, 6, 4)  # two blocks, the second of which begins in the first
    # Measured 1.8e-6, 2.0e-5 and 2.0e-5 of the largest component at zero, and the biases' 2.1e-7, 1.4e-6 and 1.3e-6.
    for C, of_weights, of_bias in ((1e-6, 5.4e-6, 6.3e-7), (1.0, 6e-5, 4.2e-6), (1e6, 6e-5, 3.9e-6)):
        ours = fit(features, labels, 4, C)
        wrong = probabilities(ours.weights, ours.bias, features) - np.eye(4)[labels]
        gradient = C * features.astype(np.float64).T @ wrong + np.asarray(ours.weights)
        at_zero = C * features.astype(np.float64).T @ (0.25 - np.eye(4)[labels])
        assert np.abs(gradient).max() <= of_weights * np.abs(at_zero).max()
        assert np.abs(wrong.mean(axis=0)).max() <= of_bias


def test_where_the_features_lie_moves_neither_the_optimum_nor_the_number_of_iterations():
    features, labels = gaussians(150, 10, 6)
    features = np.round(features * 64) / 64  # so that 64 can be added without an error
    # Measured 2.4e-7, 3.7e-7 and, the data near separable and the rounding's path long, 3.6e-4 to 9.9e-4.
    for C, tolerance in ((1e-6, 7e-7), (1e-2, 1.1e-6), (100.0, 2.9e-3)):
        near, far, small = (fit(x, labels, 6, c) for x, c in ((features, C), (features + 64, C), (features / 64, C * 64**2)))
        np.testing.assert_allclose(far.weights, near.weights, rtol=0, atol=tolerance * np.abs(near.weights).max())
        # Measured 8, 13 and 209 to 235 near; 8, 13 and 226 to 235 far away: up to 1.12 times as many.
        assert far.iterations < 1.35 * near.iterations and near.iterations < probe.ITERATIONS / 2
        np.testing.assert_array_equal(near.weights, small.weights / 64)


def test_samples_of_weight_zero_do_not_count():
    features, labels = gaussians(150, 10, 6)
    kept = np.arange(150) < 24
    some, alone = weighted(features, labels, kept.astype(np.float32), 1.0, 6), fit(features[kept], labels[kept], 6, 1.0)
    np.testing.assert_allclose(some.weights, alone.weights, rtol=0, atol=3.3e-5)  # measured 1.1e-5 of values up to 0.94


@pytest.mark.parametrize("planted", [1e-6, 3e-5, 0.316, 40.0, 1e6])
def test_the_search_finds_a_planted_C(planted):
    seen = []

    def score(C: float) -> float:
        seen.append(C)
        return -abs(np.log10(C / planted))

    assert abs(np.log10(search(score) / planted)) <= 1 / 16 + 1e-9  # half a step of the grid
    np.testing.assert_allclose(sorted(seen[:7]), 10.0 ** np.arange(-6, 7, 2))
    assert len(seen) == len(set(seen)) <= 15
    assert search(lambda C: 1.0) == 1e-6  # of equals, the strongest regularisation


def test_linear_probe_searches_on_validation_in_one_compilation():
    """Seventy columns of noise: too small a C learns nothing, and too large a C learns the noise."""
    (features, labels), test = gaussians(240, 10, 4, distance=0.7, noise=70), gaussians(400, 10, 4, 0, 0.7, 70)
    train, validation = (features[:80], labels[:80]), (features[80:], labels[80:])
    before = probe._fit._cache_size()
    metrics = linear_probe(*train, *test, 4, validation)
    assert probe._fit._cache_size() == before + 1

    def accuracy(C):
        f = weighted(features, labels, (np.arange(240) < 80).astype(np.float32), C, 4)
        return (probabilities(f.weights, f.bias, validation[0]).argmax(axis=1) == validation[1]).mean()

    coarse = {C: accuracy(C) for C in (10.0 ** np.arange(-6, 7, 2)).tolist()}
    assert accuracy(metrics["C"]) >= max(coarse.values()) > max(coarse[1e-6], coarse[1e6])
    # Refitted on both parts.
    both = fit(features, labels, 4, metrics["C"])
    assert metrics["lp_acc1"] == (probabilities(both.weights, both.bias, test[0]).argmax(axis=1) == test[1]).mean()
    assert metrics["lp_acc5"] == metrics["lp_acc5_chance"] == 1 and metrics["lp_acc1_chance"] == 1 / 4
    assert metrics["lp_acc1_interval"] == share("", np.arange(400) < round(400 * metrics["lp_acc1"]), 0.0)["_interval"]
    shares = {name for name in metrics if not name.endswith(BESIDE)}
    assert shares == {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "C", "iterations"}


def test_several_devices_give_the_probes_of_one():
    features, labels = gaussians(301, 10, 6, distance=0.4)
    train, test = (features[:150], labels[:150]), (features[150:], labels[150:])  # neither is divisible

    def on(devices):
        mesh = data_mesh(jax.devices()[:devices])
        found = linear_probe(*train, *test, 6, mesh=mesh), few_shot(*train, *test, 6, shots=(3,), mesh=mesh)[3]
        scores = [{name: value for name, value in metrics.items() if name != "iterations"} for metrics in found]
        return weighted(*train, np.ones(150, np.float32), 1.0, 6, devices).weights, scores, knn(*train, *test, 6, mesh=mesh)

    weights, *metrics = on(1)
    for devices in (2, 8):
        others, *same = on(devices)
        assert same == metrics
        # Measured 2.7e-5 and 4.4e-5; with jax 0.12 4.4e-5 and 4.5e-5.
        np.testing.assert_allclose(others, weights, rtol=0, atol=1.3e-4 * np.abs(weights).max())


def test_linear_probe_draws_its_own_validation_part():
    features, labels = gaussians(300, 10, 6, distance=0.4)
    train, test = (features[:150], labels[:150]), (features[150:], labels[150:])
    metrics = linear_probe(*train, *test, 6, seed=1)
    assert metrics == linear_probe(*train, *test, 6, seed=1)
    assert 1 / 6 < metrics["lp_acc1"] < metrics["lp_acc5"] < 1
    held_out = probe._stratified(labels, 6, 1)
    np.testing.assert_array_equal(np.bincount(labels[held_out]), np.round(np.bincount(labels) / 5))
    assert (probe._stratified(labels, 6, 2) != held_out).any()
    assert probe._stratified(np.array([0, 1, 1]), 2, 0).tolist() in ([False, True, False], [False, False, True])


def test_recall_is_over_the_classes_that_the_test_part_has():
    assert mean_per_class_recall(np.array([True, True, False, True]), np.array([0, 0, 0, 3])) == (2 / 3 + 1) / 2


def test_few_shot_draws_are_nested_and_repeatable():
    labels = gaussians(300, 4, 5)[1]
    drawn = draw(labels, 5, 8, seed=3)
    assert (labels[drawn] == np.arange(5)[:, None]).all() and len(set(drawn.ravel())) == 40
    np.testing.assert_array_equal(drawn, draw(labels, 5, 8, seed=3))
    np.testing.assert_array_equal(drawn[:, :2], draw(labels, 5, 2, seed=3))
    assert (drawn != draw(labels, 5, 8, seed=4)).any()


def test_few_shot_is_a_fit_to_the_draw():
    features, labels = gaussians(500, 10, 6)
    train, test = (features[:350], labels[:350]), (features[350:], labels[350:])
    compiled = probe._fit._cache_size()
    results = few_shot(*train, *test, 6, shots=(1, 4, 25), seed=2)
    assert probe._fit._cache_size() <= compiled + 1 and list(results) == [1, 4, 25]
    assert results == few_shot(*train, *test, 6, shots=(1, 4, 25), seed=2)
    rows = draw(train[1], 6, 4, seed=2).ravel()
    alone = fit(train[0][rows], train[1][rows], 6, results[4]["C"])
    assert results[4]["lp_acc1"] == (probabilities(alone.weights, alone.bias, test[0]).argmax(axis=1) == test[1]).mean()
    assert 1 / 6 < results[1]["lp_acc1"] < results[25]["lp_acc1"]
    # C means the same for features of any length.
    longer = few_shot(8 * train[0], train[1], 8 * test[0], test[1], 6, shots=(1, 4, 25), seed=2)
    assert [m["lp_acc1"] for m in longer.values()] == [m["lp_acc1"] for m in results.values()]


def test_errors_say_what_is_wrong():
    features, labels = gaussians(60, 4, 3)
    good = (features, labels)
    for run in (linear_probe, knn, few_shot):
        with pytest.raises(UserError, match="test features: expected width 4.* found 3"):
            run(*good, features[:, :3], labels, 3)
        with pytest.raises(UserError, match=r"expected \d+ or more samples of each of 4 classes, found 0 of class 3"):
            run(*good, *good, 4)
        with pytest.raises(UserError, match="train labels: expected 0 to 1, found 2 in row 2"):
            run(*good, *good, 2)
        with pytest.raises(UserError, match="test labels: expected 0 to 2, found -1 in row 5"):
            run(*good, features, np.where(np.arange(60) == 5, -1, labels), 3)
        for bad in (np.nan, np.inf, -np.inf):
            broken = features.copy()
            broken[7, 2] = bad
            with pytest.raises(UserError, match="train features: expected finite .* row 7"):
                run(broken, labels, *good, 3)
    with pytest.raises(UserError, match="validation features: expected width"):
        linear_probe(*good, *good, 3, (features[:, :2], labels))
    with pytest.raises(UserError, match="pass validation="):
        linear_probe(features[:3], np.arange(3), *good, 3)
    with pytest.raises(UserError, match="expected 2 or more samples of each of 3 classes, found 1 of class 0"):
        few_shot(features[:3], np.arange(3), *good, 3, shots=(2,))
    with pytest.raises(UserError, match="shots: expected"):
        few_shot(*good, *good, 3, shots=(0, 1))
    with pytest.raises(UserError, match="k: expected 1 to 60"):
        knn(*good, *good, 3, k=61)
    with pytest.raises(UserError, match="only zeros in row 4"):
        knn(np.where(np.arange(60)[:, None] == 4, 0, features).astype(np.float32), labels, *good, 3)
    with pytest.raises(UserError, match="C: expected"):
        fit(*good, 3, 0.0)
    with pytest.raises(UserError, match="as many features as labels"):
        probe.checked("train", features, labels[:9], 3)


LIVE_TOLERANCES = {  # by C; measured:
    1e-3: {"weights": 7.5e-7, "bias": 5.0e-5, "probabilities": 2.0e-6, "loss": 3.3e-7},  # 2.5e-7, 1.7e-5, 6.8e-7, 1.1e-7
    1.0: {"weights": 4.1e-5, "bias": 3.1e-4, "probabilities": 1.0e-4, "loss": 6.4e-6},  # 1.4e-5, 1.0e-4, 3.4e-5, 2.2e-6
    100.0: {"weights": 4.4e-4, "bias": 3.7e-3, "probabilities": 1.0e-3, "loss": 2.4e-5},  # 1.5e-4, 1.3e-3, 3.4e-4, 8.2e-6
}


@pytest.mark.pytorch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("C", LIVE_TOLERANCES)
def test_live_scikit_learn(C):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    features, labels = gaussians(400, 24, 7, seed=1, distance=0.5)
    import threadpoolctl  # of scikit-learn's

    with threadpoolctl.threadpool_limits(1):  # so small a product is slower in several threads
        original = linear_model.LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(features.astype(np.float64), labels)
    weights, bias = original.coef_.T, original.intercept_
    loss = -np.log(probabilities(weights, bias, features)[np.arange(400), labels]).mean()
    assert_within(distances(fit(features, labels, 7, C), features, labels, weights, bias, loss), LIVE_TOLERANCES[C])


@pytest.fixture
def clip_benchmark(monkeypatch):
    """CLIP_benchmark's linear probe, which asks for a GPU, on the CPU."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    module = pytest.importorskip("clip_benchmark.metrics.linear_probe", reason="needs clip-benchmark==1.6.2")
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    # It makes a float of an array of one element, which NumPy 2.4 refuses.
    original = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: original(self).squeeze())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a product is slower in several
    yield module
    torch.set_num_threads(threads)


@pytest.mark.pytorch
@pytest.mark.filterwarnings("ignore")
def test_clip_benchmark_metrics(clip_benchmark):
    """From the same logits the same numbers, to the last digit."""
    import torch

    features, labels = gaussians(500, 10, 12, distance=0.3)
    ours = fit(features[:250], labels[:250], 12, 1.0)
    test, targets = features[250:], labels[250:]
    logits = torch.from_numpy(test @ np.asarray(ours.weights) + np.asarray(ours.bias))
    acc1, acc5 = clip_benchmark.accuracy(logits, torch.from_numpy(targets), topk=(1, 5))
    recall = clip_benchmark.balanced_accuracy_score(targets, logits.argmax(axis=1))
    metrics = probe._metrics("lp_", ours, test, targets, data_mesh())
    shares = {name: value for name, value in metrics.items() if not name.endswith(BESIDE)}
    assert shares == {"lp_acc1": acc1, "lp_acc5": acc5, "lp_mean_per_class_recall": recall}
    assert acc1 != recall and acc5 < 1


@pytest.mark.pytorch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("distance", [0.5, 10.0])
def test_clip_benchmark_training(clip_benchmark, distance):
    """CLIP_benchmark trains by AdamW, whose decay is no L2 penalty and shrinks biases too: no C gives its classifier.

    Without decay it descends to the maximum likelihood, which is ours at a large C, where there is one: classes that
    overlap.  Where classes are far apart it has none, and the two agree in what they predict.
    """
    import torch

    features, labels = gaussians(900, 6, 8, distance=distance)
    train, test = (features[:600] - 3, labels[:600]), (features[600:] - 3, labels[600:])
    loader = [(torch.from_numpy(train[0]), torch.from_numpy(train[1]))]
    theirs = clip_benchmark.train(loader, 6, 8, 0.0, 0.3, 1500 if distance < 1 else 200, False, "cpu", 0)
    logits, targets = clip_benchmark.infer(theirs, [tuple(map(torch.from_numpy, test))], False, "cpu")
    acc1, acc5 = clip_benchmark.accuracy(logits, targets, topk=(1, 5))
    ours = fit(*train, 8, 1e6)
    metrics = probe._metrics("lp_", ours, *test, data_mesh())
    difference = np.abs(probabilities(ours.weights, ours.bias, test[0]) - logits.softmax(dim=1).numpy()).max()
    assert (metrics["lp_acc1"], metrics["lp_acc5"]) == (acc1, acc5)
    if distance < 1:
        assert acc1 < 0.5 and acc5 < 1
        assert difference <= 1.2e-4  # measured 4.1e-5
    else:
        assert acc1 == 1
