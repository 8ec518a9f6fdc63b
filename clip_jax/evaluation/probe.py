"""Classification from frozen features: linear probe, few-shot linear probe and nearest neighbours.

The linear probe follows Radford et al. 2021 (arXiv 2103.00020, appendix A.3): logistic regression by L-BFGS, at most
1,000 iterations, its strength of regularisation found on a validation part.  C is that of scikit-learn's
`LogisticRegression`, the inverse of the strength:

    C * sum_n cross_entropy(x_n W + b, y_n) + 1/2 ||W||^2        with no penalty on b.

Features are taken as they come, in float32; normalise them first where a protocol says so (CLIP_benchmark does).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.scores import mean_per_class_recall

ITERATIONS = 1000  # of L-BFGS at most, as in the paper
TOLERANCE = 1e-5  # of `Fit.gradient`, where L-BFGS ends
GRID = np.logspace(-6, 6, 97)  # of C: eight steps a decade
VALIDATION = 5  # one sample in this many of each class, where no validation part is given
FEW_SHOT_C = 10.0  # see `few_shot`; a tenth loses up to 6 points at 16 shots, and a thousandfold wins 2 (synthetic classes)
BLOCK = 8192  # samples whose logits are held at once
NEIGHBOUR_BLOCK = 512  # test samples whose similarities with a block of training samples are held at once

Part = tuple[Float[np.ndarray, "V _"], Int[np.ndarray, "V"]]  # features, labels


class Fit(NamedTuple):
    """A linear classifier, and how its optimisation ended."""

    weights: Float[Array, "D K"]
    bias: Float[Array, "K"]
    iterations: Int[Array, ""]  # `ITERATIONS` if the tolerance was not reached
    gradient: Float[Array, ""]  # its largest component, as a share of the largest at zero


def linear_probe(
    train_features: Float[np.ndarray, "N D"],
    train_labels: Int[np.ndarray, "N"],
    test_features: Float[np.ndarray, "M _"],
    test_labels: Int[np.ndarray, "M"],
    classes: int,
    validation: Part | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The paper's linear probe: C by a search on a validation part, then a fit to training and validation together.

    Args:
      classes: their number; labels are 0 to classes - 1, and each has a training sample.
      validation: features and labels.  By default a fifth of each class of the training part, drawn from `seed`.

    Returns:
      CLIP_benchmark's `lp_acc1`, `lp_acc5` (1 with five classes or fewer, where CLIP_benchmark has NaN) and
      `lp_mean_per_class_recall`; `C`, and the `iterations` of the last fit.
    """
    train_features, train_labels = _part("train", train_features, train_labels, classes)
    test_features, test_labels = _part("test", test_features, test_labels, classes, train_features)
    _need(train_labels, classes, 1, "training")
    if validation is None:
        held_out = _stratified(train_labels, classes, seed)
        features, labels = train_features, train_labels
    else:
        more_features, more_labels = _part("validation", *validation, classes, train_features)
        features, labels = np.concatenate([train_features, more_features]), np.concatenate([train_labels, more_labels])
        held_out = np.arange(len(labels)) >= len(train_labels)

    # What is held out has weight zero in the search: one array, one shape, one compilation, and no second copy.
    features, labels = jnp.asarray(features), jnp.asarray(labels, jnp.int32)
    searched = jnp.asarray(~held_out, jnp.float32)

    def validation_accuracy(C: float) -> float:
        right = np.asarray(_top(_fit(features, labels, searched, C, classes), features, 1)[:, 0] == labels)
        return float(right[held_out].mean())

    C = search(validation_accuracy)
    fit = _fit(features, labels, jnp.ones_like(searched), C, classes)
    return _metrics("lp_", fit, test_features, test_labels) | {"C": C, "iterations": int(fit.iterations)}


