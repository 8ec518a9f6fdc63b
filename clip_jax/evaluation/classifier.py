"""A zero-shot classifier from prompts (Radford et al. 2021, 3.1.4; openai/CLIP `Prompt_Engineering_for_ImageNet.ipynb`)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from clip_jax.evaluation.encoder import Encoder
from clip_jax.evaluation.scores import ranks_of
from clip_jax.models.clip import l2_normalize


def zero_shot_classifier(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "C E"]:
    """One normalised text feature a class: the mean over its prompts, each normalised before."""
    return np.asarray(l2_normalize(jnp.asarray(encoder.prompts(names, templates).mean(axis=1))))


def class_ranks(
    encoder: Encoder, image_features: Float[np.ndarray, "N E"], classifier: Float[np.ndarray, "C E"], labels: Int[np.ndarray, "N"]
) -> Int[np.ndarray, "N"]:
    """How many classes are before a picture's own; of classes with one name, such as ImageNet's two "missile", the first is."""
    return ranks_of(image_features, classifier, labels, np.arange(len(classifier), dtype=labels.dtype), encoder.mesh, first_wins=True)
