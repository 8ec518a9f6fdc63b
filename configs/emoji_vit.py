"""The embedded emoji with a plain vision transformer, for comparison.  No run of it was measured yet.

    python train.py --config=configs/emoji_vit.py
"""

import pathlib

from clip_jax.config import architecture, load_config


def get_config():
    config = load_config(str(pathlib.Path(__file__).parent / "emoji.py")).unlock()
    config.model = architecture("emoji-vit")
    config.model.dtype = "float32"
    return config
