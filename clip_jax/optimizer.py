"""AdamW as CLIP is trained: warm-up, cosine, clipping, and decay of matrices only."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


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
    """Clips the gradient by its global norm, then AdamW, but for the learning rate.

    Optax's own schedules count updates; this one goes by samples, so the step multiplies by minus the rate.
    """
    o = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.gradient_clip),
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        optax.add_decayed_weights(o.weight_decay, decayed),
    )


def decayed(params: Any) -> Any:
    """Which parameters decay: those with two axes or more.

    That spares gains, biases, logit_scale and the class embedding, as open_clip's rule does
    (`training/main.py`), and keeps the token and position embeddings, as it does too.
    """
    return jax.tree.map(lambda p: p.ndim >= 2, params)
