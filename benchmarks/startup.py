"""How long one waits before training: `import clip_jax`, the first step of `train.py`, and compiling deep models.

    python benchmarks/startup.py [--what=import,first_step] [--rounds=3]
    python benchmarks/startup.py --what=compile --variant=compile

import       a new process that imports clip_jax and ends, less one that imports nothing.
first_step   from the start of `python train.py` to the first record of its metrics.jsonl: with no compilation cache, and with the one
             that a run before it has filled.  The folder is a temporary one.
compile      lowering and compiling the step of emoji-vit with both towers 12 and 48 layers deep, scanned; no cache.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from records import ROOT, lane_name, new_record, say, summarize, write

DEPTHS = (12, 48)
WAIT = 600  # seconds for a first step
NOTES = {
    "import": "import is that of a process less that of an empty one",
    "compile": "compile is lowering and compiling a step of emoji-vit with scan_layers and so many blocks in both towers, with no cache",
}


def process_seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    return time.perf_counter() - start


def first_step(cache: str, arguments: list[str]) -> float:
    """Seconds from the start of train.py to its first step; the run is ended then."""
    with tempfile.TemporaryDirectory() as workdir, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "train.py", f"--workdir={workdir}", "--config.log_every=1", *arguments]
        file, start = pathlib.Path(workdir) / "metrics.jsonl", time.perf_counter()
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        if not cache:
            environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        run = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=environment)
        try:
            while not (file.exists() and file.stat().st_size):
                if run.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(f"train.py ended with status {run.returncode}: {said.read()[-500:]}")
                if time.perf_counter() - start > WAIT:
                    raise RuntimeError(f"train.py: no step in {WAIT} s")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            run.kill()
            run.wait()


def compile_seconds(layers: int) -> float:
    """Lowering and compiling in a new process."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, "--compile", str(layers)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()[-1])


def compile_here(layers: int) -> float:
    sys.path.insert(0, str(ROOT))
    import jax
    import numpy as np

    from clip_jax.config import load_config
    from clip_jax.sharding import make_mesh
    from clip_jax.step import make_train_step

    config = load_config(str(ROOT / "configs" / "emoji_vit.py"))
    config.model.vision.layers = config.model.text.layers = layers
    config.model.scan_layers, config.batch_size = True, 8
    side, context = config.model.vision.image_size, config.model.text.context_length
    _, step, state = make_train_step(config, make_mesh(config, jax.devices()[:1]))
    batch = {
        "image": jax.ShapeDtypeStruct((8, side, side, 3), np.uint8),
        "tokens": (jax.ShapeDtypeStruct((8, context), np.int32),),
    }
    start = time.perf_counter()
    step.lower(state, batch).compile()
    return time.perf_counter() - start


def main(options: argparse.Namespace) -> None:
    record = new_record("startup", options.variant or "emoji", unit="starts", dtype="float32", arguments=options.argument)
    record |= {"sides": {}, "lanes": {}, "missing": {}, "rounds": 0, "count": 1}
    record["pairs"] = [["first step, warm cache", "first step, no cache"], [f"compile, {DEPTHS[0]} layers", f"compile, {DEPTHS[1]} layers"]]
    record["notes"] = ["seconds of processes of their own, in turn"] + [note for what, note in NOTES.items() if what in options.what]
    with tempfile.TemporaryDirectory() as cache:
        work = {}
        if "import" in options.what:
            work["import", ""] = lambda: process_seconds("import clip_jax") - process_seconds("pass")
            # What `import clip_jax` puts off until it is asked for.
            work["import", "and clip_jax.load"] = lambda: process_seconds("import clip_jax; clip_jax.load") - process_seconds("pass")
        if "first_step" in options.what:
            first_step(cache, options.argument)  # fills it
            work["first step", "no cache"] = lambda: first_step("", options.argument)
            work["first step", "warm cache"] = lambda: first_step(cache, options.argument)
        if "compile" in options.what:
            work |= {("compile", f"{n} layers"): lambda n=n: compile_seconds(n) for n in DEPTHS}
        for number in range(options.rounds):
            for (side, lane), seconds in work.items():
                record["sides"].setdefault(side, {})
                found = record["lanes"].setdefault(lane_name(side, lane), {"side": side, "lane": lane, "seconds": [], "memory": [0]})
                found["seconds"].append(seconds())
            record["rounds"] = number + 1
            summarize(record)
            write(record, options.output)
    say(record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        print(compile_here(int(sys.argv[2])))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", default=["import", "first_step"], type=lambda text: text.split(","))
    parser.add_argument("--argument", action="append", default=[], help="one more for train.py, such as --argument=--config.batch_size=8")
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--variant", default="", help="part of the result's file name")
    parser.add_argument("--output", default="", help="folder of the result")
    main(parser.parse_args())
