"""A model's encoders over any number of pictures or texts, on all devices, in a few compiled shapes."""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int32, UInt8

from clip_jax import images
from clip_jax.errors import UserError
from clip_jax.models import CLIP
from clip_jax.models.clip import l2_normalize
from clip_jax.models.text import TextTransformer
from clip_jax.sharding import batch_sharding, data_mesh, local_rows
from clip_jax.tokenizer import Tokenizer, tokenize

BATCH = 256  # pictures or texts encoded at once, unless told otherwise
# Texts are cut to the next of these lengths: what follows EOT changes nothing in a causal tower.
LENGTHS = (3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
PREFIX = 16  # tokens that texts may share, and compute once
SHARED_FROM = 64  # texts that share a prefix, for which that is worth it


def picture_of(picture: Any, where: str) -> PIL.Image.Image:
    """A picture of the bytes of its file, of pixels [H, W] or [H, W, C], or as it is."""
    if isinstance(picture, np.ndarray):
        return PIL.Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    return picture if isinstance(picture, PIL.Image.Image) else images.decode(picture, where)


class Encoder:
    """Normalised features, in float32, the same on any number of devices."""

    def __init__(
        self, model: CLIP, batch_size: int = BATCH, tokenizer: Tokenizer | None = None, devices: Sequence[jax.Device] | None = None
    ):
        """`tokenizer` is what `clip_jax.get_tokenizer` gives for the model; texts for a SigLIP need it.

        Args:
          batch_size: rounded up to a multiple of the devices.
          devices: all, if not given.
        """
        self.config = model.config
        self.mesh = data_mesh(devices)
        self.batch_size = -(-batch_size // self.mesh.devices.size) * self.mesh.devices.size
        if tokenizer is None and self.config.tokenizer == "openai":
            tokenizer = functools.partial(tokenize, context_length=self.config.text.context_length)
        self.tokenizer = tokenizer
        self.causal = isinstance(model.text, TextTransformer)
        graphdef = nnx.graphdef(model)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self.take(model)
        compiled = functools.partial(jax.jit, out_shardings=everywhere)

        @compiled
        def encode_images(variables, pixels: UInt8[Array, "B H W 3"]):
            model = nnx.merge(graphdef, variables)
            model.eval()
            x = images.normalize(pixels, model.config.image_mean, model.config.image_std)
            return model.encode_image(x, normalize=True)

        @compiled
        def pool_images(variables, pixels: UInt8[Array, "B H W 3"]):
            model = nnx.merge(graphdef, variables)
            model.eval()
            return l2_normalize(model.pooled_image(images.normalize(pixels, model.config.image_mean, model.config.image_std)))

        @compiled
        def encode_texts(variables, tokens: Int[Array, "B T"]):
            return nnx.merge(graphdef, variables).encode_text(tokens, normalize=True)

        @compiled
        def encode_prefix(variables, tokens: Int[Array, "P"]):
            return nnx.merge(graphdef, variables).text.prefix(tokens)

        @compiled
        def encode_rest(variables, tokens: Int[Array, "B N"], prefix: Any, length: Int[Array, ""]):
            return l2_normalize(nnx.merge(graphdef, variables).text.after(prefix, length, tokens))

        self._encode_images, self._pool_images, self._encode_texts = encode_images, pool_images, encode_texts
        self._encode_prefix, self._encode_rest = encode_prefix, encode_rest

    def take(self, model: CLIP) -> None:
        """The parameters of another state of the same model."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        # Matrices are rounded to the type in which they are multiplied once, and not for every batch, which is the same.
        types = {path: module.dtype for path, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear)}

        def put(variable: nnx.Variable, dtype: jnp.dtype | None) -> nnx.Variable:
            x = np.asarray(variable[...])
            x = x.astype(dtype or x.dtype)
            return variable.replace(jax.make_array_from_callback(x.shape, everywhere, x.__getitem__))

        flat = nnx.to_flat_state(nnx.state(model))
        self.variables = nnx.from_flat_state([(path, put(variable, types.get(path[:-1]))) for path, variable in flat])

    def images(self, pictures: list[PIL.Image.Image]) -> Float[np.ndarray, "N E"]:
        """Features of pictures, preprocessed as evaluation does."""
        preprocess = images.Preprocess.of(self.config)
        return self.pixels(np.stack([preprocess.pixels(picture) for picture in pictures]))

    def read(
        self,
        count: int,
        read: Callable[[Sequence[int]], Sequence[bytes | UInt8[np.ndarray, "H W C"] | PIL.Image.Image]],
        progress: Callable[[int], Any] = lambda features: None,
        where: str = "a set",
        pooled: bool = False,
    ) -> Float[np.ndarray, "N E"]:
        """Features of so many pictures, encoded or decoded, which `read` gives by their numbers; each host reads its part.

        Args:
          progress: is told of every batch how many there were.
          where: for errors.
          pooled: take what the image tower projects, of length one as well.
        """
        encode = self._pool_images if pooled else self._encode_images
        preprocess = images.Preprocess.of(self.config)
        rows, found, begun = local_rows(self.batch_size, self.mesh), [], None

        def pixels(number: int, picture: Any) -> UInt8[np.ndarray, "S S 3"]:
            return preprocess.pixels(picture_of(picture, f"{where}: picture {number}"))

        with concurrent.futures.ThreadPoolExecutor() as threads:
            for start in range(0, count, self.batch_size):
                numbers = [start + row for row in rows if start + row < count]
                size = preprocess.size
                batch = np.zeros((len(rows), size, size, 3), np.uint8)
                for i, made in enumerate(threads.map(pixels, numbers, read(numbers) if numbers else ())):
                    batch[i] = made
                # One batch is encoded while the next one is decoded and transferred.
                before, begun = begun, encode(self.variables, jax.make_array_from_process_local_data(batch_sharding(self.mesh), batch))
                if before is not None:
                    found.append(np.asarray(before))
                    progress(self.batch_size)
            found.append(np.asarray(begun)[: count - start])
            progress(count - start)
        return np.concatenate(found)

    def pixels(self, pixels: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N E"]:
        """Features of what `Preprocess.pixels` made."""
        return self._batched(self._encode_images, pixels, self.batch_size)

    def texts(self, texts: Sequence[str], truncate: bool = True) -> Float[np.ndarray, "N E"]:
        """Features of texts; one that is too long loses its end, or is an error."""
        return self.tokens(self._tokenize(texts, truncate))

    def tokens(self, tokens: Int[np.ndarray, "N T"]) -> Float[np.ndarray, "N E"]:
        """Features of texts as tokens, each cut to its length, rounded up, where that changes nothing."""
        return self._by_length(self._encode_texts, tokens)

    def prompts(self, names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "C P E"]:
        """Features of every template with every name in it.  The tokens with which a template begins are computed once."""
        every = [self._tokenize([template.replace("{}", name) for name in names], truncate=True) for template in templates]
        if not self.causal or len(names) < SHARED_FROM:
            return self.tokens(np.concatenate(every)).reshape(len(templates), len(names), -1).swapaxes(0, 1)
        return np.stack([self._after_prefix(tokens) for tokens in every], axis=1)

    def _after_prefix(self, tokens: Int32[np.ndarray, "N T"]) -> Float[np.ndarray, "N E"]:
        # The shortest text keeps its EOT, at which it is read.
        alike = int(np.minimum.accumulate((tokens == tokens[0]).all(axis=0)).sum())
        length = min(alike, int(tokens.argmax(axis=1).min()), PREFIX)
        prefix = np.zeros(PREFIX, tokens.dtype)
        prefix[:length] = tokens[0, :length]
        keys, length_there = self._encode_prefix(self.variables, jnp.asarray(prefix)), jnp.int32(length)
        encode = lambda variables, rest: self._encode_rest(variables, rest, keys, length_there)
        return self._by_length(encode, np.pad(tokens[:, length:], ((0, 0), (0, length))))

    def _tokenize(self, texts: Sequence[str], truncate: bool) -> Int32[np.ndarray, "N T"]:
        if self.tokenizer is None:
            raise UserError(f"{self.config.name}: its vocabulary comes with its weights; pass tokenizer=clip_jax.get_tokenizer(...)")
        return self.tokenizer(list(texts), truncate=truncate)

    def _by_length(self, encode: Callable, tokens: Int[np.ndarray, "N T"]) -> Float[np.ndarray, "N E"]:
        if not self.causal:
            return self._batched(encode, tokens, self.batch_size)
        lengths = np.array([n for n in LENGTHS if n < tokens.shape[1]] + [tokens.shape[1]])
        own = np.searchsorted(lengths, tokens.argmax(axis=1) + 1)
        features = np.empty((len(tokens), self.config.embedding), np.float32)
        for which in np.unique(own):
            members = np.flatnonzero(own == which)
            # The smaller batch is for what is left: few shapes to compile, and few rows of padding.
            features[members] = self._batched(encode, tokens[members, : lengths[which]], self.batch_size // 8)
        return features

    def _batched(self, encode: Callable, rows: np.ndarray, small: int) -> Float[np.ndarray, "N E"]:
        """In batches of two sizes, rounded up to a multiple of the devices."""
        devices = self.mesh.devices.size
        small = -(-max(1, small) // devices) * devices
        put = lambda part: jax.make_array_from_callback(part.shape, batch_sharding(self.mesh), part.__getitem__)
        found, begun, start = [], [], 0
        while start < len(rows):
            size = self.batch_size if len(rows) - start > self.batch_size - small else small
            part = rows[start : start + size]
            part = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            begun.append(encode(self.variables, put(part)))
            if len(begun) > 1:  # one is encoded while the next one is transferred
                found.append(np.asarray(begun.pop(0)))
            start += size
        return np.concatenate(found + [np.asarray(last) for last in begun])[: len(rows)]
