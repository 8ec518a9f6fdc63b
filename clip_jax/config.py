"""The configuration of a run: every hyper-parameter, its default, and the command line over it.

A file in configs/ starts from `default_config()` and sets what differs; the command line has the
last word: `--config=configs/X.py --workdir=DIR --config.field=value`.
"""

import ast
import dataclasses
import difflib
import pathlib
import runpy

from ml_collections import ConfigDict

from clip_jax.augment import Augmentation
from clip_jax.errors import UserError
from clip_jax.models import ARCHITECTURES, CLIPConfig
from clip_jax.models.architectures import ResNetConfig, SmallResNetConfig, ViTConfig
from clip_jax.tokenizer import VOCABULARY_SIZE

OPTIONAL = ("model.initial_logit_bias",)  # a number or None


def default_config() -> ConfigDict:
    """Every field there is.  What has no sensible default is None, and must be set by a config file."""
    return ConfigDict(
        {
            "seed": 0,
            "batch_size": 256,  # pairs a step, over all devices
            # Of the batch size with which the run began, as are warmup_steps: a run that goes on with another one stays on the
            # same schedule by the samples that it has seen, and ends after as many.
            "total_steps": 10_000,
            "log_every": 50,  # steps
            "profile": False,  # trace a few steps, and tell where their time goes (docs/profiling.md)
            # Where checkpoints are if not in the workdir: gs://BUCKET/PATH.  The workdir need not be shared then.
            "bucket": "",
            # One is saved every so many steps, and so long after the one before; 0: by steps alone.
            "checkpoint_every": 1_000,
            "checkpoint_minutes": 30.0,
            "checkpoints_kept": 3,  # the last ones, besides these two kinds:
            "milestone_every": 0,  # one every so many steps, for ever; 0: none
            "keep_best": True,  # the one with the lowest mean loss since the one before it
            # A step whose loss or gradient is not finite changes nothing.  After so many in a row the model and its optimizer
            # come back from the last checkpoint before them, and the data goes on: so often, then the run ends.
            "nonfinite": {"in_a_row": 10, "rollbacks": 3},
            # Every so many minutes the model is measured on these tasks of eval.py, on all devices; 0: never.
            "evaluate": {"minutes": 0.0, "tasks": ("emoji",), "data_dir": ""},
            "model": architecture("ViT-B/32"),
            # Whose parameters a run begins with, in place of random ones: the workdir of another run, a file or a name, as
            # clip_jax.load takes them.  Only the image size and the context length may differ (initial.py).
            "initialize": "",
            "loss": {
                "kind": "softmax",  # or "sigmoid", for a model with a logit_bias
                "form": "auto",  # "plain" holds the similarity matrix, "ring" a block of it (losses.py)
            },
            # The batch is embedded in so many parts, one after the other, and the loss is over all of it: the same
            # gradient, at the memory of one part (Gao et al. 2021, arXiv 2101.06983).
            "microbatches": 1,
            "patch_dropout": 0.0,  # share of an image's patches that a ViT does not see in training
            # Devices along each axis; -1: all that are left.  A batch is split over data and fsdp, parameters and
            # optimizer over fsdp and tensor (sharding.py).
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "optimizer": {  # the defaults are open_clip's
                "name": "adamw",  # or "lion", "lamb", "sgd" (optimizer.py)
                "learning_rate": 5e-4,  # at the end of warm-up
                "warmup_steps": 500,
                "weight_decay": 0.2,  # not of gains, biases and logit_scale
                "b1": 0.9,
                "b2": 0.98,  # sgd has none
                "eps": 1e-6,  # of adamw and lamb
                "mu_dtype": "float32",  # of the first moment as it is kept; "bfloat16" takes half of its memory
                "gradient_clip": 1.0,  # global norm; 1e9 clips nothing
            },
            "data": {
                # Prepared TFDS sets, such as ~/tensorflow_datasets/coco_captions/2014/1.1.0; WebDataset's shards, such as
                # s3://bucket/{00000..01233}.tar; tables .csv, .tsv, .jsonl, .parquet; folders of pictures; synthetic:COUNT
                "sets": (),
                "weights": (),  # how often each set is drawn from; none: as often as it has records
                "split": "train",  # of TFDS sets
                "image": "image",  # the field that holds a picture, or in a table perhaps its path
                "caption": ("caption",),  # fields that hold a text, or several, of which one is drawn
                "caption_weights": (),  # how often each of these fields is drawn; none: all alike
                # A field that says what a picture shows: pictures alike in it count as one example, of which
                # one is drawn.  A batch then never holds the same thing twice, as a false negative.
                "group": "",
                # A field of keywords: with this probability the caption is up to three of them instead, after
                # the caption itself half of the time.
                "keywords": "",
                "keyword_rate": 0.0,
                "templates": ("{}",),  # a caption is put into one of these ...
                "template_rate": 0.0,  # ... with this probability
                "augment": dataclasses.asdict(Augmentation()),  # documented there
                "cache": False,  # keep all decoded pictures in memory
                "threads": 16,  # that decode; 0: the one that makes a batch
                "workers": 0,  # processes that make batches, with so many threads each; 0: a thread of the run's own
                "prefetch": 2,  # batches that are made ahead of time, by each worker; 0: each when it is needed
                "max_bad": 0.01,  # share of samples that may be bad, and are skipped, before a run stops
                "stall_seconds": 60.0,  # without a batch, after which the shards that are read are named
            },
        }
    )


