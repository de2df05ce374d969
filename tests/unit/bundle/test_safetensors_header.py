"""Headers of safetensors files: what the library refuses is refused, and so is what it lets pass."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cllm_export.bundle.safetensors_header import make_header, read_header, read_metadata

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "file", {"format": "x"})
    return tmp_path / "file"


def with_header(path, text, num_bytes):
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(num_bytes))


def test_each_place_holds_its_tensor(path):
    header, data = read_header(path), path.read_bytes()
    assert header.metadata == {"format": "x"}
    for name, tensor in TENSORS.items():
        place = header.places[name]
        assert data[place.offset : place.offset + place.length] == tensor.tobytes()
        assert (place.dtype, place.shape) == ({"a": "F32", "b": "F16"}[name], tensor.shape)
    assert min(place.offset for place in header.places.values()) == header.num_bytes


def test_a_header_that_is_made_is_read_by_the_library(tmp_path):
    header = make_header({"b": ("F16", (4,)), "a": ("F32", (2, 3))}, {"z": "1", "y": "2"})
    (tmp_path / "file").write_bytes(header + TENSORS["b"].tobytes() + TENSORS["a"].tobytes())
    found = load_file(tmp_path / "file")
    assert all(np.array_equal(found[name], TENSORS[name]) for name in TENSORS)
    assert read_header(tmp_path / "file").metadata == {"z": "1", "y": "2"}


def test_a_name_that_stands_twice_is_refused(path):
    """The library reads such a file and takes the last."""
    entry = '"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    with_header(path, f"{{{entry}, {entry}}}", 4)
    assert list(load_file(path)) == ["t"]
    with pytest.raises(ValueError, match="names 't' twice"):
        read_header(path)


def test_a_shape_that_no_tensor_can_have_is_refused(path):
    """Its bytes are right, since another KV length is 0."""
    with_header(path, json.dumps({"t": {"dtype": "F32", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}}), 0)
    with pytest.raises(ValueError, match="gives a tensor the shape"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_a_file_that_was_cut_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="deserializing header"):
        read_header(path)


def test_metadata_is_read_where_the_tensors_were_cut(path):
    path.write_bytes(path.read_bytes()[:-1])
    assert read_metadata(path) == {"format": "x"}


@pytest.mark.parametrize("data", [b"", b"a text", b"\xff" * 64, (9_000).to_bytes(8, "little") + b"[" * 9_000])
def test_what_is_no_header_has_no_metadata(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"header|JSON|Expecting"):
        read_metadata(path)
