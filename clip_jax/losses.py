"""The contrastive losses: arrays in, numbers out.

Row i of `image_features` and row i of `text_features` are a pair.  Each loss has two forms, which are equal:

- plain: the whole similarity matrix, as the papers write it.  Under `jax.jit` with the batch sharded over a
  mesh, B is the batch of all devices, and XLA adds the all-gathers;
- ring: the texts travel around a ring of devices, and each device compares its images with those that visit,
  a block of the matrix at a time.  Gradients recompute the blocks, so that no more than one is ever held, and
  memory grows with a device's own part of the batch alone.  Many devices form several rings: each then holds
  the images of its neighbours in the others too, and texts travel around one ring only.

Products are taken in the type of the features, and everything else in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

Features = Float[Array, "B E"]
Scalar = Float[Array, ""]
Groups = Int[Array, "B"]

# Rows of a block of the similarity matrix.  On CPUs it stays in the cache; accelerators want larger products.
BLOCK = {"cpu": 1024, "gpu": 8192, "tpu": 2048}

# Up to here the plain form is taken, which does without the recomputation: three matrix products instead of four.
PLAIN_BYTES = 2**26

# The images of so many bytes, its neighbours' and its own, a device may hold in the ring form.  N rings of M devices send
# (N + M) / (N M) of what one ring of all sends.
NEIGHBOURS_BYTES = 2**26

# In the place of a logit that does not exist.  A finite one, so that no difference of two is NaN.
NONE = -1e30


def clip_loss(
    image_features: Features, text_features: Features, logit_scale: Scalar, groups: Groups | None = None
) -> Scalar:
    """Symmetric cross-entropy over the similarity matrix of the whole batch, in nats.

    Args:
      image_features: of length one.
      text_features: of length one.
      logit_scale: exponentiated, 1 / temperature.
      groups: rows with the same number are positives of each other, as duplicates of a caption are, and share the
        target evenly; without it every other row is a negative.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3; with groups, Khosla et al. 2020 (arXiv 2004.11362), L_out.
    """
    image_features, text_features = image_features.astype(jnp.float32), text_features.astype(jnp.float32)
    logits = logit_scale * image_features @ text_features.T
    if groups is None:
        # The diagonal, without indexing into a sharded matrix: that would gather it.
        positives = logit_scale * jnp.sum(image_features * text_features, axis=-1)
    else:
        same = (groups[:, None] == groups[None, :]).astype(jnp.float32)
        positives = jnp.sum(same * logits, axis=1) / jnp.sum(same, axis=1)
    image_loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positives)
    text_loss = jnp.mean(jax.nn.logsumexp(logits, axis=0) - positives)
    return (image_loss + text_loss) / 2


def siglip_loss(
    image_features: Features,
    text_features: Features,
    logit_scale: Scalar,
    logit_bias: Scalar,
    groups: Groups | None = None,
) -> Scalar:
    """Binary cross-entropy of every image with every text, summed over the matrix and divided by B, in nats.

    Args:
      logit_bias: is added to every logit.
      The others are those of `clip_loss`; every pair within a group is a positive.

    Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1.
    """
    image_features, text_features = image_features.astype(jnp.float32), text_features.astype(jnp.float32)
    groups = jnp.arange(len(image_features)) if groups is None else groups
    logits = logit_scale * image_features @ text_features.T + logit_bias
    against = jnp.where(groups[:, None] == groups[None, :], -logits, logits)
    return jnp.mean(jnp.sum(jax.nn.softplus(against), axis=1))


def ring_clip_loss(
    image_features: Features,
    text_features: Features,
    logit_scale: Scalar,
    groups: Groups | None = None,
    *,
    mesh: Mesh,
    axis: str | tuple[str, ...],
) -> Scalar:
    """`clip_loss`, in the ring form.

    Args:
      mesh: whose `axis`, one or several, the batch is sharded over.
    """
    return _softmax(_sides(image_features, text_features, groups), logit_scale.astype(jnp.float32), mesh, _axes(axis))


def ring_siglip_loss(
    image_features: Features,
    text_features: Features,
    logit_scale: Scalar,
    logit_bias: Scalar,
    groups: Groups | None = None,
    *,
    mesh: Mesh,
    axis: str | tuple[str, ...],
) -> Scalar:
    """`siglip_loss`, in the ring form; `mesh` and `axis` as in `ring_clip_loss`."""
    groups = jnp.arange(len(image_features)) if groups is None else groups
    sides, scale, bias = _sides(image_features, text_features, groups), logit_scale, logit_bias
    return _sigmoid(sides, scale.astype(jnp.float32), bias.astype(jnp.float32), mesh, _axes(axis))


def predicted_bytes(batch: int, embedding: int, devices: int, platform: str) -> dict[str, int]:
    """Temporary bytes a device that each form of the loss and its gradient takes, by its name."""
    rows = batch // devices
    matrix = 2 * rows * batch  # the logits, and their gradient
    gathered = batch * embedding if devices > 1 else 0  # the texts of all, and later also their gradient
    block = min(rows, BLOCK[platform])
    travelling = 4 if devices > 1 else 0  # the features and gradients that are here, and those that come
    neighbours = 2 * rings if (rings := _rings(devices, 4 * rows * embedding)) > 1 else 0  # features and gradients
    return {
        "plain": 4 * max(matrix + gathered, 2 * gathered),
        "ring": 4 * (3 * block * block + (2 + travelling + neighbours) * rows * embedding),
    }


# Softmax.  Two turns of the ring: the first finds the log-sum-exp of every row and, travelling with the texts, of
# every column; the second, for gradients, recomputes each block and multiplies it with the features of either side.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _softmax(sides: dict, scale: Scalar, mesh: Mesh, axis: tuple[str, ...]) -> Scalar:
    return _softmax_forward(sides, scale, mesh, axis)[0]


def _softmax_forward(sides: dict, scale: Scalar, mesh: Mesh, axis: tuple[str, ...]):
    grouped = "group" in sides["images"]

    def block(image, row, text, column):
        logits = _masked(scale * _product(image["x"], text["x"].T), image, text)
        if grouped:
            same = _same(image, text)
            row |= {
                "count": row["count"] + jnp.sum(same, axis=1, dtype=jnp.float32),
                "positive": row["positive"] + jnp.sum(jnp.where(same, logits, 0), axis=1),
            }
        return row | _add_exponentials(row, logits, 1), _add_exponentials(column, logits, 0)

    def on_device(images, texts, scale):
        batch = len(images["x"])
        start = {"max": jnp.full(batch, NONE), "sum": jnp.zeros(batch)}
        counts = {"count": jnp.zeros(batch), "positive": jnp.zeros(batch)} if grouped else {}
        row, column = _ring(axis, mesh, block, images, start | counts, texts, start)
        row_lse, column_lse = (side["max"] + jnp.log(side["sum"]) for side in (row, column))
        if grouped:
            count, positive = row["count"], row["positive"] / row["count"]
        else:
            pairs = images["x"].astype(jnp.float32) * texts["x"].astype(jnp.float32)
            count, positive = jnp.ones(batch), scale * jnp.sum(pairs, axis=1)
        loss = jax.lax.pmean(jnp.mean((row_lse + column_lse) / 2 - positive), axis)
        return loss, images | {"lse": row_lse, "count": count}, texts | {"lse": column_lse}

    batch, whole = PartitionSpec(axis), PartitionSpec()
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(batch, batch, whole), out_specs=(whole, batch, batch), check_vma=False
    )
    loss, images, texts = run(sides["images"], sides["texts"], scale)
    return loss, (images, texts, scale)


def _softmax_backward(mesh: Mesh, axis: tuple[str, ...], residuals, cotangent: Scalar):
    images, texts, scale = residuals
    grouped = "group" in images

    def block(image, row, text, column):
        logits = scale * _product(image["x"], text["x"].T)
        slope = jnp.exp(logits - image["lse"][:, None]) + jnp.exp(logits - text["lse"][None, :])
        if grouped:
            slope -= jnp.where(_same(image, text), 2 / image["count"][:, None], 0)
        return _add_gradients(row, column, _masked(slope, image, text, 0.0), image, text)

    def on_device(images, texts, scale, cotangent):
        zeros = {"gradient": jnp.zeros(images["x"].shape)}
        row, column = _ring(axis, mesh, block, images, zeros, texts, zeros)
        pairs = 0.0 if grouped else 2.0
        share = cotangent / (2 * len(images["x"]) * jax.lax.axis_size(axis))
        rows = share * (row["gradient"] - pairs * texts["x"].astype(jnp.float32))
        columns = share * (column["gradient"] - pairs * images["x"].astype(jnp.float32))
        # Every logit is the scale times a product of features, so this is the sum over all of them.
        of_scale = jax.lax.psum(jnp.sum(rows * images["x"].astype(jnp.float32)), axis)
        return (scale * rows).astype(images["x"].dtype), (scale * columns).astype(texts["x"].dtype), of_scale

    batch, whole = PartitionSpec(axis), PartitionSpec()
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(batch, batch, whole, whole), out_specs=(batch, batch, whole), check_vma=False
    )
    of_images, of_texts, of_scale = run(images, texts, scale, cotangent)
    return _like(images, of_images, texts, of_texts), of_scale


_softmax.defvjp(_softmax_forward, _softmax_backward)


# Sigmoid.  Each logit stands alone, so one turn finds the loss and, where they are wanted, all gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sigmoid(sides: dict, scale: Scalar, bias: Scalar, mesh: Mesh, axis: tuple[str, ...]) -> Scalar:
    return _sigmoid_turn(sides, scale, bias, mesh, axis, differentiate=False)[0]


def _sigmoid_turn(
    sides: dict, scale: Scalar, bias: Scalar, mesh: Mesh, axis: tuple[str, ...], differentiate: bool
) -> tuple[Scalar, Any]:
    def on_device(images, texts, scale, bias):
        def block(image, row, text, column):
            logits = scale * _product(image["x"], text["x"].T) + bias
            same = _same(image, text)
            against = _masked(jnp.where(same, -logits, logits), image, text)
            row = row | {"loss": row["loss"] + jnp.sum(jax.nn.softplus(against), axis=1)}
            if not differentiate:
                return row, column
            slope = jax.nn.sigmoid(against) * jnp.where(same, -1.0, 1.0)
            row |= {"slope": row["slope"] + jnp.sum(slope, axis=1)}
            with_row, column = _add_gradients(row, column, slope, image, text)
            return row | with_row, column

        batch = len(images["x"])
        zeros = {"gradient": jnp.zeros(images["x"].shape)} if differentiate else {}
        start = zeros | {"loss": jnp.zeros(batch)} | ({"slope": jnp.zeros(batch)} if differentiate else {})
        row, column = _ring(axis, mesh, block, images, start, texts, zeros)
        loss = jax.lax.pmean(jnp.mean(row["loss"]), axis)
        if not differentiate:
            return loss, None
        share = 1 / (batch * jax.lax.axis_size(axis))
        rows, columns = share * row["gradient"], share * column["gradient"]
        of_scale = jax.lax.psum(jnp.sum(rows * images["x"].astype(jnp.float32)), axis)
        return loss, (scale * rows, scale * columns, of_scale, jax.lax.psum(share * jnp.sum(row["slope"]), axis))

    batch, whole = PartitionSpec(axis), PartitionSpec()
    gradients = (batch, batch, whole, whole) if differentiate else None
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=(batch, batch, whole, whole), out_specs=(whole, gradients), check_vma=False
    )
    return run(sides["images"], sides["texts"], scale, bias)


def _sigmoid_forward(sides: dict, scale: Scalar, bias: Scalar, mesh: Mesh, axis: tuple[str, ...]):
    loss, gradients = _sigmoid_turn(sides, scale, bias, mesh, axis, differentiate=True)
    return loss, (sides, gradients)


def _sigmoid_backward(mesh: Mesh, axis: tuple[str, ...], residuals, cotangent: Scalar):
    sides, (rows, columns, of_scale, of_bias) = residuals
    images, texts = sides["images"], sides["texts"]
    rows, columns = ((cotangent * g).astype(side["x"].dtype) for g, side in ((rows, images), (columns, texts)))
    return _like(images, rows, texts, columns), cotangent * of_scale, cotangent * of_bias


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


# What both have in common.  A side is what belongs to the images or to the texts: features `x`, and perhaps `group`.
# `rows` and `columns` accumulate over the blocks of a row or a column of the similarity matrix.


def _sides(image_features: Features, text_features: Features, groups: Groups | None) -> dict:
    group = {} if groups is None else {"group": groups}
    return {"images": {"x": image_features} | group, "texts": {"x": text_features} | group}


def _like(images: dict, of_images: Array, texts: dict, of_texts: Array) -> dict:
    """The cotangent of `_sides`: groups are integers, and have none."""
    none = lambda side: {"group": jnp.zeros(side["group"].shape, jax.dtypes.float0)} if "group" in side else {}
    return {"images": {"x": of_images} | none(images), "texts": {"x": of_texts} | none(texts)}


def _axes(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis


def _rings(devices: int, size: int) -> int:
    """How many rings the devices form: at most as many as a ring has members, each with images of `size` bytes."""
    possible = (n for n in range(1, devices + 1) if devices % n == 0 and n * n <= devices and n * size <= NEIGHBOURS_BYTES)
    return max(possible, default=1)


def _ring(axis: tuple[str, ...], mesh: Mesh, block: Callable, images: dict, rows: dict, texts: dict, columns: dict):
    """Texts visit the devices of their ring, and their columns with them, until these are home again.

    Args:
      block: (images, rows, texts, columns) -> (rows, columns), of one block.

    Returns:
      rows and columns, over all blocks.
    """
    batch, devices = len(images["x"]), jax.lax.axis_size(axis)
    rings = _rings(devices, images["x"].nbytes)
    size = min(batch, BLOCK[mesh.devices.flat[0].platform])
    images, rows, texts, columns = (_in_blocks(side, size) for side in (images, rows, texts, columns))
    if batch % size:
        valid = _in_blocks(jnp.ones(batch, bool), size)
        images, texts = images | {"valid": valid}, texts | {"valid": valid}
    if rings > 1:
        neighbours = [list(range(first, first + rings)) for first in range(0, devices, rings)]
        gather = functools.partial(jax.lax.all_gather, axis_name=axis, axis_index_groups=neighbours, tiled=True)
        images, rows = jax.tree.map(gather, images), jax.tree.map(lambda x: jnp.concatenate([x] * rings), rows)

    def visit(rows, texts, columns):
        def with_texts(rows, text_and_column):
            text, column = text_and_column

            def with_images(column, image_and_row):
                row, column = block(*image_and_row, text, column)
                return column, row

            column, rows = jax.lax.scan(with_images, column, (images, rows))
            return rows, column

        return jax.lax.scan(with_texts, rows, (texts, columns))

    def turn(_, carried):
        rows, texts, columns = carried
        following = to_next(texts)  # before the visit, which takes the time that this needs
        rows, columns = visit(rows, texts, columns)
        return rows, following, to_next(columns)

    next_device = [(i, (i + rings) % devices) for i in range(devices)]
    to_next = lambda tree: jax.tree.map(lambda x: jax.lax.ppermute(x, axis, next_device), tree)
    if devices > 1:
        rows, texts, columns = jax.lax.fori_loop(0, devices // rings - 1, turn, (rows, texts, columns))
    rows, columns = visit(rows, texts, columns)
    if devices > 1:
        columns = to_next(columns)
    if rings > 1:
        rows = _reduce_scatter(rows, axis, neighbours)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:batch], (rows, columns))


def _reduce_scatter(rows: dict, axis: tuple[str, ...], neighbours: list[list[int]]) -> dict:
    """To each device the rows of its own images, from what its neighbours and itself found for all of theirs."""
    own = {}
    if "max" in rows:
        rings, largest = len(neighbours[0]), jax.lax.pmax(rows["max"], axis, axis_index_groups=neighbours)
        rows = rows | {"sum": rows["sum"] * jnp.exp(rows.pop("max") - largest)}
        own["max"] = largest.reshape(rings, -1, largest.shape[-1])[jax.lax.axis_index(axis) % rings]
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, axis_index_groups=neighbours, tiled=True)
    return own | jax.tree.map(scatter, rows)


def _in_blocks(side: Any, size: int) -> Any:
    """Leading axes [B] as [blocks, size], the last filled up with zeros."""

    def blocks(x: Array) -> Array:
        filled = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(blocks, side)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _masked(block: Float[Array, "I T"], image: dict, text: dict, fill: float = NONE) -> Float[Array, "I T"]:
    """A block without what was filled up."""
    if "valid" not in image:
        return block
    return jnp.where(image["valid"][:, None] & text["valid"][None, :], block, fill)


def _same(image: dict, text: dict) -> Array:
    same = image["group"][:, None] == text["group"][None, :]
    return same & image["valid"][:, None] & text["valid"][None, :] if "valid" in image else same


def _add_exponentials(side: dict, logits: Float[Array, "I T"], axis: int) -> dict:
    """Goes on with a log-sum-exp over the blocks: the largest so far, and the sum of exponentials below it."""
    largest = jnp.maximum(side["max"], jnp.max(logits, axis=axis))
    exponentials = jnp.exp(logits - jnp.expand_dims(largest, axis))
    return {"max": largest, "sum": side["sum"] * jnp.exp(side["max"] - largest) + jnp.sum(exponentials, axis=axis)}


def _add_gradients(row: dict, column: dict, slope: Float[Array, "I T"], image: dict, text: dict) -> tuple[dict, dict]:
    """Goes on with the gradients of the features, but for the scale."""
    slope = slope.astype(image["x"].dtype)
    rows = row["gradient"] + _product(slope, text["x"])
    columns = column["gradient"] + _product(slope.T, image["x"])
    return {"gradient": rows}, {"gradient": columns}
