"""Embedding pictures, and real captions, beside open_clip's on the same machine.

    python benchmarks/encode.py [--model=emoji-vit] [--what=image] [--dtype=float32] [--batch=64] [--batches=4] [--rounds=5]

Ours is what eval.py runs: uint8 pixels and tokens in host memory to features in host memory.  open_clip, eager and under
torch.compile in inference mode, takes float32 pictures that are normalised and on the device already, and 77 padded tokens; in
bfloat16 all of its weights are.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from measure import OutOfMemory, Side, serve, take_turns
from records import Record, new_record, say, write
from work import (
    about_captions,
    architecture,
    caption_lengths,
    captions,
    check_cosines,
    open_clips,
    our_params,
    pictures,
    prepare_weights,
    ready_pictures,
)

COMPARED = 8  # rows of features
# Of 1 - cosine.  Measured in float32 9.1e-8 (toy) and 1.2e-7 (ViT-B/32, classifier.py); in bfloat16 2.7e-3 from eager PyTorch,
# which rounds after every operation, and 2.6e-4 from torch.compile.
TOLERANCE = {"float32": 3.6e-7, "bfloat16": 8e-3}


def ours(options: dict) -> Side:
    import jax
    from flax import nnx

    from clip_jax.evaluation.encoder import Encoder
    from clip_jax.flops import image_flops, text_flops
    from clip_jax.models import CLIP
    from clip_jax.step import abstract_model

    config = architecture(options["model"], options["dtype"])
    params = our_params(config, pathlib.Path(options["folder"]))
    if params is None:
        model = CLIP(config, rngs=nnx.Rngs(0))
    else:
        model = nnx.merge(nnx.graphdef(abstract_model(config)), params, {})
    encoder = Encoder(model, options["batch"], tokenizer=lambda texts, truncate: None, devices=jax.devices()[:1])
    del model, params
    count, context = options["batch"] * options["batches"], config.text.context_length
    if options["what"] == "image":
        given, encode = pictures(count, config.vision.image_size), encoder.pixels
        flops = count * image_flops(config)
    else:
        given, encode = captions(count, "real", context), encoder.tokens
        flops = sum(text_flops(config, n) for n in caption_lengths(count, "real", context).tolist())
    facts = {"features": np.asarray(encode(given))[:COMPARED].tolist(), "flops": flops, "captions": about_captions(count, context)}
    return Side({"": lambda: void(encode(given))}, lambda: None, "jax", options["dtype"], facts)


def void(_) -> None:
    """Features are on the host when `encode` returns."""


def theirs(options: dict, compiled: bool) -> Side:
    import torch

    model, document, device = open_clips(pathlib.Path(options["folder"]))
    batch, count = options["batch"], options["batch"] * options["batches"]
    dtype = getattr(torch, options["dtype"])
    model = model.to(dtype).eval()
    if options["what"] == "image":
        given = ready_pictures(count, document, device).to(dtype)
        encode = lambda x: model.encode_image(x, normalize=True)
    else:
        given = torch.from_numpy(captions(count, "real", document["model_cfg"]["text_cfg"]["context_length"])).long().to(device)
        encode = lambda x: model.encode_text(x, normalize=True)
    run = torch.compile(encode) if compiled else encode

    @torch.inference_mode()
    def all_of() -> "torch.Tensor":
        return torch.cat([run(given[start : start + batch]) for start in range(0, count, batch)]).float().cpu()

    facts = {"features": all_of()[:COMPARED].tolist()}
    rest = torch.cuda.empty_cache if device == "cuda" else lambda: None
    return Side({"": lambda: void(all_of())}, lambda: None, "torch", options["dtype"], facts, rest)


SIDES = {"ours": ours, "torch": lambda options: theirs(options, False), "torch.compile": lambda options: theirs(options, True)}


def complete(record: Record) -> None:
    facts = {name: side["facts"] for name, side in record["sides"].items()}
    mine = facts.get("ours", {})
    record["items"], record["flops"] = {"": record["batch"] * record["batches"]}, {"": mine.get("flops")}
    record["agreement"] = {"tolerance": TOLERANCE[record["dtype"]]}
    for name, its in facts.items():
        if name != "ours" and "features" in its and mine:
            cosines = (np.array(mine["features"]) * np.array(its["features"])).sum(axis=1)
            record["agreement"][name] = {"1 - cosine": float(np.abs(1 - cosines).max())}
    for its in facts.values():
        its.pop("features", None)
    check_cosines(record)


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, sides, missing = pathlib.Path(name), list(options.sides), {}
        if sides != ["ours"]:
            why = prepare_weights(options.model, folder)
            missing = {side: why for side in sides if why and side != "ours"}
            sides = [side for side in sides if side not in missing]
        for batch in options.batch:
            about = {name: getattr(options, name) for name in ("model", "what", "dtype", "batches")} | {"batch": batch}
            variant = options.variant or f"{options.model}-{options.what}-{options.dtype}"
            record = new_record("encode", variant, **about, unit={"image": "images", "text": "texts"}[options.what])
            record["pairs"] = [["ours", "torch"], ["ours", "torch.compile"]]
            record["notes"] = ["ours begin and end in host memory; open_clip's inputs are on the device before the clock starts"]
            share = 0.9 if sides == ["ours"] else 0.45
            environments = {"ours": {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(share)}}

            def after(record: Record) -> None:
                record["missing"] |= missing
                write(record, options.output)

            try:
                given = about | {"folder": name}
                numbers = options.rounds, options.turn, options.product
                take_turns(__file__, sides, given, record, *numbers, environments, after, complete)
            except OutOfMemory as error:
                print(f"  a batch of {batch:,} does not fit: {error}", flush=True)
                continue
            say(record)
            return
    sys.exit("error: no batch fits; give a smaller one with --batch")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="emoji-vit")
    parser.add_argument("--what", default="image", choices=("image", "text"))
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--batch", default=[64], type=lambda text: [int(n) for n in text.split(",")], help="one, or several to try in turn")
    parser.add_argument("--batches", default=4, type=int, help="of these, in one piece of work")
    parser.add_argument("--sides", default=list(SIDES), type=lambda text: text.split(","))
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--turn", default=2.0, type=float, help="seconds of the fastest side's turn; 0: one piece of work")
    parser.add_argument("--product", default=0, type=int, help="rows of the plain product")
    parser.add_argument("--variant", default="", help="part of the result's file name")
    parser.add_argument("--output", default="", help="folder of the result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    serve(SIDES)
    main(parse(sys.argv[1:]))
