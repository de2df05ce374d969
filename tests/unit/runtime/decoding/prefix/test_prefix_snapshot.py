"""Snapshots of prompts: what was written is read, and whatever else lies there is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cllm_export.errors import OutputError, SnapshotError
from cllm_export.runtime.decoding.prefix.prefix_snapshot import Expected, Snapshot, read_snapshot, write_snapshot

FINGERPRINT = "ab" * 32
TOKENS = (3, 1, 4, 1, 5)
ROWS = np.random.default_rng(0).normal(size=(4, 2, 5, 8)).astype(np.float32)
SNAPSHOT = Snapshot(fingerprint=FINGERPRINT, tokens=TOKENS, rows=ROWS)
EXPECTED = Expected(fingerprint=FINGERPRINT, vocab_size=6, max_tokens=5, rows=ROWS[:, :, :0])


@pytest.fixture
def path(tmp_path):
    write_snapshot(tmp_path / "prefix", SNAPSHOT)
    return tmp_path / "prefix"


def edit_header(path, edit):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16, np.int64])
def test_what_was_written_is_read_bit_for_bit(tmp_path, dtype):
    rows = (ROWS * 100).astype(dtype)
    write_snapshot(tmp_path / "prefix", replace(SNAPSHOT, rows=rows))
    found = read_snapshot(tmp_path / "prefix", replace(EXPECTED, rows=rows[:, :, :0]))
    assert (found.fingerprint, found.tokens) == (FINGERPRINT, TOKENS)
    assert found.rows.dtype == dtype
    assert np.array_equal(found.rows, rows)


def test_any_reader_of_safetensors_opens_it(path):
    tensors = load_file(path)
    assert tensors["tokens"].tolist() == list(TOKENS)
    assert np.array_equal(tensors["rows"], ROWS)


def test_an_older_snapshot_is_replaced_and_nothing_else_is_left(path):
    rows = ROWS + 1
    write_snapshot(path, replace(SNAPSHOT, rows=rows))
    assert np.array_equal(read_snapshot(path, EXPECTED).rows, rows)
    assert [entry.name for entry in path.parent.iterdir()] == ["prefix"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "cd" * 32}, "was made with the bundle abababababab, this one is cdcdcdcdcdcd"),
        ({"vocab_size": 5}, "holds token 5; the model's are 0 to 4"),
        ({"max_tokens": 4}, "holds 5 tokens, this model takes 4 at most"),
        ({"rows": ROWS[:2, :, :0]}, "other rows than this engine has"),
        ({"rows": ROWS[:, :, :0].astype(np.float16)}, "other rows than this engine has"),
    ],
    ids=["bundle", "vocabulary", "length", "shape", "dtype"],
)
def test_a_snapshot_of_another_model_is_refused(path, changes, message):
    with pytest.raises(SnapshotError, match=message):
        read_snapshot(path, replace(EXPECTED, **changes))


def test_a_token_below_zero_is_refused(tmp_path):
    write_snapshot(tmp_path / "prefix", replace(SNAPSHOT, tokens=(3, -1, 4, 1, 5)))
    with pytest.raises(SnapshotError, match="holds token -1"):
        read_snapshot(tmp_path / "prefix", EXPECTED)


def test_another_version_is_refused(path):
    edit_header(path, lambda header: header["__metadata__"].update(version="2"))
    with pytest.raises(SnapshotError, match="of version 2, this cllm-export reads 1"):
        read_snapshot(path, EXPECTED)


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header.pop("rows"),
        lambda header: header.update(extra=header["rows"]),
        lambda header: header["rows"].update(data_offsets=[0, 1280]),
        lambda header: header["rows"].update(dtype="F64"),
        lambda header: header["rows"].update(shape=[4, 2, 5, 9]),
        lambda header: header["tokens"].update(shape=[4]),
        lambda header: header["tokens"].update(shape=[0]),
        lambda header: header["tokens"].update(shape=["5"]),
        lambda header: header["tokens"].update(shape=5),
        lambda header: header.update(tokens=None),
        lambda header: header.pop("tokens"),
    ],
)
def test_a_header_that_contradicts_its_data_is_refused(path, edit):
    edit_header(path, edit)
    with pytest.raises(SnapshotError, match="is damaged"):
        read_snapshot(path, EXPECTED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": None}, "other rows than"),
        ({"extra": ROWS}, "other rows than"),
        ({"rows": ROWS.astype(np.float64)}, "other rows than"),
        ({"rows": ROWS[:, :, :, :7]}, "other rows than"),
        ({"rows": ROWS[:, :, :4]}, "other rows than"),
        ({"tokens": np.array(TOKENS[:4])}, "other rows than"),
        ({"tokens": np.array(TOKENS, np.int32)}, "other rows than"),
        ({"tokens": None}, "gives no number of tokens"),
        ({"tokens": np.zeros(0, np.int64)}, "gives no number of tokens"),
        ({"tokens": np.array([TOKENS])}, "gives no number of tokens"),
    ],
)
def test_a_sound_file_of_other_tensors_is_refused(path, changes, message):
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    tensors = {"tokens": np.array(TOKENS), "rows": ROWS, **changes}
    kept = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata)
    with pytest.raises(SnapshotError, match=message):
        read_snapshot(path, EXPECTED)


def test_a_damaged_snapshot_may_be_written_anew(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match="is damaged"):
        read_snapshot(path, EXPECTED)
    write_snapshot(path, SNAPSHOT)
    assert np.array_equal(read_snapshot(path, EXPECTED).rows, ROWS)


def test_rows_that_lie_apart_in_memory_are_written_in_order(tmp_path):
    """Of the array's own order: the library would write the memory that it lies in."""
    rows = ROWS.transpose(1, 0, 2, 3).copy().transpose(1, 0, 2, 3)
    write_snapshot(tmp_path / "prefix", replace(SNAPSHOT, rows=rows))
    assert np.array_equal(read_snapshot(tmp_path / "prefix", EXPECTED).rows, ROWS)


