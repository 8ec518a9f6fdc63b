"""The architectures: what a CLIP is made of, and the named sizes it comes in."""

from clip_jax.models.architectures import ARCHITECTURES as ARCHITECTURES
from clip_jax.models.architectures import CLIPConfig as CLIPConfig
from clip_jax.models.clip import CLIP as CLIP