def few_shot(
    train_features: Float[np.ndarray, "N D"],
    train_labels: Int[np.ndarray, "N"],
    test_features: Float[np.ndarray, "M _"],
    test_labels: Int[np.ndarray, "M"],
    classes: int,
    shots: tuple[int, ...] = (1, 2, 4, 8, 16),
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """The linear probe on a few samples of each class.

    C is fixed, not searched: with one sample a class there is none to search with, a C from a larger validation part
    would be learnt from more labels than are counted, and one C for all counts leaves the count as the only difference.
    So that it means the same for features of any length, it is `FEW_SHOT_C` over the mean squared distance of the
    drawn features from their mean, which the unpenalised bias absorbs.

    Args:
      shots: samples a class.  Draws are nested: those for 2 are among those for 4.
      seed: of the draws (`draw`).

    Returns:
      The metrics of `linear_probe` by number of samples a class.
    """
    train_features, train_labels = _part("train", train_features, train_labels, classes)
    test_features, test_labels = _part("test", test_features, test_labels, classes, train_features)
    if not shots or min(shots) < 1:
        raise UserError(f"shots: expected numbers of samples from 1, found {shots}; the usual ones are (1, 2, 4, 8, 16)")
    drawn = draw(train_labels, classes, max(shots), seed)
    # One array for all counts, those beyond the count with weight zero: one compilation.
    features, labels = jnp.asarray(train_features[drawn.ravel()]), jnp.asarray(train_labels[drawn.ravel()], jnp.int32)
    spread = float(jnp.var(features, axis=0).sum())
    C = FEW_SHOT_C / spread if spread else FEW_SHOT_C
    results = {}
    for n in shots:
        counted = np.broadcast_to(np.arange(max(shots)) < n, drawn.shape).ravel()
        fit = _fit(features, labels, jnp.asarray(counted, jnp.float32), C, classes)
        results[n] = _metrics("lp_", fit, test_features, test_labels) | {"C": C, "iterations": int(fit.iterations)}
    return results


def knn(
    train_features: Float[np.ndarray, "N D"],
    train_labels: Int[np.ndarray, "N"],
    test_features: Float[np.ndarray, "M _"],
    test_labels: Int[np.ndarray, "M"],
    classes: int,
    k: int = 20,
) -> dict[str, float]:
    """The class that is most frequent among the `k` training samples of highest cosine.

    Ties: of equally frequent classes, the one with the nearest sample; of equally near samples, the earlier one.
    No more than a block of similarities is held, whatever N and M.

    Returns:
      `knn_acc1`, `knn_mean_per_class_recall` and `k`.
    """
    train_features, train_labels = _part("train", train_features, train_labels, classes)
    test_features, test_labels = _part("test", test_features, test_labels, classes, train_features)
    _need(train_labels, classes, 1, "training")
    if not 1 <= k <= len(train_labels):
        raise UserError(f"k: expected 1 to {len(train_labels)}, the number of training samples, found {k}")
    found = _neighbours(*(_unit(*part) for part in (("train", train_features), ("test", test_features))), k)
    votes = train_labels[np.asarray(found)]
    predicted = np.empty_like(test_labels)
    for i in range(0, len(votes), NEIGHBOUR_BLOCK):
        block = votes[i : i + NEIGHBOUR_BLOCK]
        shares = (block[:, :, None] == block[:, None, :]).sum(axis=2)  # how many of the k have each one's class
        predicted[i : i + NEIGHBOUR_BLOCK] = block[np.arange(len(block)), shares.argmax(axis=1)]  # of equals, the nearest
    return {
        "knn_acc1": float((predicted == test_labels).mean()),
        "knn_mean_per_class_recall": mean_per_class_recall(predicted == test_labels, test_labels),
        "k": k,
    }


def fit(features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], classes: int, C: float) -> Fit:
    """The logistic regression at one C, by L-BFGS from zero."""
    features, labels = _part("train", features, labels, classes)
    if not (np.isfinite(C) and C > 0):
        raise UserError(f"C: expected a number above 0, found {C}; 1 is scikit-learn's")
    return _fit(jnp.asarray(features), jnp.asarray(labels, jnp.int32), jnp.ones(len(labels)), float(C), classes)


def search(score: Callable[[float], float]) -> float:
    """The C of highest score on `GRID`, found as in the paper: every second decade, then closer around the peak.

    The interval around the peak is halved until it is an eighth of a decade, at 15 evaluations or fewer.  Of equal
    scores the smallest C, the strongest regularisation, wins.
    """
    scores = {}

    def peak(indices: list[int]) -> int:
        scores.update({i: score(float(GRID[i])) for i in indices if i not in scores})
        return max(indices, key=scores.__getitem__)  # the first of equals

    best = peak(list(range(0, len(GRID), 16)))
    for span in (8, 4, 2, 1):
        best = peak([i for i in (best - span, best, best + span) if 0 <= i < len(GRID)])
    return float(GRID[best])


def draw(labels: Int[np.ndarray, "N"], classes: int, shots: int, seed: int) -> Int[np.ndarray, "K n"]:
    """`shots` samples of each class, a row each; fewer shots with the same seed are the first of them."""
    _need(labels, classes, shots, "training")
    order, place = _shuffled_by_class(labels, classes, seed)
    return order[place < shots].reshape(classes, shots)


