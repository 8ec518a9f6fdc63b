"""The embedded default: emoji by three vendors, tested on a fourth.

    python train.py

Two CPU cores, ... minutes.
"""

import pathlib

from clip_jax.config import architecture, default_config

EMOJI = pathlib.Path(__file__).parent.parent / "clip_jax" / "emoji"


def get_config():
    config = default_config()
    config.batch_size = 128
    config.total_steps = 2600
    config.log_every = 20
    config.checkpoint_every = 500
    config.model = architecture("emoji")
    config.model.dtype = "float32"  # CPUs gain nothing from bfloat16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 130
    config.optimizer.weight_decay = 0.1
    data = config.data
    data.sets = tuple(str(EMOJI / vendor / "1.0.0") for vendor in ("noto", "twemoji", "openmoji"))
    data.caption = "name"
    data.group = "codepoints"
    data.keywords = "keywords"
    data.keyword_rate = 0.15
    data.templates = ("a picture of {}", "an icon of {}", "{} emoji", "an emoji of {}", "a drawing of {}", "the {} symbol")
    data.template_rate = 0.4
    data.augment.crop_scale = (1.0, 1.0)
    data.augment.rotate = 15.0
    data.augment.zoom = (0.85, 1.35)
    data.augment.shift = 0.15
    data.augment.stretch = 0.15
    data.augment.color_rate = 0.5
    data.augment.background_rate = 1 / 3
    data.cache = True
    data.threads = 1  # one is enough, and two only wait for each other
    return config