def architecture(name: str) -> ConfigDict:
    """A named architecture as configuration fields."""
    if name not in ARCHITECTURES:
        raise UserError(f"no architecture {name!r}{did_you_mean(name, ARCHITECTURES)}; there are {', '.join(ARCHITECTURES)}")
    return ConfigDict(ARCHITECTURES[name].to_dict(), type_safe=True)


def model_config(config: ConfigDict) -> CLIPConfig:
    """The architecture of a configuration, checked."""
    return CLIPConfig.from_dict(config.model.to_dict())


def load_config(path: str) -> ConfigDict:
    """Runs `get_config()` of a Python file."""
    file = pathlib.Path(path)
    if not file.is_file():
        near = did_you_mean(file.stem, [f.stem for f in file.parent.glob("*.py")])
        raise UserError(f"--config={path}: no such file{near}")
    definitions = runpy.run_path(str(file))
    if "get_config" not in definitions:
        raise UserError(f"--config={path}: expected a function get_config() in it, found none")
    return definitions["get_config"]().lock()


def parse_command_line(arguments: list[str], options: dict[str, str]) -> tuple[dict[str, str], ConfigDict | None]:
    """Reads `--name=value` for the names in `options`, and `--config.field=value` over the config file.

    Args:
      arguments: the command line without the program.
      options: the names and their defaults; without `config` among them no fields are accepted.

    Returns:
      The options with the values given, and the configuration if there is an option `config`.
    """
    options, fields = dict(options), {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        known = [f"--{option}" for option in options]
        if not argument.startswith("--") or not equals:
            raise UserError(f"argument {argument!r}: expected --name=value; the names are {', '.join(known)}")
        if name.startswith("config.") and "config" in options:
            fields[name.removeprefix("config.")] = value
        elif name in options:
            options[name] = value
        else:
            raise UserError(f"unknown option --{name}{did_you_mean('--' + name, known)}; the names are {', '.join(known)}")
    if "config" not in options:
        return options, None
    config = load_config(options["config"])
    for name, value in fields.items():
        set_field(config, name, value)
    return options, config


def set_field(config: ConfigDict, name: str, text: str) -> None:
    """Sets a field, given by its dotted name, to a value of the type that it has."""
    *groups, leaf = name.split(".")
    place = config
    for group in groups:
        place = place.get(group) if isinstance(place, ConfigDict) else None
    if not isinstance(place, ConfigDict) or leaf not in place:
        raise UserError(f"unknown field config.{name}{did_you_mean(name, _field_names(config))}")
    if name == "model":
        config.model = architecture(text)
        return
    current = place[leaf]
    if isinstance(current, ConfigDict):
        raise UserError(f"config.{name} is a group of fields: {', '.join(f'config.{name}.{f}' for f in current)}; set one of those")
    place[leaf] = _parse_value(text, current, name)


def _parse_value(text: str, current, name: str):
    expected = type(current)
    if name in OPTIONAL:
        expected = type(None) if text == "None" else float
    if expected is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = text
    if expected is float and type(value) is int:
        value = float(value)
    if expected is tuple and isinstance(value, (list, str, int, float)):
        value = tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not expected:
        raise UserError(f"config.{name}: expected {expected.__name__} such as {current!r}, found {text!r}")
    return value


def _field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for name, value in config.items():
        names += _field_names(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return names


def did_you_mean(name: str, known) -> str:
    """`; did you mean X or Y?`, or nothing where no known name is near."""
    known = list(known)
    # A field is often remembered without its group.
    near = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    near += [k for k in difflib.get_close_matches(name, known, n=3, cutoff=0.6) if k not in near]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def validate(config: ConfigDict) -> None:
    """Checks what one field cannot know of another, before anything is allocated."""
    model_config(config)
    if config.model.tokenizer != "openai":
        raise UserError(
            f"config.model.tokenizer is {config.model.tokenizer!r}, and training makes tokens with OpenAI's alone; set it to "
            f"'openai' and config.model.text.vocabulary_size to {VOCABULARY_SIZE}, or take another architecture"
        )
    kind, bias = config.loss.kind, config.model.initial_logit_bias
    for group, name, choices in (
        ("loss", "kind", ("softmax", "sigmoid")),
        ("loss", "form", ("auto", "plain", "ring")),
        ("optimizer", "name", ("adamw", "lion", "lamb", "sgd")),
        ("optimizer", "mu_dtype", ("float32", "bfloat16")),
    ):
        found = config[group][name]
        if found not in choices:
            raise UserError(f"config.{group}.{name} is {found!r}, expected {', '.join(choices)}{did_you_mean(found, choices)}")
    if kind == "softmax" and bias is not None:
        raise UserError(
            f"config.model.initial_logit_bias is {bias}, and the softmax loss has no bias; "
            "set config.loss.kind to 'sigmoid', or the bias to None"
        )
    if kind == "sigmoid" and bias is None:
        raise UserError(
            "config.loss.kind is 'sigmoid', which needs a bias; set config.model.initial_logit_bias, to -10.0 as SigLIP, and "
            "config.model.initial_logit_scale to 2.302585, the logarithm of 10"
        )
    if not 0 <= config.patch_dropout < 1:
        raise UserError(f"config.patch_dropout is {config.patch_dropout}, expected a share from 0 to below 1")
    if config.patch_dropout and config.model.vision.pooling != ViTConfig.pooling:
        raise UserError(f"config.patch_dropout is {config.patch_dropout}, and only a ViT has patches that can be left out; set it to 0")
    if config.microbatches > 1 and isinstance(model_config(config).vision, (ResNetConfig, SmallResNetConfig)):
        raise UserError(
            f"config.microbatches is {config.microbatches}, and the BatchNorm of a ResNet takes the statistics of a whole batch, "
            "so that parts would not give its gradient; set it to 1, or take a ViT"
        )
    for name in ("microbatches", "batch_size", "total_steps", "log_every", "checkpoint_every", "checkpoints_kept"):
        if config[name] < 1:
            raise UserError(f"config.{name} is {config[name]}, expected at least 1")
    if config.nonfinite.in_a_row < 1:
        raise UserError(f"config.nonfinite.in_a_row is {config.nonfinite.in_a_row}, expected at least 1")
    for name in ("checkpoint_minutes", "milestone_every"):
        if config[name] < 0:
            raise UserError(f"config.{name} is {config[name]}, expected 0, for never, or more")
    if config.nonfinite.rollbacks < 0:
        raise UserError(f"config.nonfinite.rollbacks is {config.nonfinite.rollbacks}, expected at least 0")
    if config.evaluate.minutes < 0:
        raise UserError(f"config.evaluate.minutes is {config.evaluate.minutes}, expected 0, for never, or more")
    if config.evaluate.minutes and not config.evaluate.tasks:
        raise UserError("config.evaluate.tasks is empty, expected at least one, such as emoji; or set config.evaluate.minutes to 0")
    if not config.data.sets:
        raise UserError("config.data.sets is empty, expected at least one set: a folder, a table, or shards")
    Augmentation(**config.data.augment)  # which checks itself
    for name, lowest in (("threads", 0), ("workers", 0), ("prefetch", 0), ("max_bad", 0), ("stall_seconds", 0.01)):
        if config.data[name] < lowest:
            raise UserError(f"config.data.{name} is {config.data[name]}, expected at least {lowest}")
    if config.data.workers and config.data.cache:
        raise UserError("config.data.cache with config.data.workers: each of them would keep every picture; set one of the two")
    for name in ("weights", "caption_weights"):
        if not all(isinstance(weight, (int, float)) for weight in config.data[name]):
            raise UserError(f"config.data.{name} is {config.data[name]}, expected numbers")
    if config.data.template_rate and not config.data.templates:
        raise UserError("config.data.templates is empty, and config.data.template_rate above 0; set one of the two")
    if config.seed < 0:
        raise UserError(f"config.seed is {config.seed}, expected 0 or more")
    if not config.data.caption:
        raise UserError("config.data.caption is empty, expected the name of at least one field")
    o = config.optimizer
    for name, within, expected in (
        ("learning_rate", o.learning_rate >= 0, "at least 0"),
        ("warmup_steps", o.warmup_steps >= 0, "at least 0"),
        ("weight_decay", o.weight_decay >= 0, "at least 0"),
        ("b1", 0 <= o.b1 < 1, "a share from 0 to below 1"),
        ("b2", 0 <= o.b2 < 1, "a share from 0 to below 1"),
        ("eps", o.eps > 0, "above 0"),  # or what has no gradient would be 0 / 0
        ("gradient_clip", o.gradient_clip > 0, "above 0; set it to 1e9 to clip nothing"),
    ):
        if not within:
            raise UserError(f"config.optimizer.{name} is {o[name]}, expected {expected}")
    if config.optimizer.warmup_steps >= config.total_steps:
        raise UserError(
            f"config.optimizer.warmup_steps {config.optimizer.warmup_steps} does not leave any of the "
            f"{config.total_steps} steps of config.total_steps; lower it"
        )
    for i, template in enumerate(config.data.templates):
        if template.count("{}") != 1:
            raise UserError(f"config.data.templates[{i}] is {template!r}, expected one {{}} in it for the caption")