@functools.partial(jax.jit, static_argnames="classes")
def _fit(
    features: Float[Array, "N D"],
    labels: Int[Array, "N"],
    sample_weights: Float[Array, "N"],
    C: float | Float[Array, ""],
    classes: int,
) -> Fit:
    """Minimises the objective over C * N, the mean, which float32 holds for every N and C of the search.

    What is optimised is the classifier of features that are centred and divided by one number.  That moves no optimum:
    the bias, which costs nothing, absorbs the mean, and the penalty is divided by the number's square.  But weights and
    biases then have curvatures of one size, the data's and the penalty's together, whatever C and the features' mean
    and length: CLIP's features share a large mean, and at the ends of the search L-BFGS would not arrive (test_probe.py).
    """
    width, total = features.shape[1], sample_weights.sum()
    mean = jnp.dot(sample_weights, features, precision="highest") / total
    variance = jnp.dot(sample_weights, jnp.square(features - mean[None]).mean(axis=1)) / total
    scale = jnp.sqrt(variance + classes / (C * total))
    strength = 1 / (C * total * jnp.square(scale))

    def cross_entropy(parameters, i):
        (x, y, w), fresh = _block(i, features, labels, sample_weights)
        weights, bias = parameters
        logits = jnp.dot((x - mean[None]) / scale, weights, precision="highest") + bias[None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.sum(losses * w * fresh) / total

    def value_and_gradient(parameters):
        def add(i, sums):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(cross_entropy)(parameters, i))

        weights, bias = parameters
        penalty = 0.5 * strength * jnp.sum(jnp.square(weights))
        return jax.lax.fori_loop(0, _blocks(features), add, (penalty, (strength * weights, jnp.zeros_like(bias))))

    # The gradient is found block by block with the value, so that no block's logits are kept for a backward pass.
    @jax.custom_vjp
    def objective(parameters):
        return value_and_gradient(parameters)[0]

    objective.defvjp(value_and_gradient, lambda gradient, scale: (jax.tree.map(lambda g: g * scale, gradient),))

    def size(gradient):
        weights, bias = (jnp.abs(g).max() for g in gradient)
        return jnp.maximum(weights / initial, bias * classes)

    def unfinished(state):
        step, _, _, gradient = state
        return (step < ITERATIONS) & (gradient > TOLERANCE)

    def iterate(state):
        step, parameters, memory, _ = state
        value, gradient = optax.value_and_grad_from_state(objective)(parameters, state=memory)
        updates, memory = optimizer.update(gradient, memory, parameters, value=value, grad=gradient, value_fn=objective)
        return step + 1, optax.apply_updates(parameters, updates), memory, size(optax.tree.get(memory, "grad"))

    optimizer = optax.lbfgs()
    zero = (jnp.zeros((width, classes)), jnp.zeros(classes))
    initial = jnp.abs(value_and_gradient(zero)[1][0]).max()
    initial = jnp.where(initial > 0, initial, 1.0)
    step, (weights, bias), _, gradient = jax.lax.while_loop(
        unfinished, iterate, (jnp.int32(0), zero, optimizer.init(zero), jnp.float32(jnp.inf))
    )
    weights = weights / scale
    return Fit(weights, bias - jnp.dot(mean, weights, precision="highest"), step, gradient)


@functools.partial(jax.jit, static_argnames="k")
def _top(fit: Fit, features: Float[Array, "M D"], k: int) -> Int[Array, "M k"]:
    """The `k` classes of highest logit, best first."""

    def classify(i, top):
        (x,), _ = _block(i, features)
        logits = jnp.dot(x, fit.weights, precision="highest") + fit.bias[None]
        return _put(top, i, jax.lax.top_k(logits, k)[1])

    return jax.lax.fori_loop(0, _blocks(features), classify, jnp.zeros((len(features), k), jnp.int32))


@functools.partial(jax.jit, static_argnames="k")
def _neighbours(train: Float[Array, "N D"], test: Float[Array, "M D"], k: int) -> Int[Array, "M k"]:
    """The rows of `train` with the highest products, highest first; of equals, the earlier row first."""

    def of_block(i, found):
        (queries,), _ = _block(i, test, size=NEIGHBOUR_BLOCK)

        def merge(j, best):
            (x, rows), fresh = _block(j, train, jnp.arange(len(train)))
            similarity = jnp.where(fresh[None], jnp.dot(queries, x.T, precision="highest"), -jnp.inf)
            # The best so far come from earlier rows, and `top_k` prefers what stands first.
            scores = jnp.concatenate([best[0], similarity], axis=1)
            rows = jnp.concatenate([best[1], jnp.broadcast_to(rows[None], similarity.shape)], axis=1)
            scores, places = jax.lax.top_k(scores, k)
            return scores, jnp.take_along_axis(rows, places, axis=1)

        none = (jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32))
        return _put(found, i, jax.lax.fori_loop(0, _blocks(train), merge, none)[1], size=NEIGHBOUR_BLOCK)

    return jax.lax.fori_loop(0, _blocks(test, NEIGHBOUR_BLOCK), of_block, jnp.zeros((len(test), k), jnp.int32))


