"""ViT-B/32 on image-caption pairs of your own, with open_clip's recipe.

    python train.py --config=configs/vit_b32.py --workdir=runs/mine --config.data.sets=SET

SET is a table, such as pairs.csv, tars, a folder or a TFDS set, whose records have `image` and `caption`; see
docs/data.md.  No run of it was measured yet: there is no expected metric.
"""

from clip_jax.config import architecture, default_config


def get_config():
    config = default_config()
    config.model = architecture("ViT-B/32")
    config.batch_size = 1024
    config.total_steps = 50_000
    config.optimizer.warmup_steps = 2_000
    return config
