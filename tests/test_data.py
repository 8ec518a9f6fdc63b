import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sets import prepare, records

from clip_jax import images
from clip_jax.config import load_config
from clip_jax.data import TrainingBatches, explain_step, texts, training_batches
from clip_jax.errors import UserError
from clip_jax.evaluation.emoji import load_emoji
from clip_jax.records.prepared import Prepared
from clip_jax.tokenizer import decode

EMOJI = "configs/emoji.py"


@pytest.fixture(scope="module")
def emoji_config():
    config = load_config(EMOJI)
    config.batch_size = 64
    return config


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    return prepare(tmp_path_factory.mktemp("pairs"), records(10))


def config_of(folder: str, **data):
    config = load_config(EMOJI).unlock()
    config.batch_size = 4
    config.data.update({"sets": (folder,), "caption": ("caption",), "group": "", "keywords": "", "cache": False} | data)
    return config


def equal(a: dict, b: dict) -> bool:
    return all((a[name] == b[name]).all() for name in ("image", "tokens"))


def every_record(records) -> list[dict]:
    return records.read(range(len(records)))


def test_order_is_a_function_of_seed_and_step(emoji_config):
    first, second = training_batches(emoji_config), training_batches(emoji_config)
    batches = [next(first) for _ in range(4)]
    assert all(equal(batch, next(second)) for batch in batches)
    assert not equal(batches[0], batches[1])
    other = emoji_config.copy_and_resolve_references()
    other.seed = 1
    assert not equal(next(training_batches(other)), batches[0])


def test_threads_do_not_change_the_order(emoji_config):
    other = emoji_config.copy_and_resolve_references()
    other.data.threads, other.data.cache = 8, False
    one, eight = training_batches(emoji_config), training_batches(other)
    for _ in range(3):
        assert (next(one)["tokens"] == next(eight)["tokens"]).all()


def test_a_restored_position_goes_on_to_the_bit_also_in_a_later_pass(pairs):
    config = config_of(pairs)  # 10 records, so 2 batches of 4 a pass
    batches = training_batches(config)
    taken, positions = [], []
    for _ in range(7):
        positions.append(batches.get_state())
        taken.append(next(batches))
    for step in (0, 1, 2, 5):
        resumed = training_batches(config)
        resumed.set_state(positions[step])
        assert all(equal(next(resumed), batch) for batch in taken[step:])


def test_each_pass_shows_every_example_at_most_once_in_a_new_order(pairs):
    config = config_of(pairs, template_rate=0.0)
    config.batch_size = 5
    batches = training_batches(config)
    passes = []
    for _ in range(3):
        rows = np.concatenate([next(batches)["tokens"] for _ in range(2)])
        captions = [decode([i for i in row[1:].tolist() if i not in (0, 49407)]) for row in rows]
        assert len(set(captions)) == 10
        passes.append(captions)
    assert passes[0] != passes[1] != passes[2]


def test_a_batch_never_shows_one_emoji_twice_and_draws_from_all_vendors(emoji_config):
    batches = TrainingBatches(emoji_config)
    assert len(batches.groups) == 1720
    vendors = [[batches.records.place(index).shard.split("/")[-2] for index in group] for group in batches.groups]
    assert all(len(group) == len(set(group)) and {"noto", "twemoji", "openmoji"} <= set(group) for group in vendors)
    assert {vendor for group in vendors for vendor in group} == {folder.split("/")[-2] for folder in emoji_config.data.sets}
    keys = [{texts(record["codepoints"])[0] for record in batches.records.read(group)} for group in batches.groups]
    assert all(len(key) == 1 for key in keys) and len(set.union(*keys)) == 1720


def test_every_picture_is_framed_alike(emoji_config):
    folder = emoji_config.data.sets[0].replace("noto", "{}")
    for vendor, split in (("noto", "train"), ("openmoji", "held_out"), ("emojitwo", "train"), ("fluent", "test")):
        records = Prepared(folder.format(vendor), split)
        for index in range(0, len(records), len(records) // 20):
            drawn = images.decode(records.read([index])[0]["image"], vendor).getchannel("A").point(lambda a: 255 * (a > 64)).getbbox()
            assert 59 <= max(drawn[2] - drawn[0], drawn[3] - drawn[1]) <= 63, (vendor, index, drawn)
            assert abs(drawn[0] + drawn[2] - 64) <= 2 and abs(drawn[1] + drawn[3] - 64) <= 2, (vendor, index, drawn)


def test_neither_the_test_vendor_nor_held_out_emoji_are_ever_trained_on(emoji_config):
    assert not any("fluent" in folder for folder in emoji_config.data.sets)
    names = lambda folder, split: {texts(r["name"])[0] for r in every_record(Prepared(folder, split))}
    emoji = load_emoji()
    held_out = {emoji.names[i] for i in emoji.held_out}
    for folder in emoji_config.data.sets:
        assert not held_out & names(folder, "train")
        assert "train" not in tfds.builder_from_directory(folder.replace(folder.split("/")[-2], "fluent")).info.splits
    assert len(emoji.class_names) == 1911 and len(set(emoji.class_names)) == 1911
    assert len(emoji.pictures) == 1595 and 100 < len(held_out) == len(emoji.held_out)
    share = len(names(emoji_config.data.sets[0], "held_out")) / 1911
    assert 0.095 < share < 0.105


def test_a_missing_set_split_or_field_is_named(pairs, tmp_path):
    with pytest.raises(UserError, match="nowhere: expected the folder of a prepared TFDS set, or of pictures; found no such folder"):
        training_batches(config_of(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="found neither a dataset_info.json nor a picture in it"):
        training_batches(config_of(str(tmp_path)))
    with pytest.raises(UserError, match="no split 'training'; the splits are train"):
        training_batches(config_of(pairs, split="training"))
    with pytest.raises(UserError, match="no good sample in 64 .*64 missing field.*record .: no field 'text'; the fields are caption, image, thing"):
        next(training_batches(config_of(pairs, caption=("text",))))


def test_an_empty_set_is_refused(pairs, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(pairs, folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["0"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="split 'train' is empty, expected at least one record"):
        training_batches(config_of(str(folder)))


def test_too_few_examples_for_a_batch_are_refused(pairs):
    config = config_of(pairs)
    config.batch_size = 16
    with pytest.raises(UserError, match="batch_size is 16, but .* has 10 examples"):
        training_batches(config)


def test_a_set_of_another_format_is_refused(pairs, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(pairs, folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="expected ArrayRecord files, found tfrecord"):
        training_batches(config_of(str(folder)))


def test_a_step_is_explained(pairs):
    config = config_of(pairs, template_rate=0.0)
    for step in (1, 4):
        batch = TrainingBatches(config)[step - 1]
        shown = [decode([i for i in row[1:].tolist() if i not in (0, 49407)]).strip() for row in batch["tokens"]]
        rows = [line.split("\t") for line in explain_step(config, str(step)).splitlines()]
        assert [row[:2] for row in rows] == [[str(i), f"{pairs} split train"] for i in range(4)]
        found = Prepared(pairs, "train").read([int(row[2].removeprefix("record ")) for row in rows])
        assert [record["caption"].decode() for record in found] == shown


def test_a_host_makes_its_rows_of_the_same_batch(emoji_config):
    whole = TrainingBatches(emoji_config)[3]
    rows = [1, 2, 5]
    part = TrainingBatches(emoji_config, rows)[3]
    assert (part["tokens"] == whole["tokens"][rows]).all()
    assert (part["image"] == whole["image"][rows]).all()