def _blocks(rows: Array, size: int = BLOCK) -> int:
    return -(-len(rows) // size)


def _block(i: Int[Array, ""], *arrays: Array, size: int = BLOCK) -> tuple[list[Array], Array]:
    """Rows of block `i`, and which of them are new: the last block begins early enough to be whole, without padding."""
    size = min(size, len(arrays[0]))
    start = jnp.minimum(i * size, len(arrays[0]) - size)
    return [jax.lax.dynamic_slice_in_dim(a, start, size) for a in arrays], start + jnp.arange(size) >= i * size


def _put(rows: Array, i: Int[Array, ""], block: Array, size: int = BLOCK) -> Array:
    """Writes a result where `_block` took its rows from."""
    return jax.lax.dynamic_update_slice_in_dim(rows, block, i * size, 0)  # clamped as the start above


def _metrics(prefix: str, fit: Fit, features: Float[np.ndarray, "M D"], labels: Int[np.ndarray, "M"]) -> dict[str, float]:
    top = np.asarray(_top(fit, jnp.asarray(features), min(5, len(fit.bias))))
    right = top == labels[:, None]
    return {
        f"{prefix}acc1": float(right[:, 0].mean()),
        f"{prefix}acc5": float(right.any(axis=1).mean()),
        f"{prefix}mean_per_class_recall": mean_per_class_recall(top[:, 0] == labels, labels),
    }


def _shuffled_by_class(labels: np.ndarray, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples class after class, each class in an order drawn from `seed`, and each one's place in its class."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels, minlength=classes)
    return order, np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)


def _stratified(labels: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Which samples to hold out: a share of each class, but never its only sample."""
    counts = np.bincount(labels, minlength=classes)
    shares = np.where(counts > 1, np.maximum(1, np.round(counts / VALIDATION)), 0)
    order, place = _shuffled_by_class(labels, classes, seed)
    held_out = np.zeros(len(labels), bool)
    held_out[order] = place < shares[labels[order]]
    if not held_out.any():
        raise UserError(
            "train labels: expected a class with two samples, of which one is held out to choose C, found one sample a class; "
            "pass validation=(features, labels), or use few_shot(..., shots=(1,))"
        )
    return held_out


def _part(
    name: str, features: np.ndarray, labels: np.ndarray, classes: int, like: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The features in float32 and the labels, both found to be sound; `like` is of the width that is expected."""
    features = np.asarray(features, np.float32)
    if classes < 2:
        raise UserError(f"classes: expected 2 or more, found {classes}")
    if len(features) != len(labels) or not len(labels):
        raise UserError(f"{name}: expected as many features as labels, one or more, found {len(features)} and {len(labels)}")
    if like is not None and features.shape[1] != like.shape[1]:
        raise UserError(
            f"{name} features: expected width {like.shape[1]}, that of the training features, found {features.shape[1]}; "
            "take both from one model"
        )
    if not (np.isfinite(features.min()) and np.isfinite(features.max())):  # without an array of booleans of their size
        row = next(i for i, x in enumerate(features) if not np.isfinite(x).all())
        raise UserError(f"{name} features: expected finite float32 numbers, found others in row {row}; encode that sample again")
    if labels.min() < 0 or labels.max() >= classes:
        row = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise UserError(f"{name} labels: expected 0 to {classes - 1}, found {labels[row]} in row {row}; classes={classes} counts them")
    return features, labels


def _need(labels: np.ndarray, classes: int, shots: int, name: str) -> None:
    """Every class has `shots` samples."""
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < shots:
        few = np.flatnonzero(counts < shots)
        raise UserError(
            f"{name} labels: expected {shots} or more samples of each of {classes} classes, found {counts[few[0]]} of class {few[0]}"
            f" ({len(few)} such classes); add samples, or number the classes without them"
        )


def _unit(name: str, features: np.ndarray) -> Array:
    """Rows of length 1."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"{name} features: expected directions, found only zeros in row {int(lengths.argmin())}; encode that sample again")
    return jnp.asarray(features / lengths)
