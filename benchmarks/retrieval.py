"""Retrieval among 200,000 pictures and as many texts: peak memory, time, and the dense computation on some of the queries.

    python benchmarks/retrieval.py [PAIRS [WIDTH]]

Features are random, each text's near its picture's, so that ranks are spread.  The similarity matrix of 200,000 x 200,000
would be 160 GB.  The dense side counts, for a few hundred queries, in float64 with NumPy, how many are before the right one;
where float32 and float64 order two keys differently, which is within rounding of a tie, it says how near they were.
"""

import pathlib
import resource
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from clip_jax.evaluation.scores import ranks_of, retrieval_metrics
from clip_jax.sharding import data_mesh

COMPARED = 400  # queries of each direction


def pairs(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images, texts = np.empty((count, width), np.float32), np.empty((count, width), np.float32)
    for start in range(0, count, 4096):
        part = slice(start, start + 4096)
        images[part], texts[part] = unit(rng.standard_normal(images[part].shape)), unit(rng.standard_normal(images[part].shape))
        # Of each pair the cosine is about 0.18: near the largest of so many by chance.
        texts[part] = unit(images[part] + 5.5 * texts[part])
    return images, texts


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def dense(queries: np.ndarray, keys: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks in float64, and of each query how near the key closest to the right one is."""
    ranks, near = np.zeros(len(queries), int), np.full(len(queries), np.inf)
    best = (queries.astype(np.float64) * keys[own]).sum(axis=1, keepdims=True)
    for start in range(0, len(keys), 4096):
        cosines = queries.astype(np.float64) @ keys[start : start + 4096].T.astype(np.float64)
        other = np.arange(start, start + cosines.shape[1])[None] != own[:, None]
        ranks += ((cosines >= best) & other).sum(axis=1)
        near = np.minimum(near, np.where(other, np.abs(cosines - best), np.inf).min(axis=1))
    return ranks, near


def main(count: int = 200_000, width: int = 512) -> None:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    mesh = data_mesh()
    images, texts = pairs(count, width)
    owners = np.arange(count)
    print(f"jax {jax.__version__}, {len(jax.devices())} {jax.devices()[0].platform} device(s); {count:,} x {count:,} of {width} numbers")
    print(f"peak memory of the process with the features, {2 * images.nbytes / 2**30:.2f} GiB, made: {peak():.2f} GiB")
    start = time.perf_counter()
    metrics = retrieval_metrics(images, texts, owners, mesh)
    print(f"retrieval_metrics, both directions: {time.perf_counter() - start:,.0f} s; peak memory of the process {peak():.2f} GiB")
    print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "_chance" not in name and "_interval" not in name))
    some = np.linspace(0, count - 1, COMPARED).astype(int)
    for name, queries, keys in (("texts", texts, images), ("pictures", images, texts)):
        found = ranks_of(queries[some], keys, some, owners, mesh)
        expected, near = dense(queries[some], keys, some)
        other = found != expected
        how = f", by at most {np.abs(found - expected).max()}, where a cosine was within {near[other].max():.1e}" if other.any() else ""
        print(f"{COMPARED} {name}: ranks {found.min():,} to {found.max():,}; {other.sum()} differ from the dense ones{how}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
