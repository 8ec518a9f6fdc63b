"""The embedded default: emoji by six illustrators, tested on a seventh.

    python train.py

Two cores of an AVX2 machine, jax 0.10.2: about 5.5 minutes of training, then 41.3 % top-1 and 65.3 % top-5
among 1,911 names on the seventh (chance 0.05 and 0.26 %).  docs/emoji.md tells how it was chosen.
"""

import pathlib

from clip_jax.config import architecture, default_config
from clip_jax.evaluation.emoji import EMOJI_TEMPLATES

VENDORS = ("noto", "noto_v1", "twemoji", "openmoji", "emojitwo", "fxemoji")
EMOJI = pathlib.Path(__file__).parent.parent / "clip_jax" / "emoji"


def get_config():
    config = default_config()
    config.batch_size = 256
    config.total_steps = 1240
    config.log_every = 10
    config.checkpoint_every = 250
    config.model = architecture("emoji")
    config.model.dtype = "float32"  # XLA's CPU compiler gains nothing from bfloat16
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 62
    config.optimizer.weight_decay = 0.1
    data = config.data
    data.sets = tuple(str(EMOJI / vendor / "1.0.0") for vendor in VENDORS)
    data.caption = ("name",)
    data.group = "codepoints"
    data.keywords = "keywords"
    data.keyword_rate = 0.08
    data.templates = EMOJI_TEMPLATES
    data.template_rate = 0.45
    data.augment.crop_scale = (1.0, 1.0)
    data.augment.rotate = 7.5
    data.augment.zoom = (0.92, 1.16)
    data.augment.shift = 0.05
    data.augment.stretch = 0.15
    data.augment.color_rate = 0.6
    data.augment.hue = 40.0
    data.augment.saturation = 0.5
    data.augment.light = 60.0
    data.augment.background_rate = 1 / 3
    data.cache = True
    data.threads = 0  # pictures this small are not worth a thread each
    data.prefetch = 32  # also made while the step is compiled
    return config
