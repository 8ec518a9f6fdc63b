"""The optimizers by which CLIPs are trained: warm-up, cosine, clipping, and decay of matrices only."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from clip_jax.models.blocks import are_stacked, separate, stacked


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


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clips the gradient by its global norm, then the optimizer of `config.optimizer.name`, but for the learning rate.

    adamw: Loshchilov and Hutter 2019, arXiv 1711.05101.
    lion: the sign of the first moment, and no second (Chen et al. 2023, arXiv 2302.06675).
    lamb: adamw, and then each array's update is made as long as the array (You et al. 2019, arXiv 1904.00962).
    sgd: momentum b1, and no second moment.

    Decay is decoupled: no moment sees it.  Optax's own schedules count updates; this one goes by samples, so the step
    multiplies by minus the rate.
    """
    o = config.optimizer
    adam = optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=o.mu_dtype)
    lion = optax.scale_by_lion(o.b1, o.b2, mu_dtype=o.mu_dtype)
    momentum = optax.trace(o.b1, accumulator_dtype=o.mu_dtype)
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
    axes = lambda path, p: p.ndim - are_stacked([jax.tree_util.keystr(path, simple=True, separator="/")])
    return jax.tree.map_with_path(lambda path, p: axes(path, p) >= 2, params)


def by_block(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation that looks at whole arrays, each block by itself where they are stacked."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        found, state = inner.update(separate(updates), state, separate(params))
        return found if jax.tree.structure(found) == jax.tree.structure(updates) else stacked(found), state

    return optax.GradientTransformation(lambda params: inner.init(separate(params)), update)
