"""Pictures a second and a core: our pipeline beside open_clip's WebDataset pipeline, on the same tars of real JPEGs.

    pip install -r tests/pytorch.txt && pip install --no-deps -r tests/pytorch-no-deps.txt
    python benchmarks/data.py [--sizes=341x256,500x375,1024x768,2048x1536] [--count=512] [--rounds=3]
    python benchmarks/data.py --resume      # the time to go on in the middle of 10,000,000 samples

Both read the tar, decode, crop at random (0.9 to 1.0), resize to 224 and tokenize, in batches of 64, in one process
and one thread, with what PyTorch calls no workers.  A picture's cost is the processor time of the process, so that
the ratio holds on a busy machine too.  The JPEGs (quality 90) are cut from the photographs that scikit-image and
scikit-learn carry.
"""

import argparse
import io
import math
import pathlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from measure import Side, serve, take_turns
from records import new_record, say, write
from work import import_open_clip

SIZES = "341x256,500x375,1024x768,2048x1536"
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png")
BATCH, REPEATS, PAIRS = 64, 3, 512


def make_tar(path: pathlib.Path, width: int, height: int, count: int) -> None:
    """So many pairs; pictures of one size."""
    import PIL.Image
    import skimage
    import sklearn.datasets

    files = [pathlib.Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS]
    files += sorted((pathlib.Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    encoded = []
    for file in files:
        image = PIL.Image.open(file).convert("RGB")
        scale = max(width / image.width, height / image.height)
        size = math.ceil(image.width * scale), math.ceil(image.height * scale)
        buffer = io.BytesIO()
        image.resize(size, PIL.Image.BICUBIC).crop((0, 0, width, height)).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for ending, data in (("jpg", encoded[i % len(encoded)]), ("txt", f"a photograph, number {i}".encode())):
                member = tarfile.TarInfo(f"{i:06}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def side(options: dict, batches_of: Callable[[str], Callable[[], int]]) -> Side:
    def lane(tar: str) -> Callable[[], dict]:
        batches = []

        def once() -> dict:
            if not batches:
                batches.append(batches_of(tar))
            start, count = time.process_time(), 0
            while count < options["count"]:
                count += batches[0]()
            return {"seconds": (time.process_time() - start) * options["count"] / count}

        return once

    return Side({size: lane(f"{options['folder']}/{size}.tar") for size in options["sizes"]}, lambda: None, "")


def ours(options: dict) -> Side:
    from clip_jax.config import default_config
    from clip_jax.data import training_batches

    def batches_of(tar: str) -> Callable[[], int]:
        config = default_config()
        config.batch_size = BATCH
        config.data.update({"sets": (tar,), "threads": 0, "prefetch": 0})
        batches = training_batches(config)
        return lambda: len(next(batches)["image"])

    return side(options, batches_of)


def open_clips(options: dict) -> Side:
    import_open_clip()
    import torch
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    torch.set_num_threads(1)

    def batches_of(tar: str) -> Callable[[], int]:
        arguments = argparse.Namespace(
            train_data=tar, train_num_samples=10**9, train_data_upsampling_factors=None, dataset_resampled=True, seed=0
        )
        arguments.batch_size, arguments.world_size, arguments.workers = BATCH, 1, 0
        data = get_wds_dataset(arguments, image_transform(224, is_train=True), True, tokenizer=SimpleTokenizer())
        batches = iter(data.dataloader)
        return lambda: len(next(batches)[0])

    return side(options, batches_of)


SIDES = {"ours": ours, "open_clip": open_clips}


def resume(samples: int = 10_000_000) -> None:
    """The time from a position in the middle of a pass to the first batch, by an index of so many samples."""
    import numpy as np

    from clip_jax.config import default_config
    from clip_jax.data import training_batches
    from clip_jax.records import tar_cache, tar_index

    with tempfile.TemporaryDirectory() as folder:
        tar = pathlib.Path(folder) / "a.tar"
        make_tar(tar, 500, 375, PAIRS)
        # Each sample of the index is one of those in the tar, under a key of its own.
        index = tar_index.index_shard(str(tar), tar.stat().st_size)
        repeats = -(-samples // PAIRS)
        keys = np.char.mod("%09d", np.arange(repeats * PAIRS)).astype("S9").view(np.uint8)
        many = tar_index.ShardIndex(
            key_ends=np.arange(1, repeats * PAIRS + 1) * 9,
            starts=np.arange(repeats * PAIRS + 1) * 2,
            keys=keys,
            endings=index.endings,
            broken=(),
            **{n: np.tile(getattr(index, n), repeats) for n in ("shards", "offsets", "sizes", "member_endings")},
        )
        tar_cache.open_index([str(tar)])
        (place,) = (tar.parent / ".clip_jax_index").iterdir()
        many.save(place, tar_index.load_shards(place))
        config = default_config()
        config.batch_size = BATCH
        config.data.update({"sets": (str(tar),), "threads": 2, "prefetch": 0})
        for _ in range(REPEATS):
            start = time.perf_counter()
            batches = training_batches(config)
            batches.set_state(batches.get_state() | {"position": samples // 2})
            opened = time.perf_counter()
            next(batches)
            print(f"{len(batches.source.records):,} samples: opened in {opened - start:.2f} s, first batch after {time.perf_counter() - start:.2f} s")


def main(options: argparse.Namespace) -> None:
    about = {"sizes": options.sizes, "count": options.count}
    record = new_record("data", options.variant or "webdataset", **about, unit="pictures", dtype=None)
    record["pairs"] = [[f"ours, {size}", f"open_clip, {size}"] for size in options.sizes]
    record["items"], record["flops"], record["agreement"] = {size: options.count for size in options.sizes}, {}, {}
    record["notes"] = ["seconds are those of one processor"]
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            make_tar(pathlib.Path(folder) / f"{size}.tar", *map(int, size.split("x")), options.count)
        given = about | {"folder": folder}
        take_turns(__file__, options.sides, given, record, options.rounds, 0, -1, {}, lambda record: write(record, options.output))
    say(record)


if __name__ == "__main__":
    serve(SIDES)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default=SIZES.split(","), type=lambda text: text.split(","))
    parser.add_argument("--count", default=PAIRS, type=int, help="pictures in a tar, and in one piece of work")
    parser.add_argument("--sides", default=list(SIDES), type=lambda text: text.split(","))
    parser.add_argument("--rounds", default=REPEATS, type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--variant", default="", help="part of the result's file name")
    parser.add_argument("--output", default="", help="folder of the result")
    options = parser.parse_args()
    resume() if options.resume else main(options)
