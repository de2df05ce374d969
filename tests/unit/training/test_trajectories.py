"""A collection on disk: written whole or not at all, read back as it was, refused by name if it is anything else."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cllm_export.bundle.storage import sha256_of, unfinished_files
from cllm_export.errors import OutputError, TrajectoryError
from cllm_export.training.collection.collection import (
    MANIFEST_NAME,
    CollectionManifest,
    CollectionSettings,
    Dropped,
    Trajectory,
    merge_dropped,
    read_manifest,
    write_manifest,
)
from cllm_export.training.collection.shards import SCHEMA, write_shard
from cllm_export.training.collection.trajectories import read_trajectories
from cllm_export.training.data.samples import Sample

SETTINGS = CollectionSettings(
    model_fingerprint="a" * 64,
    bundle_fingerprint=None,
    tokenizer_sha256="b" * 64,
    prompts_sha256="c" * 64,
    num_prompts=4,
    engine="torch",
    device="cpu",
    loop="sliding",
    proposer="pad",
    block_size=2,
    seed=0,
    max_new_tokens=None,
    max_length=64,
    batch_size=2,
    shard_size=2,
)


def make_row(index: int) -> Trajectory:
    return Trajectory(
        id=f"q{index}",
        index=index,
        prompt_ids=[5, 6],
        new_ids=[7, 8 + index, 1],
        finish_reason="eos",
        write_index=[1, 2],
        block=[[6, 0], [7, 8 + index]],
        next_ids=[[7, 8], [8 + index, 1]],
        num_accepted=[1, 2],
    )


DROPPED = {"repetition": Dropped(count=1, ids=("q3",), detail="prompt q3: its answer has 64 tokens")}


def write_collection(directory, *, complete=True):
    """Shards of two rows and of one, the last prompt dropped."""
    directory.mkdir()
    shards = [
        write_shard(directory, 0, [make_row(0), make_row(1)], {}),
        write_shard(directory, 1, [make_row(2)], DROPPED),
    ]
    shards = shards if complete else shards[:1]
    manifest = CollectionManifest(settings=SETTINGS, shards=tuple(shards), summary={"samples": 3} if complete else None)
    write_manifest(directory, manifest)
    return directory


@pytest.fixture
def collection(tmp_path):
    return write_collection(tmp_path / "collection")


def edit_manifest(directory, change):
    path = directory / MANIFEST_NAME
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_what_was_written_is_read_back(collection):
    found = read_trajectories(collection)
    assert list(found.rows()) == [make_row(index) for index in range(3)]
    assert len(found) == 3
    assert found.manifest.settings == SETTINGS
    assert found.dropped == DROPPED


def test_samples_are_prompt_and_fixed_point_with_the_states_if_wanted(collection):
    [first, *_] = read_trajectories(collection).samples()
    assert first == Sample(id="q0", tokens=(5, 6, 7, 8, 1), num_prompt=2)
    [first, *_] = read_trajectories(collection).samples(with_states=True)
    assert first.states == ((1, (6, 0)), (2, (7, 8)))


def test_equal_rows_give_equal_bytes(tmp_path):
    one, two = write_collection(tmp_path / "one"), write_collection(tmp_path / "two")
    for name in ("shard-00000.parquet", "shard-00001.parquet", MANIFEST_NAME):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_a_shard_may_be_empty(tmp_path):
    directory = tmp_path / "collection"
    directory.mkdir()
    shards = tuple(write_shard(directory, number, [], {}) for number in range(2))
    write_manifest(directory, CollectionManifest(settings=SETTINGS, shards=shards, summary={}))
    assert list(read_trajectories(directory).rows()) == []


def test_reasons_add_up_with_the_ids_of_the_first_few():
    parts = [
        {"too long": Dropped(count=3, ids=(f"{number}a", f"{number}b"), detail=f"of {number}")} for number in range(4)
    ]
    [(reason, entry)] = merge_dropped(parts).items()
    assert (reason, entry.count, entry.detail) == ("too long", 12, "of 0")
    assert entry.ids == ("0a", "0b", "1a", "1b", "2a")


@pytest.mark.parametrize(
    ("model", "tokenizer", "phrase"),
    [
        ("f" * 64, "b" * 64, "another model"),
        ("a" * 64, "f" * 64, "another tokenizer"),
        ("f" * 64, "f" * 64, "tokenizer"),
    ],
)
def test_trajectories_of_another_model_or_tokenizer_are_refused_with_both(collection, model, tokenizer, phrase):
    found = read_trajectories(collection)
    found.require_same_model("a" * 64, "b" * 64)
    with pytest.raises(TrajectoryError, match=phrase) as error:
        found.require_same_model(model, tokenizer)
    assert "ffffffffffff" in str(error.value)
    assert "cllm-export collect" in str(error.value)


def test_a_directory_without_a_manifest_is_refused_with_the_command(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        assert read_manifest(directory) is None
        with pytest.raises(TrajectoryError, match=r"no trajectories\.json; make one with: cllm-export collect"):
            read_trajectories(directory)


def test_a_collection_that_is_not_complete_is_refused_with_what_is_there(tmp_path):
    directory = write_collection(tmp_path / "collection", complete=False)
    with pytest.raises(TrajectoryError, match="1 of 2 shards; run the same"):
        read_trajectories(directory)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda raw: raw.update(schema_version=2), "schema version 2, this cllm-export reads 1"),
        (lambda raw: raw.pop("schema_version"), "schema version None"),
        (lambda raw: raw.pop("settings"), "damaged"),
        (lambda raw: raw["settings"].pop("seed"), "damaged"),
        (lambda raw: raw["settings"].update(colour="red"), "unknown key 'colour'"),
        (lambda raw: raw["settings"].update(shard_size=0), "damaged"),
        (lambda raw: raw["settings"].update(num_prompts="four"), "damaged"),
        (lambda raw: raw["shards"].append(raw["shards"][0]), "3 shards are listed, 2 are expected"),
        (lambda raw: raw["shards"].pop(), "1 shards are listed, 2 are expected"),
        (lambda raw: raw["shards"][0].update(file="../shard.parquet"), "not a plain name"),
        (lambda raw: raw["shards"][0].update(dropped=[]), "damaged"),
        (lambda raw: raw.update(shards=None), "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(collection, change, phrase):
    edit_manifest(collection, change)
    with pytest.raises(TrajectoryError, match=phrase):
        read_trajectories(collection)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(collection, content):
    (collection / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(TrajectoryError, match=MANIFEST_NAME):
        read_trajectories(collection)


def test_a_shard_that_is_missing_or_differs_is_named(collection):
    shard = collection / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(TrajectoryError, match=r"shard-00001\.parquet is corrupted"):
        read_trajectories(collection)
    shard.unlink()
    with pytest.raises(TrajectoryError, match=r"shard-00001\.parquet cannot be read"):
        read_trajectories(collection)


@pytest.mark.parametrize("kind", ["no Parquet", "other columns", "other types"])
def test_a_shard_whose_sum_is_right_but_whose_content_is_not_is_refused(collection, kind):
    shard = collection / "shard-00000.parquet"
    if kind == "no Parquet":
        shard.write_bytes(b"PAR1 but not really")
    elif kind == "other columns":
        pq.write_table(pa.table({"id": ["q0"]}), shard)
    else:
        pq.write_table(pa.table({name: pa.array([], pa.float64()) for name in SCHEMA.names}), shard)
    edit_manifest(collection, lambda raw: raw["shards"][0].update(sha256=sha256_of(shard)))
    with pytest.raises(TrajectoryError, match=r"shard-00000\.parquet"):
        list(read_trajectories(collection).rows())


def test_what_a_killed_run_was_writing_is_told_from_the_rest(collection):
    left = collection / ".shard-00002.parquet.unfinished"
    left.write_bytes(b"half")
    assert unfinished_files(collection) == [left]
    read_trajectories(collection)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    directory = tmp_path / "collection"
    directory.mkdir()
    (directory / MANIFEST_NAME).mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_manifest(directory, CollectionManifest(settings=SETTINGS))
    assert unfinished_files(directory) == []


def test_settings_say_how_many_shards_there_will_be():
    assert [replace(SETTINGS, num_prompts=count).num_shards for count in (1, 2, 3, 4)] == [1, 1, 2, 2]
