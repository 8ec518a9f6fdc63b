"""The image tower of CLIP's ResNets (Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py:ModifiedResNet`).

Three changes to a ResNet-50: a stem of three 3x3 convolutions with an average pool; strides that are
average pools before a 1x1 convolution (anti-aliased), in the block and in its shortcut; and attention
pooling, with the mean of the feature map as its query, in place of the global mean.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clip_jax.models.architectures import ResNetConfig
from clip_jax.models.convolution import ConvolutionNorm
from clip_jax.models.transformer import Linear

EXPANSION = 4  # channels out of a bottleneck, over those of its 3x3 convolution


class ModifiedResNet(nnx.Module):
    """Images to features of the shared space."""

    def __init__(self, config: ResNetConfig, embedding: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.width
        stem = ((3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1))
        self.stem = nnx.List(
            [ConvolutionNorm(channels, features, 3, stride, rngs=rngs) for channels, features, stride in stem]
        )
        blocks, channels = [], width
        for stage, count in enumerate(config.layers):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, width * 2**stage, stride, rngs=rngs))
                channels = EXPANSION * width * 2**stage
        self.blocks = nnx.List(blocks)
        positions = (config.image_size // config.stride) ** 2
        self.pool = AttentionPool(positions, channels, config.heads, embedding, dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """Features, not normalised, in float32.  `images` are normalised by the model's mean and std."""
        return self.pool.out(self.pooled(images)).astype(jnp.float32)

    def pooled(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """What is projected: the values to which the attention pool attends."""
        return self.pool(self.feature_map(images))

    def feature_map(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """What the attention pool sees."""
        x = images.astype(self.dtype)
        for convolution in self.stem:
            x = jax.nn.relu(convolution(x))
        x = average_pool(x)
        for block in self.blocks:
            x = block(x)
        return x


class Bottleneck(nnx.Module):
    """1x1, 3x3, pool if there is a stride, 1x1; a shortcut; ReLU."""

    def __init__(self, channels: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.stride = stride
        self.reduce = ConvolutionNorm(channels, width, 1, 1, rngs=rngs)
        self.convolve = ConvolutionNorm(width, width, 3, 1, rngs=rngs)
        self.expand = ConvolutionNorm(width, EXPANSION * width, 1, 1, gain=0.0, rngs=rngs)
        changes_shape = stride > 1 or channels != EXPANSION * width
        self.shortcut = (
            ConvolutionNorm(channels, EXPANSION * width, 1, 1, rngs=rngs) if changes_shape else None
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        pool = average_pool if self.stride > 1 else lambda x: x
        y = jax.nn.relu(self.reduce(x))
        y = jax.nn.relu(self.convolve(y))
        y = self.expand(pool(y))
        if self.shortcut is not None:
            x = self.shortcut(pool(x))
        return jax.nn.relu(x + y)


class AttentionPool(nnx.Module):
    """One multi-head attention over the feature map, with its mean as the only query that is read; `out` follows."""

    def __init__(self, positions: int, width: int, heads: int, embedding: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.heads = heads
        normal = nnx.initializers.normal(width**-0.5)
        self.position_embedding = nnx.Param(normal(rngs.params(), (positions + 1, width)))
        linear = lambda features: Linear(width, features, dtype=dtype, kernel_init=normal, rngs=rngs)
        self.query, self.key, self.value, self.out = linear(width), linear(width), linear(width), linear(embedding)

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B D"]:
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        x = x + self.position_embedding[...][None].astype(x.dtype)
        heads = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        y = jax.nn.dot_product_attention(heads(self.query(x[:, :1])), heads(self.key(x)), heads(self.value(x)))
        return y.reshape(len(x), -1)


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Means of 2x2 squares."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))
