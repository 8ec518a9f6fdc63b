import pathlib

import pytest

from clip_jax.config import load_config, model_config, parse_command_line, set_field, validate
from clip_jax.errors import UserError

OPTIONS = {"config": "configs/emoji.py", "workdir": ""}


def test_every_config_file_is_valid_and_has_the_common_fields():
    files = sorted(pathlib.Path("configs").glob("*.py"))
    assert len(files) >= 2
    for file in files:
        config = load_config(str(file))
        if not config.data.sets:  # to be given on the command line
            set_field(config, "data.sets", "somewhere")
        validate(config)
        assert all(name in config for name in ("seed", "batch_size", "total_steps", "log_every", "checkpoint_every"))


def test_fields_are_set_with_their_types():
    arguments = ["--workdir=w", "--config.seed=3", "--config.optimizer.learning_rate=1", "--config.data.cache=false"]
    arguments += ["--config.data.sets=a/b", "--config.data.templates=('a {}', 'the {}')", "--config.data.caption=x=y"]
    options, config = parse_command_line(arguments, OPTIONS)
    _, other = parse_command_line(["--config.model=ViT-B/16", "--config.model.initial_logit_bias=-10"], OPTIONS)
    assert other.model.vision.patch_size == 16 and other.model.initial_logit_bias == -10.0
    assert options["workdir"] == "w" and config.seed == 3 and config.optimizer.learning_rate == 1.0
    assert config.data.sets == ("a/b",) and config.data.templates == ("a {}", "the {}")
    assert config.data.cache is False and config.data.caption == ("x=y",)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.batchsize=8", "unknown field config.batchsize; did you mean batch_size"),
        ("--config.learning_rate=8", "did you mean optimizer.learning_rate"),
        ("--config.optimizer.learning_rat=8", "did you mean optimizer.learning_rate"),
        ("--config.seed.x=8", "unknown field config.seed.x"),
        ("--config.seed=1.5", "config.seed: expected int such as 0, found '1.5'"),
        ("--config.seed=many", "config.seed: expected int"),
        ("--config.data=8", "config.data is a group of fields"),
        ("--config.model=ViT-B/15", "no architecture 'ViT-B/15'; did you mean ViT-B/16"),
        ("--config.data.cache=2", "config.data.cache: expected bool such as True, found '2'"),
        ("--confg=x", "unknown option --confg; did you mean --config"),
        ("--workdir", "expected --name=value"),
        ("train", "expected --name=value"),
        ("--config=configs/emojis.py", "no such file; did you mean emoji"),
        ("--config=configs", "no such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(argument, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_command_line([argument], OPTIONS)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("vision.image_size", "220", "model.vision.image_size 220 is not a multiple of patch_size 32; the nearest is 224"),
        ("vision.image_size", "20", "model.vision.image_size 20 is not a multiple of patch_size 32; the nearest is 32"),
        ("vision.image_size", "0", "model.vision.image_size is 0, expected at least 1"),
        ("vision.image_size", "-32", "model.vision.image_size is -32, expected at least 1"),
        ("vision.patch_size", "0", "model.vision.patch_size is 0, expected at least 1"),
        ("vision.heads", "0", "model.vision.heads is 0, expected at least 1"),
        ("vision.layers", "-1", "model.vision.layers is -1, expected at least 1"),
        ("text.width", "0", "model.text.width is 0, expected at least 1"),
        ("text.heads", "0", "model.text.heads is 0, expected at least 1"),
        ("text.context_length", "0", "model.text.context_length is 0, expected at least 2"),
    ],
)
def test_a_model_that_cannot_be_is_refused_on_the_command_line(field, value, message):
    _, config = parse_command_line(["--config=configs/vit_b32.py", f"--config.model.{field}={value}"], OPTIONS)
    with pytest.raises(UserError, match=message):
        model_config(config)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("nonfinite.in_a_row", "0", "config.nonfinite.in_a_row is 0, expected at least 1"),
        ("nonfinite.rollbacks", "-1", "config.nonfinite.rollbacks is -1, expected at least 0"),
        ("checkpoint_minutes", "-1", "config.checkpoint_minutes is -1.0, expected 0, for never, or more"),
        ("milestone_every", "-5", "config.milestone_every is -5, expected 0, for never, or more"),
        ("total_steps", "0", "config.total_steps is 0, expected at least 1"),
        ("optimizer.warmup_steps", "100000", "warmup_steps 100000 does not leave any"),
        ("optimizer.warmup_steps", "-3", "config.optimizer.warmup_steps is -3, expected at least 0"),
        ("optimizer.learning_rate", "-1", "config.optimizer.learning_rate is -1.0, expected at least 0"),
        ("optimizer.weight_decay", "-0.1", "config.optimizer.weight_decay is -0.1, expected at least 0"),
        ("optimizer.b1", "1", "config.optimizer.b1 is 1.0, expected a share from 0 to below 1"),
        ("optimizer.b2", "1.5", "config.optimizer.b2 is 1.5, expected a share from 0 to below 1"),
        ("optimizer.eps", "-1", "config.optimizer.eps is -1.0, expected above 0"),
        ("optimizer.gradient_clip", "0", "config.optimizer.gradient_clip is 0.0, expected above 0; set it to 1e9 to clip nothing"),
        ("optimizer.gradient_clip", "-1", "config.optimizer.gradient_clip is -1.0, expected above 0; set it to 1e9 to clip nothing"),
        ("data.sets", "()", "config.data.sets is empty"),
        ("data.templates", "('a picture',)", r"templates\[0\] is 'a picture', expected one \{\}"),
        ("model.text.heads", "3", "model.text.width 128 is not a multiple of model.text.heads 3"),
        ("model.tokenizer", "siglip", "config.model.tokenizer is 'siglip', and training makes tokens with OpenAI's alone"),
        ("model.initial_logit_bias", "-10", "initial_logit_bias is -10.0, and the softmax loss has no bias; set config.loss.kind"),
        ("loss.kind", "sigmoid", "config.loss.kind is 'sigmoid', which needs a bias; set config.model.initial_logit_bias"),
        ("loss.kind", "sigmoids", "config.loss.kind is 'sigmoids', expected softmax, sigmoid; did you mean sigmoid"),
        ("loss.form", "rings", "config.loss.form is 'rings', expected auto, plain, ring; did you mean ring"),
        ("microbatches", "2", "microbatches is 2, and the BatchNorm of a ResNet takes the statistics of a whole batch"),
        ("patch_dropout", "0.5", "patch_dropout is 0.5, and only a ViT has patches"),
        ("patch_dropout", "1.0", "patch_dropout is 1.0, expected a share"),
        ("model.remat", "dot", "model.remat is 'dot', expected one of none, dots, full"),
        ("model.activation", "relu", "model.activation is 'relu', expected one of quick_gelu"),
    ],
)
def test_values_that_cannot_be_are_refused(field, value, message):
    config = load_config("configs/emoji.py")
    set_field(config, field, value)
    with pytest.raises(UserError, match=message):
        validate(config)
