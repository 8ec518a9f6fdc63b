"""OpenAI's state dict as parameters of `clip_jax.models.CLIP`, for the golden files."""

import numpy as np


def parameters(weights: dict[str, np.ndarray], vision_layers: int | tuple[int, ...]) -> tuple[dict, dict]:
    """Parameters and running statistics, by the names of modules."""
    w = lambda name: weights[name].astype(np.float32)
    norm = lambda name: {"scale": w(f"{name}.weight"), "bias": w(f"{name}.bias")}
    linear = lambda name: {"kernel": w(f"{name}.weight").T, "bias": w(f"{name}.bias")}

    def transformer(name: str, layers: int) -> dict:
        def block(prefix: str) -> dict:
            qkv = {"kernel": w(f"{prefix}.attn.in_proj_weight").T, "bias": w(f"{prefix}.attn.in_proj_bias")}
            return {
                "ln_1": norm(f"{prefix}.ln_1"),
                "attention": {"qkv": qkv, "out": linear(f"{prefix}.attn.out_proj")},
                "ln_2": norm(f"{prefix}.ln_2"),
                "mlp": {"up": linear(f"{prefix}.mlp.c_fc"), "down": linear(f"{prefix}.mlp.c_proj")},
            }

        return {"blocks": {i: block(f"{name}.resblocks.{i}") for i in range(layers)}}

    def convolution(conv: str, bn: str) -> tuple[dict, dict]:
        statistics = {"mean": w(f"{bn}.running_mean"), "var": w(f"{bn}.running_var")}
        return {"kernel": w(f"{conv}.weight").transpose(2, 3, 1, 0), "norm": norm(bn)}, {"norm": statistics}

    def resnet(stages: tuple[int, ...]) -> tuple[dict, dict]:
        pairs = {("stem", i): convolution(f"visual.conv{i + 1}", f"visual.bn{i + 1}") for i in range(3)}
        blocks = [f"visual.layer{stage + 1}.{i}" for stage, count in enumerate(stages) for i in range(count)]
        for i, name in enumerate(blocks):
            for part, k in (("reduce", 1), ("convolve", 2), ("expand", 3)):
                pairs["blocks", i, part] = convolution(f"{name}.conv{k}", f"{name}.bn{k}")
            if f"{name}.downsample.0.weight" in weights:
                pairs["blocks", i, "shortcut"] = convolution(f"{name}.downsample.0", f"{name}.downsample.1")
        params, statistics = {}, {}
        for path, (param, statistic) in pairs.items():
            for tree, leaf in ((params, param), (statistics, statistic)):
                for key in path[:-1]:
                    tree = tree.setdefault(key, {})
                tree[path[-1]] = leaf
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "c_proj"}
        params["pool"] = {ours: linear(f"visual.attnpool.{theirs}") for ours, theirs in names.items()}
        params["pool"]["position_embedding"] = w("visual.attnpool.positional_embedding")
        return params, statistics

    def vit(layers: int) -> tuple[dict, dict]:
        patch = w("visual.conv1.weight")  # [width, channel, row, column]
        return {
            "patch_embedding": {"kernel": patch.transpose(2, 3, 1, 0).reshape(-1, len(patch))},
            "class_embedding": w("visual.class_embedding"),
            "position_embedding": w("visual.positional_embedding"),
            "ln_pre": norm("visual.ln_pre"),
            "transformer": transformer("visual.transformer", layers),
            "ln_post": norm("visual.ln_post"),
            "projection": w("visual.proj"),
        }, {}

    vision, statistics = vit(vision_layers) if isinstance(vision_layers, int) else resnet(vision_layers)
    text = {
        "token_embedding": w("token_embedding.weight"),
        "position_embedding": w("positional_embedding"),
        "transformer": transformer("transformer", 2),
        "ln_final": norm("ln_final"),
        "projection": w("text_projection"),
    }
    params = {"vision": vision, "text": text, "logit_scale": w("logit_scale")}
    return params, {"vision": statistics} if statistics else {}
