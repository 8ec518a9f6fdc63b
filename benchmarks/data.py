"""Pictures a second and a core: our pipeline beside open_clip's WebDataset pipeline, on the same tars of real JPEGs.

    pip install -r tests/pytorch.txt && pip install --no-deps -r tests/pytorch-no-deps.txt
    pip install webdataset==0.2.86 pandas scikit-image scikit-learn  # open_clip 3.3 does not run with webdataset 1
    python benchmarks/data.py
    python benchmarks/data.py --resume      # the time to go on in the middle of 10,000,000 samples

Both read the tar, decode, crop at random (0.9 to 1.0), resize to 224 and tokenize, in batches of 64, in one process
and one thread, with what PyTorch calls no workers.  A picture's cost is the processor time of the process, so that
the ratio holds on a busy machine too; the sides take turns, and medians are printed.  The JPEGs (quality 90) are cut
from the photographs that scikit-image and scikit-learn carry.
"""

import io
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SIZES = ((341, 256), (500, 375), (1024, 768), (2048, 1536))
SIDES = ("ours", "open_clip")
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png")
COUNT, BATCH, REPEATS = 512, 64, 3


def make_tar(path: pathlib.Path, width: int, height: int) -> None:
    """COUNT pairs; pictures of one size."""
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
        for i in range(COUNT):
            for ending, data in (("jpg", encoded[i % len(encoded)]), ("txt", f"a photograph, number {i}".encode())):
                member = tarfile.TarInfo(f"{i:06}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def ours(tar: str):
    from clip_jax.config import default_config
    from clip_jax.data import training_batches

    config = default_config()
    config.batch_size = BATCH
    config.data.update({"sets": (tar,), "threads": 0, "prefetch": 0})
    batches = training_batches(config)
    return lambda: next(batches)["image"].shape[0]


def open_clip(tar: str):
    import argparse

    from parity import torchvision_without_gpu

    library = torchvision_without_gpu()
    import torch
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    torch.set_num_threads(1)
    arguments = argparse.Namespace(
        train_data=tar, train_num_samples=10**9, train_data_upsampling_factors=None, dataset_resampled=True, seed=0
    )
    arguments.batch_size, arguments.world_size, arguments.workers = BATCH, 1, 0
    data = get_wds_dataset(arguments, image_transform(224, is_train=True), True, tokenizer=SimpleTokenizer())
    batches = iter(data.dataloader)
    return lambda library=library: next(batches)[0].shape[0]  # whose declarations end with it


def child(side: str, tar: str) -> None:
    step = {"ours": ours, "open_clip": open_clip}[side](tar)
    step()
    start, count = time.process_time(), 0
    while count < COUNT:
        count += step()
    print(json.dumps(count / (time.process_time() - start)))


def resume(samples: int = 10_000_000) -> None:
    """The time from a position in the middle of a pass to the first batch, by an index of so many samples."""
    import numpy as np

    from clip_jax.config import default_config
    from clip_jax.data import training_batches
    from clip_jax.records import tar_cache, tar_index

    with tempfile.TemporaryDirectory() as folder:
        tar = pathlib.Path(folder) / "a.tar"
        make_tar(tar, 500, 375)
        # Each sample of the index is one of those in the tar, under a key of its own.
        index = tar_index.index_shard(str(tar), tar.stat().st_size)
        repeats = -(-samples // COUNT)
        keys = np.char.mod("%09d", np.arange(repeats * COUNT)).astype("S9").view(np.uint8)
        many = tar_index.ShardIndex(
            key_ends=np.arange(1, repeats * COUNT + 1) * 9,
            starts=np.arange(repeats * COUNT + 1) * 2,
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


def main() -> None:
    print("| JPEG | ours, pictures / s / core | open_clip | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for width, height in SIZES:
            tar = pathlib.Path(folder) / f"{width}.tar"
            make_tar(tar, width, height)
            found = {side: [] for side in SIDES}
            for _ in range(REPEATS):
                for side in SIDES:
                    command = [sys.executable, "-W", "ignore", __file__, "--child", side, str(tar)]
                    output = subprocess.run(command, capture_output=True, text=True, check=False)
                    if output.returncode:
                        sys.exit(output.stderr)
                    found[side].append(json.loads(output.stdout.splitlines()[-1]))
            one, other = (statistics.median(found[side]) for side in SIDES)
            print(f"| {width} x {height} | {one:,.0f} | {other:,.0f} | {one / other:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    elif sys.argv[1:2] == ["--resume"]:
        resume()
    else:
        main()
