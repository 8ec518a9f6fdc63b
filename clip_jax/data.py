"""From records to batches: which pair comes when, what is drawn for it, and what is done about a bad one.

A batch is a pure function of (seed, position), whatever the number of hosts, threads and processes that make it.
A checkpoint keeps the position.
"""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import pathlib
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from ml_collections import ConfigDict

from clip_jax import augment
from clip_jax.errors import BadSample, UserError
from clip_jax.health import Health, Report
from clip_jax.lengths import by_length
from clip_jax.order import Order
from clip_jax.prefetch import made_ahead
from clip_jax.records import Place, Record, Records, missing_field, open_records
from clip_jax.tokenizer import tokenize
from clip_jax.watchdog import Watchdog

ATTEMPTS = 100  # samples that are tried for one row
CAPTION_DRAWS = 10  # random numbers that one caption takes
KEYWORDS = 3  # at most, in a caption


class Sample(NamedTuple):
    """A record, read and decoded."""

    picture: augment.Picture
    captions: dict[str, list[str]]  # by field, those that are not empty
    keywords: list[str]


class Sets:
    """The records of several sets, one set after the other."""

    def __init__(self, data: types.SimpleNamespace):
        """`data` is `config.data`."""
        fields = tuple(filter(None, (data.image, *data.caption, data.group, data.keywords)))
        self.parts: list[Records] = [open_records(name, data.split, fields) for name in data.sets]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        self.broken = [broken for part in self.parts for broken in part.broken]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, indices: Sequence[int]) -> list[Record | BadSample]:
        """Some records, those of one set at once."""
        found: dict[int, Record | BadSample] = {}
        for part, members in itertools.groupby(sorted(set(indices)), self._part):
            members = list(members)
            found |= zip(members, self.parts[part].read([index - int(self.starts[part]) for index in members]))
        return [found[index] for index in indices]

    def place(self, index: int) -> Place:
        part = self._part(index)
        return self.parts[part].place(index - int(self.starts[part]))

    def digest(self) -> str:
        """A SHA-256 of how many records there are, and of the names of a thousand of them, wherever they are mounted."""
        some = np.linspace(0, len(self) - 1, min(len(self), 1000)).astype(int).tolist()
        names = [(pathlib.PurePath(place.shard).name, place.key) for place in map(self.place, some)]
        return hashlib.sha256(json.dumps([self.starts.tolist(), names]).encode()).hexdigest()

    def _part(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1


def texts(value: Any) -> list[str]:
    """The texts of a record's field, which holds one or several; stripped, the empty ones left out."""
    values = np.atleast_1d(value).tolist() if isinstance(value, np.ndarray) else value
    values = [v for v in (values if isinstance(values, (list, tuple)) else [values]) if v is not None and v == v]
    stripped = [(v.decode() if isinstance(v, bytes) else str(v)).strip() for v in values]
    return [text for text in stripped if text]


class TrainingBatches:
    """Random access to the endless batches of a run; or to some rows of each, on one of several hosts."""

    def __init__(self, config: ConfigDict, rows: Sequence[int] | None = None, position: int = 0, together: int = 1):
        """Batch 0 begins at `position` of the order.  Every `together` rows come in the order of their captions' lengths."""
        data = config.data
        self.data = types.SimpleNamespace(**data.to_dict())  # which is faster to read than a ConfigDict
        self.seed, self.batch_size, self.position = config.seed, config.batch_size, position
        self.together = together
        self.rows = list(range(self.batch_size) if rows is None else rows)
        self.strength = augment.Augmentation(**data.augment)
        self.image_size = config.model.vision.image_size
        self.decoded_size = 0 if data.cache else augment.decoded_size(self.image_size, self.strength)
        self.context_length = config.model.text.context_length
        weights = data.caption_weights or (1.0,) * len(data.caption)
        if len(weights) != len(data.caption) or min(weights, default=0) <= 0:
            raise UserError(
                f"config.data.caption_weights is {weights}, expected a number above zero for each of config.data.caption {data.caption}"
            )
        self.caption_weights = dict(zip(data.caption, weights))
        self.records = Sets(self.data)
        # An example is a record, or a group of records that show the same thing.
        self.groups, sizes = self._groups() if data.group else (None, [len(part) for part in self.records.parts])
        self.order = Order(sizes, data.weights, config.seed)
        if sum(sizes) < self.batch_size:
            raise UserError(
                f"config.batch_size is {self.batch_size}, but {', '.join(data.sets)} split {data.split} has "
                f"{sum(sizes)} examples, expected at least one batch; lower config.batch_size"
            )
        self.cache: dict[int, Sample | BadSample] | None = {} if data.cache else None
        self.reading: list[str] = []  # for the watchdog: the shards of the reads that are under way

    def __len__(self) -> int:
        return 2**62  # Grain wants to know; a run ends by its number of steps.

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A batch: `image` uint8 [B, S, S, 3], `tokens` int32 [B, T], `place` int32 [B], the rows, and a `report` of how it came about.

        Random numbers are drawn for the rows of all hosts, so that each row has its own on any number of them.
        """
        start = self.start_of(number)
        rng = np.random.default_rng((self.seed, 1, start))
        member, caption = rng.random(self.batch_size)[self.rows], rng.random((self.batch_size, CAPTION_DRAWS))[self.rows]
        views = rng.random((self.batch_size, augment.DRAWS), np.float32)[self.rows]
        report = Report(seen=len(self.rows))
        samples = self._samples(start, member, report)
        started = time.perf_counter()
        captions = [self._caption(sample, draws.tolist()) for sample, draws in zip(samples, caption)]
        # As OpenAI trained: a caption that is too long loses its end, and keeps its EOT.
        tokens = tokenize(captions, self.context_length, truncate=True)
        order = by_length(tokens, self.together)
        view = lambda row: augment.augment(samples[row].picture, self.image_size, self.strength, views[row])
        pixels = np.stack(self._map(view, order))
        report.seconds["decode"] += time.perf_counter() - started
        return {"image": pixels, "tokens": tokens[order], "place": np.array(self.rows, np.int32)[order], "report": report}

    def start_of(self, number: int) -> int:
        """The position at which a batch begins."""
        return self.order.start(self.order.after(self.position, self.batch_size, int(number)), self.batch_size)

    def indices(self, number: int) -> list[int]:
        """The records of a batch's rows, were all of them good."""
        start = self.start_of(number)
        member = np.random.default_rng((self.seed, 1, start)).random(self.batch_size)
        return [self._index(self.order.example(start + row), member[row]) for row in self.rows]

    def shards(self, number: int) -> list[str]:
        """The files or sets that a batch is read from."""
        return sorted({self.records.place(index).shard for index in self.indices(number)})

    def _index(self, example: int, member: float) -> int:
        if self.groups is None:
            return example
        group = self.groups[example]
        return group[int(member * len(group))]

    def _samples(self, start: int, member: np.ndarray, report: Report) -> list[Sample]:
        """A good sample for each row.  The place of a bad one goes to another of its set, drawn at random."""
        examples = [self.order.example(start + row) for row in self.rows]
        found: list[Sample | None] = [None] * len(self.rows)
        for attempt in range(ATTEMPTS):
            open_rows = [i for i, sample in enumerate(found) if sample is None]
            indices = [self._index(examples[i], member[i]) for i in open_rows]
            for i, index, sample in zip(open_rows, indices, self._read(indices, report)):
                if isinstance(sample, Sample):
                    found[i] = sample
                    continue
                report.bad.append((self.records.place(index), sample.reason, str(sample)))
                draw = np.random.default_rng((self.seed, 2, start, self.rows[i], attempt))
                own_set = self.order.set_of(examples[i])
                examples[i] = own_set[int(draw.integers(len(own_set)))]
            if all(sample is not None for sample in found):
                return found
            if len(report.bad) == len(self.rows) * (attempt + 1) >= 64:
                break
        raise UserError(report.nothing_good())

    def _read(self, indices: list[int], report: Report) -> list[Sample | BadSample]:
        """Records, read together and decoded in threads; or from the cache."""
        if self.cache is not None:
            if missing := [index for index in indices if index not in self.cache]:
                self.cache |= zip(missing, self._read_now(missing, report))
            return [self.cache[index] for index in indices]
        return self._read_now(indices, report)

    def _read_now(self, indices: list[int], report: Report) -> list[Sample | BadSample]:
        started = time.perf_counter()
        self.reading = sorted({self.records.place(index).shard for index in indices})
        records = self.records.read(indices)
        self.reading = []
        read = time.perf_counter()
        samples = self._map(self._sample, indices, records)
        report.seconds["read"] += read - started
        report.seconds["decode"] += time.perf_counter() - read
        return samples

    def _map(self, function: Callable, *arguments: Sequence | np.ndarray) -> list:
        """`map`, in so many threads as configured, a stretch of rows in each."""
        threads, count = self.data.threads, len(arguments[0])
        if not threads:
            return list(map(function, *arguments))
        bounds = np.linspace(0, count, min(4 * threads, count) + 1).astype(int).tolist()
        stretch = lambda first, end: list(map(function, *(argument[first:end] for argument in arguments)))
        return list(itertools.chain.from_iterable(_pool(threads).map(stretch, bounds[:-1], bounds[1:])))

    def _sample(self, index: int, record: Record | BadSample) -> Sample | BadSample:
        if isinstance(record, BadSample):
            return record
        place, data = self.records.place(index), self.data
        for field in filter(None, (data.image, data.group, data.keywords)):
            if field not in record:
                return missing_field(place, field, list(record))
        fields = [field for field in data.caption if field in record]
        if not fields:
            return missing_field(place, data.caption[0], list(record))
        if not isinstance(record[data.image], (bytes, bytearray, memoryview)):
            found = f"{record[data.image]!r:.60}"
            return BadSample("missing field", f"{place} field {data.image!r}: expected the bytes of a picture, found {found}")
        try:
            captions = {field: found for field in fields if (found := texts(record[field]))}
            keywords = texts(record[data.keywords]) if data.keywords else []
        except UnicodeDecodeError as error:
            return BadSample("wrong encoding", f"{place}: expected a text in UTF-8 ({error}); mend or remove this record")
        if not captions:
            where = f"{place} field {', '.join(map(repr, fields))}"
            return BadSample("empty caption", f"{where}: expected a caption, found an empty one; mend or remove this record")
        try:
            picture = augment.decode(record[data.image], f"{place} field {data.image!r}", self.decoded_size)
        except BadSample as bad:
            return bad
        except MemoryError as error:
            return BadSample("too large", f"{place}: {error}")
        if self.data.cache:  # In memory no pixel is kept that training would not see.
            height, width, channels = picture.shape
            whole = PIL.Image.frombytes("RGBa" if channels == 4 else "RGB", (width, height), picture.tobytes())
            picture = np.asarray(whole.resize((self.image_size, self.image_size), PIL.Image.BICUBIC))
        return Sample(picture, captions, keywords)

    def _groups(self) -> tuple[list[list[int]], list[int]]:
        """The records that are alike in `group`, and how many such examples each set begins."""
        found: dict[str, list[int]] = {}
        sizes = []
        for part, first in zip(self.records.parts, self.records.starts.tolist()):
            before = len(found)
            for start in range(0, len(part), 1024):  # with the pictures, which memory might not hold all at once
                stretch = range(start, min(start + 1024, len(part)))
                for index, record in enumerate(part.read(stretch), first + start):
                    name = [] if isinstance(record, BadSample) else texts(record.get(self.data.group))
                    if name:
                        found.setdefault(name[0], []).append(index)
                        continue
                    place = self.records.place(index)
                    bad = record if isinstance(record, BadSample) else missing_field(place, self.data.group, list(record))
                    self.records.broken.append((place, bad.reason, str(bad)))
            sizes.append(len(found) - before)
        return list(found.values()), sizes

    def _caption(self, sample: Sample, draws: list[float]) -> str:
        field_draw, which, kind, both, whether, template, count, *keyword_draws = draws
        captions = sample.captions[_weighted({name: self.caption_weights[name] for name in sample.captions}, field_draw)]
        caption, data = captions[int(which * len(captions))], self.data
        if sample.keywords and kind < data.keyword_rate:
            left, drawn = list(sample.keywords), []
            for draw in keyword_draws[: 1 + int(count * KEYWORDS)]:
                if left:
                    drawn.append(left.pop(int(draw * len(left))))
            return ", ".join([caption, *drawn] if both < 0.5 else drawn)
        if whether < data.template_rate:
            return data.templates[int(template * len(data.templates))].replace("{}", caption)
        return caption


def _weighted(weights: dict[str, float], draw: float) -> str:
    """One of the names, as likely as its weight says."""
    reached, total = 0.0, sum(weights.values())
    for name, weight in weights.items():
        reached += weight / total
        if draw < reached:
            return name
    return name


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads, "decode")


