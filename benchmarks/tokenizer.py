"""Captions a second: our tokenizer against OpenAI's, on one core, in the same run.

    pip install -r tests/pytorch.txt && pip install --no-deps -r tests/pytorch-no-deps.txt
    python benchmarks/tokenizer.py

Captions are made of the embedded data set's names, 10 words on average.  Each round takes captions that it has not
seen before, and both sides take the same; the sides alternate.  `clip_jax.tokenize` is held against `clip.tokenize`.
"""

import pathlib
import platform
import random
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from without_gpu import torchvision_without_gpu

from clip_jax import tokenize as ours
from clip_jax.evaluation.emoji import load_emoji

_OPERATORS = torchvision_without_gpu()

from clip import tokenize as openais

CAPTIONS, ROUNDS, BATCH = 20_000, 7, 256
FORMS = ("a photo of {} and {} next to {}", "{}: {}, {}.", "The {} with the {}, in front of {}", "an old drawing of {}, {} & {}")


def captions(rng: random.Random, count: int, accents: float) -> list[str]:
    """Texts as a crawl gives them; a share of `accents` is not ASCII."""
    names = load_emoji().class_names
    made = [rng.choice(FORMS).format(*rng.choices(names, k=3)) for _ in range(count)]
    return [text.replace("e", "é", 1) if rng.random() < accents else text for text in made]


def seconds(tokenize, texts: list[str]) -> float:
    """To tokenize all of them in batches."""
    start = time.perf_counter()
    for i in range(0, len(texts), BATCH):
        tokenize(texts[i : i + BATCH])
    return time.perf_counter() - start


def main() -> None:
    rng = random.Random(0)
    print(f"{platform.machine()}, Python {platform.python_version()}; {CAPTIONS:,} captions a round, {ROUNDS} rounds, medians")
    for accents in (0.0, 0.1):
        rounds = {ours: [], openais: []}
        for _ in range(ROUNDS):
            texts = captions(rng, CAPTIONS, accents)
            assert (ours(texts[:BATCH]) == openais(texts[:BATCH]).numpy()).all()
            for tokenize, times in rounds.items():
                times.append(seconds(tokenize, texts))
        ratio = statistics.median(b / a for a, b in zip(*rounds.values()))
        rate = {side: CAPTIONS / statistics.median(times) for side, times in rounds.items()}
        print(f"{accents:4.0%} not ASCII: ours {rate[ours]:9,.0f}/s, OpenAI's {rate[openais]:9,.0f}/s, ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