def test_every_cut_and_every_added_byte_is_refused(path):
    data = path.read_bytes()
    for length in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(SnapshotError):
            read_snapshot(path, EXPECTED)
    path.write_bytes(data + b"\0")
    with pytest.raises(SnapshotError, match=r"is damaged: .*file not fully covered; copy it again"):
        read_snapshot(path, EXPECTED)


def test_every_changed_byte_of_data_is_refused(path):
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for index in range(start, len(data), 11):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        with pytest.raises(SnapshotError, match="the sha256 of its data is"):
            read_snapshot(path, EXPECTED)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a text",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        (60_000).to_bytes(8, "little") + b"[" * 60_000,
        (20).to_bytes(8, "little") + b'{"__metadata__": {}}',
    ],
)
def test_what_is_no_snapshot_is_neither_read_nor_replaced(tmp_path, data):
    path = tmp_path / "prefix"
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match="is no snapshot of a prompt"):
        read_snapshot(path, EXPECTED)
    with pytest.raises(OutputError, match="exists and is no snapshot"):
        write_snapshot(path, SNAPSHOT)
    assert path.read_bytes() == data


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path, tmp_path / "none" / "none"):
        with pytest.raises(SnapshotError, match="there is no such file"):
            read_snapshot(path, EXPECTED)
    with pytest.raises(OutputError, match="exists and is no snapshot"):
        write_snapshot(tmp_path, SNAPSHOT)
    with pytest.raises(OutputError, match="cannot write"):
        write_snapshot(tmp_path / "none" / "prefix", SNAPSHOT)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cllm_export.bundle.storage.os.fsync", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        write_snapshot(path, replace(SNAPSHOT, rows=ROWS + 1))
    assert np.array_equal(read_snapshot(path, EXPECTED).rows, ROWS)
    assert [entry.name for entry in path.parent.iterdir()] == ["prefix"]


def test_rows_of_another_number_of_tokens_are_no_snapshot():
    with pytest.raises(SnapshotError, match="4 tokens cannot have rows of shape"):
        replace(SNAPSHOT, tokens=(1, 2, 3, 4))
