"""Top-k accuracy, recall of classes and of retrieval, each with its chance level and a confidence interval.

Metrics have the names that CLIP_benchmark gives them.  NAME_chance is what guessing gives on average, NAME_interval the half width
of the 95 % interval of a share of so many pictures (normal approximation).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import UserError
from clip_jax.sharding import BATCH

Z = 1.959964  # of the 95 % interval
ROWS = 2**24  # elements of the similarity matrix that are in memory at once, on each device


def share(name: str, hits: Bool[np.ndarray, "N"], chance: float) -> dict[str, float]:
    """The mean of hits, with its chance level and interval."""
    mean = float(hits.mean())
    return {name: mean, f"{name}_chance": min(1.0, chance), f"{name}_interval": Z * float(np.sqrt(mean * (1 - mean) / len(hits)))}


def classification_metrics(ranks: Int[np.ndarray, "N"], labels: Int[np.ndarray, "N"], classes: int) -> dict[str, float]:
    """`acc1`, `acc5` and `mean_per_class_recall`, the latter over the classes that occur, as scikit-learn's balanced accuracy.

    Args:
      ranks: how many classes are before the true one.
    """
    metrics = share("acc1", ranks < 1, 1 / classes) | share("acc5", ranks < 5, 5 / classes)
    return metrics | recall("mean_per_class_recall", ranks < 1, labels, classes)


def recall(name: str, right: Bool[np.ndarray, "N"], labels: Int[np.ndarray, "N"], classes: int) -> dict[str, float]:
    """The mean per-class recall, with its chance level."""
    return {name: mean_per_class_recall(right, labels), f"{name}_chance": 1 / classes}


def mean_per_class_recall(right: Bool[np.ndarray, "N"], labels: Int[np.ndarray, "N"]) -> float:
    """The mean over the classes that `labels` has of the share of their samples that are right."""
    counts = np.bincount(labels)
    return float((np.bincount(labels[right], minlength=len(counts))[counts > 0] / counts[counts > 0]).mean())


def retrieval_metrics(
    image_features: Float[np.ndarray, "I E"], text_features: Float[np.ndarray, "T F"], owners: Int[np.ndarray, "T"], mesh: Mesh
) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank, counted from 1; `image_retrieval` finds the picture of a text, `text_retrieval` a text.

    Args:
      owners: the picture of each text.  Of several texts of a picture any counts as a hit.

    Raises:
      UserError: a picture without a text, or features of different widths.
    """
    pictures = np.arange(len(image_features), dtype=owners.dtype)
    if missing := sorted(set(pictures.tolist()) - set(owners.tolist())):
        raise UserError(f"retrieval: picture {missing[0]} and {len(missing) - 1} others have no text, expected at least one each")
    image_ranks = ranks_of(text_features, image_features, owners, pictures, mesh)
    text_ranks = ranks_of(image_features, text_features, pictures, owners, mesh)
    metrics = {}
    for k in (1, 5, 10):
        metrics |= share(f"image_retrieval_recall@{k}", image_ranks < k, k / len(pictures))
    # Of a picture with c texts, chance is that one of them is among k of all T.
    counts = np.bincount(owners, minlength=len(pictures))
    for k in (1, 5, 10):
        metrics |= share(f"text_retrieval_recall@{k}", text_ranks < k, float(_any_of(counts, len(owners), k).mean()))
    return metrics | {
        "image_retrieval_median_rank": float(np.median(image_ranks + 1)),
        "text_retrieval_median_rank": float(np.median(text_ranks + 1)),
    }


def _any_of(counts: Int[np.ndarray, "I"], total: int, k: int) -> Float[np.ndarray, "I"]:
    """The probability that k of `total`, drawn without replacement, hold at least one of `counts`."""
    none = np.ones(len(counts))
    for drawn in range(min(k, total)):
        none *= np.maximum(total - counts - drawn, 0) / (total - drawn)
    return 1 - none


def ranks_of(
    queries: Float[np.ndarray, "N E"],
    keys: Float[np.ndarray, "M F"],
    query_groups: Int[np.ndarray, "N"],
    key_groups: Int[np.ndarray, "M"],
    mesh: Mesh,
    first_wins: bool = False,
) -> Int[np.ndarray, "N"]:
    """How many keys of other groups are before the nearest of a query's own group.

    The similarity matrix is made some rows at a time, split over the devices.

    Args:
      first_wins: of keys that are equally near the one of the lower group is first, as argmax has it; else a tie counts against
        the query, so that a collapsed model finds nothing.

    Raises:
      UserError: the features are not finite, or of different widths.
    """
    if not (np.isfinite(queries).all() and np.isfinite(keys).all()):
        raise UserError("features that are not finite, expected numbers; the model has diverged, or its weights are damaged")
    if queries.shape[1] != keys.shape[1]:
        raise UserError(f"features of {queries.shape[1]} numbers and of {keys.shape[1]}, expected as many; they are of different models")
    devices = mesh.devices.size
    rows = max(1, min(ROWS // len(keys), -(-len(queries) // devices))) * devices
    whole = NamedSharding(mesh, PartitionSpec())
    put = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    keys, key_groups, found = put(keys, whole), put(key_groups, whole), []
    for start in range(0, len(queries), rows):
        part, groups = queries[start : start + rows], query_groups[start : start + rows]
        short = rows - len(part)  # padded with a group that no key has
        part, groups = np.pad(part, ((0, short), (0, 0))), np.pad(groups, (0, short), constant_values=-1)
        split = NamedSharding(mesh, PartitionSpec(BATCH))
        found.append(np.asarray(_ranks(mesh, first_wins)(put(part, split), put(groups, split), keys, key_groups))[: rows - short])
    return np.concatenate(found)


@functools.cache
def _ranks(mesh: Mesh, first_wins: bool):
    def ranks(
        queries: Float[Array, "n E"], query_groups: Int[Array, "n"], keys: Float[Array, "M E"], key_groups: Int[Array, "M"]
    ) -> Int[Array, "n"]:
        similarity = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
        own = query_groups[:, None] == key_groups[None]
        best = jnp.where(own, similarity, -jnp.inf).max(axis=1, keepdims=True)
        tied = (similarity == best) & ~own
        if first_wins:
            tied &= key_groups[None] < query_groups[:, None]
        return ((similarity > best) | tied).sum(axis=1)

    return jax.jit(ranks, out_shardings=NamedSharding(mesh, PartitionSpec()))
