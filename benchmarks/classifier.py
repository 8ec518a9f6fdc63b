"""Building a zero-shot classifier of ImageNet's 1,000 classes by its 80 templates, beside open_clip's on the same machine.

    python benchmarks/classifier.py [--model=ViT-B/32] [--dtype=float32] [--classes=1000] [--few=10] [--rounds=2]

Texts to classifier, tokenizers included.  Ours is measured whole.  open_clip, eager and under torch.compile, takes ten classes at a
time however many there are: it is measured on `few` of them, and its time multiplied.
"""

import argparse
import collections
import pathlib
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from measure import Side, serve, take_turns
from records import Record, new_record, say, write
from work import architecture, check_cosines, open_clips, our_params, prepare_weights

AT_ONCE = 10  # classes, as open_clip's default has it
# Of 1 - cosine.  Measured 1.2e-7 (ViT-B/32) in float32; in bfloat16 as for single texts, encode.py.
TOLERANCE = {"float32": 3.6e-7, "bfloat16": 8e-3}


def ours(options: dict) -> Side:
    import jax
    from flax import nnx

    from clip_jax.evaluation.classifier import zero_shot_classifier
    from clip_jax.evaluation.encoder import Encoder
    from clip_jax.evaluation.names import class_names, templates
    from clip_jax.flops import text_flops
    from clip_jax.models import CLIP
    from clip_jax.step import abstract_model
    from clip_jax.tokenizer import tokenize

    config = architecture(options["model"], options["dtype"])
    params = our_params(config, pathlib.Path(options["folder"]))
    model = CLIP(config, rngs=nnx.Rngs(0)) if params is None else nnx.merge(nnx.graphdef(abstract_model(config)), params, {})
    encoder = Encoder(model, devices=jax.devices()[:1])
    names = class_names("imagenet2012")[: options["classes"]]
    prompts = [template.format(name) for template in templates("imagenet2012") for name in names]
    lengths = collections.Counter((tokenize(prompts, config.text.context_length, truncate=True).argmax(axis=1) + 1).tolist())  # of EOT
    facts = {"flops": sum(count * text_flops(config, length) for length, count in lengths.items())}

    def build() -> None:
        facts["classifier"] = np.asarray(zero_shot_classifier(encoder, names, templates("imagenet2012")))[: options["few"]].tolist()

    return Side({"": build}, lambda: None, "jax", options["dtype"], facts)


def theirs(options: dict, compiled: bool) -> Side:
    import torch

    from clip_jax.evaluation.names import class_names, templates

    model, document, device = open_clips(pathlib.Path(options["folder"]))
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.zero_shot_classifier import build_zero_shot_classifier

    model = model.to(getattr(torch, options["dtype"])).eval()
    if compiled:
        model.encode_text = torch.compile(model.encode_text)
    tokenizer = SimpleTokenizer(context_length=document["model_cfg"]["text_cfg"]["context_length"])
    prompts = [lambda name, template=template: template.format(name) for template in templates("imagenet2012")]
    names, facts = class_names("imagenet2012")[: options["few"]], {}

    def build() -> dict:
        start = time.perf_counter()
        found = build_zero_shot_classifier(model, tokenizer, names, prompts, num_classes_per_batch=AT_ONCE, device=device)
        facts["classifier"] = found.T.float().cpu().tolist()
        return {"seconds": (time.perf_counter() - start) * options["classes"] / len(names)}

    return Side({"": build}, lambda: None, "torch", options["dtype"], facts)


SIDES = {"ours": ours, "torch": lambda options: theirs(options, False), "torch.compile": lambda options: theirs(options, True)}


def complete(record: Record) -> None:
    facts = {name: side["facts"] for name, side in record["sides"].items()}
    found = {name: np.array(its.pop("classifier")) for name, its in facts.items() if "classifier" in its}
    record["agreement"] = {"tolerance": TOLERANCE[record["dtype"]]}
    for name, its in found.items():
        if name != "ours" and "ours" in found:
            record["agreement"][name] = {"1 - cosine": float(np.abs(1 - (found["ours"] * its).sum(axis=1)).max())}
    record["flops"] = {"": facts.get("ours", {}).get("flops")}
    check_cosines(record)


def main(options: argparse.Namespace) -> None:
    about = {name: getattr(options, name) for name in ("model", "dtype", "classes", "few")}
    record = new_record("classifier", options.variant or f"{options.model}-{options.dtype}", **about, unit="classes")
    record["pairs"], record["items"] = [["ours", "torch"], ["ours", "torch.compile"]], {"": options.classes}
    record["notes"] = [
        f"open_clip's time is that of {options.few} classes, times {options.classes / options.few:g}",
        "FLOPs are model FLOPs, of every prompt at its own length; beginnings that prompts share are counted with each",
    ]
    with tempfile.TemporaryDirectory() as folder:
        sides, missing = list(options.sides), {}
        if sides != ["ours"]:
            why = prepare_weights(options.model, pathlib.Path(folder))
            missing = {side: why for side in sides if why and side != "ours"}
            sides = [side for side in sides if side not in missing]

        def after(record: Record) -> None:
            record["missing"] |= missing
            write(record, options.output)

        take_turns(__file__, sides, about | {"folder": folder}, record, options.rounds, 0, options.product, {}, after, complete)
    say(record)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--classes", default=1000, type=int)
    parser.add_argument("--few", default=AT_ONCE, type=int, help="of the classes, for open_clip")
    parser.add_argument("--sides", default=list(SIDES), type=lambda text: text.split(","))
    parser.add_argument("--rounds", default=2, type=int)
    parser.add_argument("--product", default=0, type=int, help="rows of the plain product")
    parser.add_argument("--variant", default="", help="part of the result's file name")
    parser.add_argument("--output", default="", help="folder of the result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    serve(SIDES)
    main(parse(sys.argv[1:]))
