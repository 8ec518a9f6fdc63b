"""The blocks of a transformer's parameters: each by itself, as a model has them, or stacked, as a state of `scan_layers` does.

Stacked, a step is compiled, and its optimizer runs, over a dozen arrays however deep the towers are.  Only states are; models,
other layouts and what PyTorch reads have each block by itself.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

Params = Any  # nested dictionaries, or what holds several of them


def stacked(params: Params) -> Params:
    """With every transformer's blocks along a new first axis."""
    stack = lambda *leaves: jnp.stack(leaves)
    return _of_transformers(params, lambda blocks: jax.tree.map(stack, *(blocks[i] for i in range(len(blocks)))) if 0 in blocks else blocks)


def are_stacked(names: Iterable[str]) -> bool:
    """Whether the blocks among the arrays of these paths, with / between, are stacked."""
    return any(re.search(r"transformer/blocks/[a-z]", name) for name in names)


def separate(params: Params) -> Params:
    """The inverse of `stacked`; what is not stacked stays as it is."""

    def unstack(blocks: dict) -> dict:
        if 0 in blocks:
            return blocks
        leaves, structure = jax.tree.flatten(blocks)
        # A split, for its gradient is one concatenation, where those of slices would be as many sums.
        parts = [jax.lax.split(leaf, [1] * len(leaf)) for leaf in leaves]
        rows = [[part.reshape(part.shape[1:]) for part in of_leaf] for of_leaf in parts]
        return {i: jax.tree.unflatten(structure, block) for i, block in enumerate(zip(*rows, strict=True))}

    return _of_transformers(params, unstack)


def _of_transformers(params: Params, change: Callable[[dict], dict]) -> Params:
    if isinstance(params, tuple):  # of an optimizer, or a whole state
        parts = [_of_transformers(part, change) for part in params]
        return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
    if not isinstance(params, dict):
        return params
    if "transformer" in params:
        blocks = params["transformer"]["blocks"]
        params = params | {"transformer": params["transformer"] | {"blocks": change(blocks)}}
    return {name: value if name == "transformer" else _of_transformers(value, change) for name, value in params.items()}
