"""The contrastive loss: arrays in, numbers out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def clip_loss(
    image_features: Float[Array, "B E"], text_features: Float[Array, "B E"], logit_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """Symmetric cross-entropy over the similarity matrix of the whole batch, in nats.

    Row i of `image_features` and row i of `text_features` are a pair; every other row is a negative.
    Under `jax.jit` with the batch sharded over a mesh, B is the batch of all devices: the matrix is
    the all-device one, and XLA adds the all-gathers.

    Args:
      image_features: of length one.
      text_features: of length one.
      logit_scale: exponentiated, 1 / temperature.

    Source: Radford et al. 2021 (arXiv 2103.00020), figure 3.
    """
    image_features, text_features = image_features.astype(jnp.float32), text_features.astype(jnp.float32)
    logits = logit_scale * image_features @ text_features.T
    # The diagonal, without indexing into a sharded matrix: that would gather it.
    positives = logit_scale * jnp.sum(image_features * text_features, axis=-1)
    image_loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positives)
    text_loss = jnp.mean(jax.nn.logsumexp(logits, axis=0) - positives)
    return (image_loss + text_loss) / 2
