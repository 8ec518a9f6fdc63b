"""Pairs made up on the spot, for measuring a machine without data: `synthetic:COUNT` or `synthetic:COUNT:WIDTHxHEIGHT`."""

import functools
import re
from collections.abc import Sequence

import numpy as np
import simplejpeg

from clip_jax.errors import UserError
from clip_jax.records import Place, Record

DIFFERENT = 16  # pictures; the captions all differ


class Synthetic:
    """JPEGs of smooth noise, 500 x 375 unless the name says otherwise, with numbers for captions."""

    def __init__(self, name: str):
        match = re.fullmatch(r"synthetic:(\d+)(?::(\d+)x(\d+))?", name)
        if match is None or not int(match[1]):
            raise UserError(f"data set {name}: expected synthetic:COUNT or synthetic:COUNT:WIDTHxHEIGHT, such as synthetic:10000")
        self.name, self.count, self.broken = name, int(match[1]), []
        self.size = int(match[2] or 500), int(match[3] or 375)

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> list[Record]:
        return [{"image": _jpeg(int(i) % DIFFERENT, *self.size), "caption": f"synthetic picture {i}"} for i in indices]

    def place(self, index: int) -> Place:
        return Place(self.name, f"record {index}")


@functools.cache
def _jpeg(seed: int, width: int, height: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    pixels = np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])
    return simplejpeg.encode_jpeg(pixels, quality=90)
