"""The image tower of the embedded data: a residual network of basic blocks (He et al. 2015), with mean pooling.

For pictures of 32 pixels and minutes of two cores it learns faster than either of the large models'
towers in miniature (docs/emoji.md).  Its first layers normalise half of their channels picture by
picture, so that what it learns from some illustrators holds for another.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clip_jax.models.architectures import SmallResNetConfig
from clip_jax.models.convolution import ConvolutionNorm
from clip_jax.models.transformer import Linear


class SmallResNet(nnx.Module):
    """Images to features of the shared space."""

    def __init__(self, config: SmallResNetConfig, embedding: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        first, *others = config.channels
        self.stem = ConvolutionNorm(3, first, 3, 2, style_free=True, rngs=rngs)
        pairs = zip(config.channels, others)
        self.blocks = nnx.List(
            [BasicBlock(channels, features, index == 0, rngs=rngs) for index, (channels, features) in enumerate(pairs)]
        )
        width = config.channels[-1]
        init = nnx.initializers.normal(width**-0.5)
        self.projection = Linear(width, embedding, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """Features, not normalised, in float32.  `images` are normalised by the model's mean and std."""
        return self.projection(self.pooled(images)).astype(jnp.float32)

    def pooled(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """What is projected: the mean of the feature map."""
        return self.feature_map(images).mean(axis=(1, 2))

    def feature_map(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """What is averaged."""
        x = jax.nn.relu(self.stem(images.astype(self.dtype)))
        for block in self.blocks:
            x = block(x)
        return x


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions, the first with stride 2, and a shortcut."""

    def __init__(self, channels: int, features: int, style_free: bool, *, rngs: nnx.Rngs):
        self.first = ConvolutionNorm(channels, features, 3, 2, style_free=style_free, rngs=rngs)
        self.second = ConvolutionNorm(features, features, 3, 1, rngs=rngs)
        self.shortcut = ConvolutionNorm(channels, features, 1, 2, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        y = self.second(jax.nn.relu(self.first(x)))
        return jax.nn.relu(self.shortcut(x) + y)
