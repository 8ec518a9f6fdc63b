"""Classification from frozen features: linear probe and few-shot linear probe.

The linear probe follows Radford et al. 2021 (arXiv 2103.00020, appendix A.3): logistic regression by L-BFGS, at most
1,000 iterations, its strength of regularisation found on a validation part.  C is that of scikit-learn's
`LogisticRegression`, the inverse of the strength:

    C * sum_n cross_entropy(x_n W + b, y_n) + 1/2 ||W||^2        with no penalty on b.

Features are taken as they come, in float32; normalise them first where a protocol says so (CLIP_benchmark does).

Every device has a part of the rows, padded to a multiple of the devices: of a fit, the training rows, whose losses and
gradients are summed over the devices; of a prediction, the rows that are predicted.  `mesh` is that of all devices, if not given.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.rows import block, blocks, by_rows, put, split
from clip_jax.evaluation.scores import recall, share
from clip_jax.sharding import BATCH, data_mesh

ITERATIONS = 1000  # of L-BFGS at most, as in the paper
TOLERANCE = 1e-5  # of `Fit.gradient`, where L-BFGS ends
GRID = np.logspace(-6, 6, 97)  # of C: eight steps a decade
VALIDATION = 5  # one sample in this many of each class, where no validation part is given
FEW_SHOT_C = 10.0  # see `few_shot`; a tenth loses up to 6 points at 16 shots, and a thousandfold wins 2 (synthetic classes)

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
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """The paper's linear probe: C by a search on a validation part, then a fit to training and validation together.

    Args:
      classes: their number; labels are 0 to classes - 1, and each has a training sample.
      validation: features and labels.  By default a fifth of each class of the training part, drawn from `seed`.

    Returns:
      CLIP_benchmark's `lp_acc1`, `lp_acc5` (1 with five classes or fewer, where CLIP_benchmark has NaN) and
      `lp_mean_per_class_recall`, with chance and interval as in scores.py; `C`, and the `iterations` of the last fit.
    """
    train_features, train_labels = checked("train", train_features, train_labels, classes)
    test_features, test_labels = checked("test", test_features, test_labels, classes, train_features)
    need_samples(train_labels, classes, 1, "training")
    if validation is None:
        held_out = _stratified(train_labels, classes, seed)
        features, labels = train_features, train_labels
    else:
        more_features, more_labels = checked("validation", *validation, classes, train_features)
        features, labels = np.concatenate([train_features, more_features]), np.concatenate([train_labels, more_labels])
        held_out = np.arange(len(labels)) >= len(train_labels)

    # What is held out has weight zero in the search: one array, one shape, one compilation, and no second copy.
    mesh = mesh or data_mesh()
    rows = split(features, mesh), split(labels.astype(np.int32), mesh)
    searched = split((~held_out).astype(np.float32), mesh)

    def validation_accuracy(C: float) -> float:
        top = np.asarray(_top(_fit(*rows, searched, C, classes, mesh), rows[0], 1, mesh))
        return float((top[: len(labels), 0] == labels)[held_out].mean())

    C = search(validation_accuracy)
    fit = _fit(*rows, split(np.ones(len(labels), np.float32), mesh), C, classes, mesh)
    return _metrics("lp_", fit, test_features, test_labels, mesh) | {"C": C, "iterations": int(fit.iterations)}


def few_shot(
    train_features: Float[np.ndarray, "N D"],
    train_labels: Int[np.ndarray, "N"],
    test_features: Float[np.ndarray, "M _"],
    test_labels: Int[np.ndarray, "M"],
    classes: int,
    shots: tuple[int, ...] = (1, 2, 4, 8, 16),
    seed: int = 0,
    mesh: Mesh | None = None,
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
    train_features, train_labels = checked("train", train_features, train_labels, classes)
    test_features, test_labels = checked("test", test_features, test_labels, classes, train_features)
    if not shots or min(shots) < 1:
        raise UserError(f"shots: expected numbers of samples from 1, found {shots}; the usual ones are (1, 2, 4, 8, 16)")
    drawn = draw(train_labels, classes, max(shots), seed)
    # One array for all counts, those beyond the count with weight zero: one compilation.
    mesh, features = mesh or data_mesh(), train_features[drawn.ravel()]
    spread = float(np.var(features, axis=0).sum())
    C = FEW_SHOT_C / spread if spread else FEW_SHOT_C
    rows = split(features, mesh), split(train_labels[drawn.ravel()].astype(np.int32), mesh)
    results = {}
    for n in shots:
        counted = np.broadcast_to(np.arange(max(shots)) < n, drawn.shape).ravel()
        fit = _fit(*rows, split(counted.astype(np.float32), mesh), C, classes, mesh)
        results[n] = _metrics("lp_", fit, test_features, test_labels, mesh) | {"C": C, "iterations": int(fit.iterations)}
    return results


def fit(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], classes: int, C: float, mesh: Mesh | None = None
) -> Fit:
    """The logistic regression at one C, by L-BFGS from zero."""
    features, labels = checked("train", features, labels, classes)
    if not (np.isfinite(C) and C > 0):
        raise UserError(f"C: expected a number above 0, found {C}; 1 is scikit-learn's")
    mesh, every = mesh or data_mesh(), np.ones(len(labels), np.float32)
    return _fit(*(split(x, mesh) for x in (features, labels.astype(np.int32), every)), float(C), classes, mesh)


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
    need_samples(labels, classes, shots, "training")
    order, place = _shuffled_by_class(labels, classes, seed)
    return order[place < shots].reshape(classes, shots)


@functools.partial(jax.jit, static_argnames=("classes", "mesh"))
def _fit(
    features: Float[Array, "N D"],
    labels: Int[Array, "N"],
    sample_weights: Float[Array, "N"],
    C: float | Float[Array, ""],
    classes: int,
    mesh: Mesh,
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

    def on_device(features, labels, sample_weights, mean, scale, total, parameters):
        def cross_entropy(parameters, i):
            (x, y, w), fresh = block(i, features, labels, sample_weights)
            weights, bias = parameters
            logits = jnp.dot((x - mean[None]) / scale, weights, precision="highest") + bias[None]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.sum(losses * w * fresh) / total

        def add(i, sums):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(cross_entropy)(parameters, i))

        none = (jnp.float32(0), jax.tree.map(jnp.zeros_like, parameters))
        return jax.lax.psum(jax.lax.fori_loop(0, blocks(features), add, none), BATCH)

    rows, whole = PartitionSpec(BATCH), PartitionSpec()
    over_devices = jax.shard_map(on_device, mesh=mesh, in_specs=(rows,) * 3 + (whole,) * 4, out_specs=whole, check_vma=False)

    def value_and_gradient(parameters):
        loss, (of_weights, of_bias) = over_devices(features, labels, sample_weights, mean, scale, total, parameters)
        penalty = 0.5 * strength * jnp.sum(jnp.square(parameters[0]))
        return penalty + loss, (strength * parameters[0] + of_weights, of_bias)

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
    found = Fit(weights, bias - jnp.dot(mean, weights, precision="highest"), step, gradient)
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, whole))


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def _top(fit: Fit, features: Float[Array, "M D"], k: int, mesh: Mesh) -> Int[Array, "M k"]:
    """The `k` classes of highest logit, best first."""

    def on_device(fit, features):
        def classify(i, top):
            (x,), _ = block(i, features)
            logits = jnp.dot(x, fit.weights, precision="highest") + fit.bias[None]
            return put(top, i, jax.lax.top_k(logits, k)[1])

        return jax.lax.fori_loop(0, blocks(features), classify, jnp.zeros((len(features), k), jnp.int32))

    return by_rows(on_device, mesh)(fit, features)


def _metrics(prefix: str, fit: Fit, features: Float[np.ndarray, "M D"], labels: Int[np.ndarray, "M"], mesh: Mesh) -> dict[str, float]:
    classes = len(fit.bias)
    right = np.asarray(_top(fit, split(features, mesh), min(5, classes), mesh))[: len(labels)] == labels[:, None]
    metrics = share(f"{prefix}acc1", right[:, 0], 1 / classes) | share(f"{prefix}acc5", right.any(axis=1), 5 / classes)
    return metrics | recall(f"{prefix}mean_per_class_recall", right[:, 0], labels, classes)


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


def checked(
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


def need_samples(labels: np.ndarray, classes: int, shots: int, name: str) -> None:
    """Every class has `shots` samples."""
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < shots:
        few = np.flatnonzero(counts < shots)
        raise UserError(
            f"{name} labels: expected {shots} or more samples of each of {classes} classes, found {counts[few[0]]} of class {few[0]}"
            f" ({len(few)} such classes); add samples, or number the classes without them"
        )
