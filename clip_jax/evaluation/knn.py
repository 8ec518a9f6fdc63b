"""Classification by the nearest of labelled features: k-NN, as CLIP's features are judged without any training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.probe import checked, need_samples
from clip_jax.evaluation.rows import block, blocks, by_rows, put, split
from clip_jax.evaluation.scores import recall, share
from clip_jax.sharding import data_mesh

BLOCK = 512  # test samples whose similarities with a block of training samples are held at once


def knn(
    train_features: Float[np.ndarray, "N D"],
    train_labels: Int[np.ndarray, "N"],
    test_features: Float[np.ndarray, "M _"],
    test_labels: Int[np.ndarray, "M"],
    classes: int,
    k: int = 20,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """The class that is most frequent among the `k` training samples of highest cosine.

    Ties: of equally frequent classes, the one with the nearest sample; of equally near samples, the earlier one.
    No more than a block of similarities is held, whatever N and M.

    Returns:
      `knn_acc1` and `knn_mean_per_class_recall`, with chance and interval as in scores.py, and `k`.
    """
    train_features, train_labels = checked("train", train_features, train_labels, classes)
    test_features, test_labels = checked("test", test_features, test_labels, classes, train_features)
    need_samples(train_labels, classes, 1, "training")
    if not 1 <= k <= len(train_labels):
        raise UserError(f"k: expected 1 to {len(train_labels)}, the number of training samples, found {k}")
    mesh, train, test = mesh or data_mesh(), _unit("train", train_features), _unit("test", test_features)
    whole = jax.make_array_from_callback(train.shape, NamedSharding(mesh, PartitionSpec()), train.__getitem__)
    found = np.asarray(_neighbours(whole, split(test, mesh), k, mesh))[: len(test)]
    votes = train_labels[found]
    predicted = np.empty_like(test_labels)
    for i in range(0, len(votes), BLOCK):
        some = votes[i : i + BLOCK]
        shares = (some[:, :, None] == some[:, None, :]).sum(axis=2)  # how many of the k have each one's class
        predicted[i : i + BLOCK] = some[np.arange(len(some)), shares.argmax(axis=1)]  # of equals, the nearest
    right = predicted == test_labels
    return share("knn_acc1", right, 1 / classes) | recall("knn_mean_per_class_recall", right, test_labels, classes) | {"k": k}


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def _neighbours(train: Float[Array, "N D"], test: Float[Array, "M D"], k: int, mesh: Mesh) -> Int[Array, "M k"]:
    """The rows of `train` with the highest products, highest first; of equals, the earlier row first."""

    def of_block(i, found, train, test):
        (queries,), _ = block(i, test, size=BLOCK)

        def merge(j, best):
            (x, rows), fresh = block(j, train, jnp.arange(len(train)))
            similarity = jnp.where(fresh[None], jnp.dot(queries, x.T, precision="highest"), -jnp.inf)
            # The best so far come from earlier rows, and `top_k` prefers what stands first.
            scores = jnp.concatenate([best[0], similarity], axis=1)
            rows = jnp.concatenate([best[1], jnp.broadcast_to(rows[None], similarity.shape)], axis=1)
            scores, places = jax.lax.top_k(scores, k)
            return scores, jnp.take_along_axis(rows, places, axis=1)

        none = (jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32))
        return put(found, i, jax.lax.fori_loop(0, blocks(train), merge, none)[1], size=BLOCK)

    def on_device(train, test):
        found = jnp.zeros((len(test), k), jnp.int32)
        return jax.lax.fori_loop(0, blocks(test, BLOCK), lambda i, found: of_block(i, found, train, test), found)

    return by_rows(on_device, mesh)(train, test)


def _unit(name: str, features: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise UserError(f"{name} features: expected directions, found only zeros in row {int(lengths.argmin())}; encode that sample again")
    return features / lengths
