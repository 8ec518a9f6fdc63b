"""The optimizers by which CLIPs are trained: warm-up, cosine, clipping, and decay of matrices only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from clip_jax.models.blocks import are_stacked


def make_schedule(config: ConfigDict) -> optax.Schedule:
    """The learning rate of each step: linear warm-up, then a cosine to zero at the last step.

    Steps are counted in batches of the size with which the run began, and may be a fraction (state.py).
    The first step already moves, by peak / warmup_steps, as in open_clip's `scheduler.py`.
    """
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    cosine = optax.cosine_decay_schedule(peak, config.total_steps - warmup)
    if not warmup:
        return cosine
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), cosine], [warmup])


def make_optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient by its global norm, then the optimizer of `config.optimizer.name`, but for the learning rate.

    adamw: Loshchilov and Hutter 2019, arXiv 1711.05101.
    lion: the sign of the first moment, and no second (Chen et al. 2023, arXiv 2302.06675).
    lamb: adamw, and then each array's update is made as long as the array (You et al. 2019, arXiv 1904.00962).
    sgd: momentum b1, and no second moment.

    Decay is decoupled: no moment sees it.  Optax's own schedules count updates; this one goes by samples, so the step
    multiplies by minus the rate.  With `update(..., finite=False)` moments stay what they were, and the update is to be
    left alone.
    """
    o = config.optimizer
    adam = kept_unless_finite(optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=o.mu_dtype))
    if o.mu_dtype == "float32":
        adam = scale_by_settled_adam(o.b1, o.b2, o.eps)
    lion = kept_unless_finite(optax.scale_by_lion(o.b1, o.b2, mu_dtype=o.mu_dtype))
    momentum = kept_unless_finite(optax.trace(o.b1, accumulator_dtype=o.mu_dtype))
    return optax.chain(
        optax.clip_by_global_norm(o.gradient_clip),
        {"adamw": adam, "lion": lion, "lamb": adam, "sgd": momentum}[o.name],
        optax.add_decayed_weights(o.weight_decay, decayed),
        *([by_block(optax.scale_by_trust_ratio())] if o.name == "lamb" else []),
    )


def decayed(params: Any) -> Any:
    """Which parameters decay: those with two axes or more.

    That spares gains, biases, logit_scale and the class embedding, as open_clip's rule does
    (`training/main.py`), and keeps the token and position embeddings, as it does too.
    """
    # Of stacked blocks the first axis counts them.
    return jax.tree.map_with_path(lambda path, p: p.ndim - _is_stacked(path) >= 2, params)


def kept_unless_finite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation whose state is replaced only where `finite` is true."""

    def update(updates: Any, state: Any, params: Any = None, *, finite: bool | Bool[Array, ""] = True) -> tuple[Any, Any]:
        updates, new = inner.update(updates, state, params)
        return updates, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def scale_by_settled_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose update is made of the moments as they are kept.

    Made of the old ones, as Optax's is, XLA's CPU compiler computes the new ones twice, and first copies the old ones out
    of the arrays into which the new ones go.
    """
    moments = kept_unless_finite(optax.scale_by_adam(b1, b2, eps))

    def update(updates: Any, state: Any, params: Any = None, *, finite: bool | Bool[Array, ""] = True) -> tuple[Any, Any]:
        _, state = moments.update(updates, state, params, finite=finite)
        # Other compilers write all of it in one pass.
        state = jax.lax.platform_dependent(state, cpu=jax.lax.optimization_barrier, default=lambda state: state)
        mean, square = (optax.tree.bias_correction(m, b, state.count) for m, b in ((state.mu, b1), (state.nu, b2)))
        return jax.tree.map(lambda mean, square: mean / (jnp.sqrt(square) + eps), mean, square), state

    return optax.GradientTransformationExtraArgs(moments.init, update)


def by_block(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation without a state that looks at whole arrays, each block by itself where they are stacked."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        alone = lambda update, param: inner.update(update, state, param)[0]
        # Taken apart, each block would have operations of its own: two towers of 48 compiled in 43 s, and do in 0.9.
        of_array = lambda path, update, param: (jax.vmap(alone) if _is_stacked(path) else alone)(update, param)
        return jax.tree.map_with_path(of_array, updates, params), state

    return optax.GradientTransformation(inner.init, update)


def _is_stacked(path: tuple) -> bool:
    return are_stacked([jax.tree_util.keystr(path, simple=True, separator="/")])
