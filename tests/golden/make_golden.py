"""Makes the golden files of this folder from the PyTorch original.  Run by hand; no test runs it.

    pip install torch==2.13.0 transformers==4.57.6 ftfy regex 'setuptools<81'
    pip install --no-deps clip-anytorch==2.6.0 torchvision==0.28.0
    python tests/golden/make_golden.py

`clip-anytorch` packages openai/CLIP unchanged.  What is written:

    tokens.jsonl.gz    strings and OpenAI's ids for them
    towers.npz         random weights under OpenAI's names, inputs, and the features and hidden states that OpenAI's model gives
    siglip.npz         the same of a SigLIP by transformers
    torchscript.pt.gz  a tiny CLIP as OpenAI published theirs: a TorchScript archive in half precision
    training.pt.gz     the same as open_clip's training saves it: a pickle with the optimizer, and `module.` before names
    archives.json      the SHA-256 of each of their tensors
"""

import gzip
import hashlib
import io
import json
import pathlib
import random

import numpy as np
import torch

# torchvision's wheel for GPUs imports on a machine without one if these operators are declared.
operators = torch.library.Library("torchvision", "DEF")
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import clip.model
import transformers
from clip.simple_tokenizer import SimpleTokenizer

HERE = pathlib.Path(__file__).parent
WORDS = "a photo of the red dog café naïve ÅNGSTRÖM 東京 Москва مرحبا हिन्दी 👍🏽 👩‍👩‍👧 don't I'LL it's 3.14 1,000 #tag @me C++ ſtraſſe İstanbul ﬁne".split()
SNIPPETS = ["&amp;", "&lt;b&gt;", "&amp;lt;", "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "&lt;|endoftext|&gt;"]
SNIPPETS += ["!<|endoftext|>!", "\r\n", "\t", "\u00a0", "\u200b", "\u3000", "â€™", "Ã©", "schÃ¶n", "'S", "'ſ", "ΣΑΣ", "ÀB", "...", "!!!"]
SNIPPETS += ["\x1b[31m", "\ufeff", "\u2028", "“quoted”", "a_b", "x²", "½", "Ⅳ", "①", "e\u0301", "\u0000", "&nbsp;", "&#39;", "’s"]


def strings() -> list[str]:
    """Captions, words, snippets that trip tokenizers, and random characters, some 5,000 in all."""
    rng = random.Random(0)
    found = ["", " ", "hello world", "a diagram", *WORDS, *SNIPPETS]
    labels = HERE.parent.parent / "clip_jax" / "emoji" / "noto" / "1.0.0" / "label.labels.txt"
    found += labels.read_text(encoding="utf-8").splitlines()
    ranges = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x5D0, 0x5EB), (0x900, 0x940), (0x2000, 0x206F)]
    ranges += [(0x3040, 0x30FF), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFF00, 0xFF60), (0x1F300, 0x1F600)]
    for _ in range(1600):
        found.append("".join(rng.choice([" ", "", ""]) + rng.choice(WORDS + SNIPPETS) for _ in range(rng.randint(1, 12))))
        low, high = rng.choice(ranges)
        found.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 20))))
    return found