def explain_step(config: ConfigDict, step: str) -> str:
    """The samples of a step, counted from 1, a line each: row, shard and key; of a run with this batch size from the start."""
    if not step.isdigit() or not int(step):
        raise UserError(f"--explain-step={step}: expected the number of a step, from 1")
    batches = TrainingBatches(config)
    places = [batches.records.place(index) for index in batches.indices(int(step) - 1)]
    return "\n".join(f"{row}\t{place.shard}\t{place.key}" for row, place in enumerate(places))


class Batches:
    """Endless batches, as TrainingBatches has them, made ahead of time."""

    def __init__(self, config: ConfigDict, rows: Sequence[int] | None, health: Health, together: int):
        self.config, self.rows, self.health = config, rows, health
        self.source = TrainingBatches(config, rows, together=together)
        health.broken(self.source.records.broken)
        self.iterator = None
        self.watchdog = Watchdog(self._reading, config.data.stall_seconds)
        self._go_on(0)

    def _go_on(self, position: int) -> None:
        data = self.config.data
        self._stop()
        self.source.position, self.taken = position, 0
        self.iterator = made_ahead(self.source, data.prefetch, data.workers)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        with self.watchdog:
            batch = next(self.iterator)
        self.taken += 1
        self.health.record(batch.pop("report"))
        return batch

    def _reading(self) -> list[str]:
        """The shards that are being read; of workers, those of the batch that is waited for."""
        return self.source.shards(self.taken) if self.config.data.workers else self.source.reading

    def close(self) -> None:
        """Ends the workers, and the thread that watches."""
        self.watchdog.close()
        self._stop()

    def _stop(self) -> None:
        if self.iterator is not None:
            self.iterator.close()

    def get_state(self) -> dict[str, Any]:
        """The position: small, and restored at the same cost at any step, also with another batch size."""
        position = self.source.order.after(self.source.position, self.source.batch_size, self.taken)
        return {"position": position, "examples": self.source.order.sizes}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on at a position.

        Raises:
          UserError: the sets have other numbers of examples now, among which the position means nothing.
        """
        if set(state) != {"position", "examples"}:
            raise UserError(f"the data position of the checkpoint is {state}, which an older version wrote; take another --workdir")
        if state["examples"] != self.source.order.sizes:
            raise UserError(
                f"the data sets have {self.source.order.sizes} examples and had {state['examples']} when the checkpoint was "
                "written, so that its position means nothing; bring back what they were, or take another --workdir"
            )
        self._go_on(int(state["position"]))


def training_batches(
    config: ConfigDict, rows: Sequence[int] | None = None, health: Health | None = None, together: int = 1
) -> Batches:
    """Endless batches, or these `rows` of each, with `get_state()` and `set_state()`."""
    return Batches(config, rows, health or Health(None, config.data.max_bad), together)
