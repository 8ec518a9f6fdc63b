"""A convolution and its normalisation, as the image towers use them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clip_jax.models.placement import along_batch


def batch_norm(features: int, gain: float = 1.0, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """BatchNorm as PyTorch has it, in float32, with `gain` to start from."""
    return nnx.BatchNorm(
        features,
        momentum=0.9,
        epsilon=1e-5,
        dtype=jnp.float32,
        use_fast_variance=False,
        scale_init=nnx.initializers.constant(gain),
        rngs=rngs,
    )


class InstanceBatchNorm(nnx.Module):
    """Instance normalisation for half of the channels, which takes a picture's own contrast and colour
    cast out of them, and BatchNorm for the rest, which keeps them (IBN-Net, Pan et al. 2018, figure 3a).

    Both come from the moments of each picture, so that the map of features is read no oftener than for one.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        del rngs  # nothing is drawn
        self.half = features // 2
        self.use_running_average = False  # set by nnx.Module.train() and eval()
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features - self.half))
        self.var = nnx.BatchStat(jnp.ones(features - self.half))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = x.astype(jnp.float32)
        means = x.mean(axis=(1, 2))
        variances = jnp.square(x - means[:, None, None]).mean(axis=(1, 2))
        if self.use_running_average:
            mean, variance = self.mean[...], self.var[...]
        else:
            own_means = means[:, self.half :]
            mean = own_means.mean(axis=0)
            variance = variances[:, self.half :].mean(axis=0) + own_means.var(axis=0)
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(mean)
            self.var[...] = 0.9 * self.var[...] + 0.1 * jax.lax.stop_gradient(variance)
        of_batch = lambda instance, batch: jnp.concatenate(
            [instance[:, : self.half], jnp.broadcast_to(batch, (len(x), len(batch)))], axis=1
        )
        inverse = of_batch(jax.lax.rsqrt(variances + 1e-3), jax.lax.rsqrt(variance + 1e-5))
        gain = (inverse * self.scale[...][None])[:, None, None]
        return (x - of_batch(means, mean)[:, None, None]) * gain + self.bias[...][None, None, None]


class ConvolutionNorm(nnx.Module):
    """A convolution without bias and its BatchNorm, or `style_free`, its InstanceBatchNorm.

    Under `jax.jit` the batch is the global one, so the statistics are those of all devices.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        size: int,
        stride: int,
        gain: float = 1.0,
        style_free: bool = False,
        *,
        rngs: nnx.Rngs,
    ):
        self.size, self.stride = size, stride
        init = nnx.initializers.normal((2 / (size * size * channels)) ** 0.5)  # He et al. 2015
        self.kernel = nnx.Param(init(rngs.params(), (size, size, channels, features)))
        self.norm = InstanceBatchNorm(features, rngs=rngs) if style_free else batch_norm(features, gain, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        kernel = self.kernel[...].astype(x.dtype)
        y = jax.lax.platform_dependent(x, kernel, cpu=self._as_matrix_product, default=self._as_convolution)
        return along_batch(self.norm(y).astype(x.dtype))

    def _as_convolution(self, x: Array, kernel: Array) -> Array:
        padding = self.size // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            ((padding, padding), (padding, padding)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def _as_matrix_product(self, x: Array, kernel: Array) -> Array:
        """The same from shifted views: XLA's CPU gradients of convolutions take up to 14 times as long."""
        _, height, width, _ = x.shape
        side, stride, padding = self.size, self.stride, self.size // 2
        padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        views = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(side) for j in range(side)]
        x = jnp.concatenate(views, axis=-1)
        y = x.reshape(-1, x.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
        return y.reshape(*x.shape[:-1], -1)