def rich(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every weight, gain, bias and running statistic a value that shows if it is lost.

    Embeddings and the stem stay small, so that a wrong epsilon of a norm shows as well.
    """
    rng = np.random.RandomState(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.dtype.is_floating_point or name == "logit_scale":
                continue
            noise = torch.from_numpy(rng.standard_normal(value.shape).astype(np.float32))
            if name.endswith("running_var"):
                value.copy_(1 + 0.5 * noise.tanh())
            elif value.ndim < 2 and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif "embedding" in name or name.startswith("visual.conv1"):
                value.copy_(0.05 * noise)
            elif value.ndim < 2:
                value.copy_(0.2 * noise)
            else:
                value.copy_(noise * np.prod(value.shape[1:]) ** -0.5)
            # Four significant bits: exact in half precision, and a small file when compressed.
            mantissa, exponent = torch.frexp(value)
            value.copy_(torch.ldexp((16 * mantissa).round() / 16, exponent))
    return model.eval().float()


def tower_features(prefix: str, model: clip.model.CLIP, size: int, vocabulary: int) -> dict[str, np.ndarray]:
    rng = np.random.RandomState(1)
    images = rng.standard_normal((4, size, size, 3)).astype(np.float16).astype(np.float32)
    tokens = np.zeros((4, 16), np.int64)
    for row, length in zip(tokens, (3, 9, 15, 16)):  # the last id is EOT, the largest; then padding
        row[:length] = [vocabulary - 2, *rng.randint(1, vocabulary - 2, length - 2), vocabulary - 1]
    with torch.no_grad():
        arrays = {
            "images": images.astype(np.float16),
            "tokens": tokens,
            "image_features": model.encode_image(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy(),
            "text_features": model.encode_text(torch.from_numpy(tokens)).numpy(),
            **hidden_states(model, tokens),
        }
    arrays |= {f"weights/{name}": value.half().numpy() for name, value in model.state_dict().items()}
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def hidden_states(model: clip.model.CLIP, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Of the text tower: after the last block with ln_final, and after the penultimate without."""
    x = model.token_embedding(torch.from_numpy(tokens)) + model.positional_embedding
    states = block_outputs(model.transformer.resblocks, lambda: model.transformer(x.permute(1, 0, 2)))
    last, penultimate = (state.permute(1, 0, 2) for state in (states[-1], states[-2]))
    return {"text_last": model.ln_final(last).numpy(), "text_penultimate": penultimate.numpy()}


def block_outputs(blocks: torch.nn.ModuleList, run) -> list[torch.Tensor]:
    """What each block gives while `run` runs."""
    states = []
    keep = lambda module, inputs, output: states.append(output[0] if isinstance(output, tuple) else output)
    handles = [block.register_forward_hook(keep) for block in blocks]
    run()
    for handle in handles:
        handle.remove()
    return states


def siglip_features() -> dict[str, np.ndarray]:
    tower = {"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 2, "num_attention_heads": 2}
    text_config = tower | {"hidden_size": 32, "intermediate_size": 119, "vocab_size": 128, "max_position_embeddings": 16}
    vision_config = tower | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 239, "image_size": 36, "patch_size": 8}
    config = transformers.SiglipConfig(text_config=text_config | {"projection_size": 64}, vision_config=vision_config)
    torch.manual_seed(0)
    model = rich(transformers.SiglipModel(config))
    rng = np.random.RandomState(1)
    images = rng.standard_normal((4, 36, 36, 3)).astype(np.float16).astype(np.float32)
    tokens = rng.randint(0, 128, (4, 16))
    with torch.no_grad():
        pixels, ids = torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(tokens)
        text_states = block_outputs(model.text_model.encoder.layers, lambda: model.text_model(ids))
        image_states = block_outputs(model.vision_model.encoder.layers, lambda: model.vision_model(pixels))
        arrays = {
            "images": images.astype(np.float16),
            "tokens": tokens,
            "image_features": model.get_image_features(pixels).numpy(),
            "text_features": model.get_text_features(ids).numpy(),
            "logits_per_image": model(input_ids=ids, pixel_values=pixels).logits_per_image.numpy(),
            "text_last": model.text_model.final_layer_norm(text_states[-1]).numpy(),
            "text_penultimate": text_states[-2].numpy(),
            "image_last": image_states[-1].numpy(),
        }
    arrays |= {f"weights/{name}": value.half().numpy() for name, value in model.state_dict().items()}
    return arrays


def write_archives() -> None:
    """The two kinds of pickle that people bring, made by PyTorch itself, of one model."""
    text = {"context_length": 4, "vocab_size": 16, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}
    model = rich(clip.model.CLIP(embed_dim=8, image_resolution=8, vision_layers=1, vision_width=64, vision_patch_size=8, **text))
    # The published archives have these three among their tensors.
    for name, value in (("input_resolution", 8), ("context_length", 4), ("vocab_size", 16)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    state = model.half().state_dict()
    digests = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}
    (HERE / "archives.json").write_text(json.dumps(digests, indent=0) + "\n")
    model.context_length = torch.tensor(4)
    traced = torch.jit.trace_module(model.float(), {"encode_text": torch.zeros(1, 4, dtype=torch.long)}).half()
    save("torchscript.pt.gz", lambda file: torch.jit.save(traced, file))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    content = {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": optimizer.state_dict()}
    save("training.pt.gz", lambda file: torch.save(content, file))


def save(name: str, write) -> None:
    buffer = io.BytesIO()
    write(buffer)
    (HERE / name).write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


def main() -> None:
    tokenizer = SimpleTokenizer()
    with gzip.GzipFile(HERE / "tokens.jsonl.gz", "wb", mtime=0) as file:
        for string in strings():
            file.write(json.dumps([string, tokenizer.encode(string)]).encode("ascii") + b"\n")

    text = {"context_length": 16, "vocab_size": 128, "transformer_width": 64, "transformer_heads": 2, "transformer_layers": 2}
    vit = {"image_resolution": 32, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 8}
    resnet = {"image_resolution": 64, "vision_layers": (1, 2, 1, 1), "vision_width": 8, "vision_patch_size": None}
    arrays = tower_features("vit", rich(clip.model.CLIP(embed_dim=32, **vit, **text)), 32, 128)
    arrays |= tower_features("resnet", rich(clip.model.CLIP(embed_dim=32, **resnet, **text)), 64, 128)
    np.savez_compressed(HERE / "towers.npz", **arrays)
    np.savez_compressed(HERE / "siglip.npz", **siglip_features())
    write_archives()


if __name__ == "__main__":
    main()
