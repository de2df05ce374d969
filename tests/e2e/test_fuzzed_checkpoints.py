"""Whatever stands in a safetensors header or an index: a checkpoint is read exactly, or refused by name.

Real checkpoints, of one file or of shards, are damaged in one to three ways at random. What opens is compared with
what this file's own, strict reader finds in the bytes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm_export.bundle.manifest import open_bundle
from cllm_export.errors import CheckpointError
from cllm_export.exporter.checkpoint.files import SINGLE_WEIGHTS, WEIGHTS_INDEX
from cllm_export.exporter.checkpoint.read import EMBEDDING, HEAD, open_checkpoint
from cllm_export.exporter.graph.trace import check_tensors
from cllm_export.exporter.pipeline import build
from tests.checkpoints import Variant
from tests.conftest import Workshop
from tests.e2e.conftest import snapshot

DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
DTYPE_BYTES |= {"U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
DTYPES = (*DTYPE_BYTES, "F4", "F6_E2M3", "I4", "f32", "", "Q4_K")
HARMLESS = ("model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "h.0.attn.bias", HEAD)
SIZES = (-(2**63), -1, 0, 1, 7, 2**31, 2**60, 2**63, 2**64, 10**30)
ROOM = 2**30
"""Bytes that reading a checkpoint of 200 kB may take at most, while a header may claim 2**60."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
sizes = st.sampled_from(SIZES) | st.integers(0, 200_000)
tensor_names = st.sampled_from((*HARMLESS, "model.layers.7.mlp.up_proj.weight", "", "../x", "a\0b")) | st.text(
    max_size=9
)
shard_names = st.one_of(
    st.sampled_from((SINGLE_WEIGHTS, "../outside.safetensors", "/etc/passwd", "", ".", "..", "a/b", "a\0b", "\ud800")),
    st.sampled_from(("x" * 300, "é" * 200, "model-00009-of-00002.safetensors", "\x1b[31m", "config.json")),
    json_values,
)


@dataclass
class Files:
    """A checkpoint in memory, and where each link in it leads."""

    content: dict[str, bytes]
    links: dict[str, str] = field(default_factory=dict)
    in_cache: bool = False
    """Laid out as a Hugging Face cache."""

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.content if name.endswith(".safetensors"))

    def write(self, directory: Path) -> Path:
        """Below the directory, which also holds a sound weights file that is none of the checkpoint's."""
        path = directory / "model" / "snapshots" / "main"
        path.mkdir(parents=True)
        blobs = directory / "model" / "blobs"
        blobs.mkdir()
        for number, (name, content) in enumerate(sorted(self.content.items())):
            if self.in_cache:
                (blobs / f"{number:064x}").write_bytes(content)
                (path / name).symlink_to(f"../../blobs/{number:064x}")
            else:
                (path / name).write_bytes(content)
            if name == self.shards[0]:
                shutil.copy(path / name, path.parent / "outside.safetensors")
        for name, target in self.links.items():
            (path / name).unlink(missing_ok=True)
            (path / name).symlink_to(target)
        return path


def parse(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def compose(header: str | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def repack(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A sound file of these tensors."""
    header, data = {}, b""
    for name, (dtype, shape, part) in tensors.items():
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += part
    return compose(json.dumps(header), data)


def unpack(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    header, data = parse(content)
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }


Damage = Callable[[Files, st.DataObject], None]
DAMAGES: dict[str, Damage] = {}


def damage(function: Damage) -> Damage:
    DAMAGES[function.__name__.replace("_", " ")] = function
    return function


def on_shard(change: Callable[[bytes, st.DataObject], bytes]) -> None:
    """A damage of one weights file."""

    def apply(files: Files, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(files.shards))
        files.content[name] = change(files.content[name], data)

    damage(apply)
    DAMAGES[change.__name__.replace("_", " ")] = DAMAGES.pop("apply")


def on_entry(change: Callable[[dict[str, Any], st.DataObject], None]) -> None:
    """A damage of one tensor's entry in a header."""

    def apply(content: bytes, data: st.DataObject) -> bytes:
        header, rest = parse(content)
        name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        change(header[name], data)
        return compose(json.dumps(header), rest)

    apply.__name__ = change.__name__
    on_shard(apply)


@on_shard
def cut_short(content: bytes, data: st.DataObject) -> bytes:
    return content[: data.draw(st.integers(0, 2000) | st.integers(0, len(content)))]


@on_shard
def bits_flipped(content: bytes, data: st.DataObject) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, end) | st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        changed[at % len(changed)] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(changed)


@on_shard
def bytes_added(content: bytes, data: st.DataObject) -> bytes:
    at = data.draw(st.integers(0, len(content)))
    return content[:at] + data.draw(st.binary(min_size=1, max_size=16)) + content[at:]


@on_shard
def another_header_length(content: bytes, data: st.DataObject) -> bytes:
    lengths = (0, 1, 99_999_999, 100_000_001, 2**31, 2**60, 2**63, 2**64 - 1)
    return data.draw(st.sampled_from(lengths) | st.integers(0, 5000)).to_bytes(8, "little") + content[8:]


@on_entry
def another_dtype(entry: dict[str, Any], data: st.DataObject) -> None:
    entry["dtype"] = data.draw(st.sampled_from(DTYPES) | json_values)


@on_entry
def another_shape(entry: dict[str, Any], data: st.DataObject) -> None:
    shape = entry["shape"]
    given_in_part = st.builds(lambda size: [size, *shape[1:]], sizes)
    entry["shape"] = data.draw(given_in_part | st.lists(sizes, max_size=4) | st.just(shape[::-1]) | json_values)


@on_entry
def other_offsets(entry: dict[str, Any], data: st.DataObject) -> None:
    begin, end = entry["data_offsets"]
    near = st.integers(-8, 8)
    entry["data_offsets"] = data.draw(
        st.builds(lambda first, second: [begin + first, end + second], near, near)
        | st.lists(sizes, max_size=3)
        | st.just([end, begin])
        | json_values
    )


@on_entry
def empty_but_wide(entry: dict[str, Any], data: st.DataObject) -> None:
    """A tensor of no bytes whose other KV lengths overflow."""
    begin = entry["data_offsets"][0]
    shapes = st.sampled_from(([0, 2**60], [0, 2**63], [0, 2**64 - 1], [0, 2**62, 2**62], [2**40, 0, 2**40]))
    entry["shape"], entry["data_offsets"] = data.draw(shapes), [begin, begin]


@on_entry
def an_unknown_key(entry: dict[str, Any], data: st.DataObject) -> None:
    entry[data.draw(st.text(max_size=5))] = data.draw(json_values)


@on_shard
def entries_that_overlap(content: bytes, data: st.DataObject) -> bytes:
    header, rest = parse(content)
    names = st.sampled_from(sorted(set(header) - {"__metadata__"}))
    header[data.draw(names)]["data_offsets"] = header[data.draw(names)]["data_offsets"]
    return compose(json.dumps(header), rest)


@on_shard
def other_metadata(content: bytes, data: st.DataObject) -> bytes:
    header, rest = parse(content)
    return compose(json.dumps(header | {"__metadata__": data.draw(json_values)}), rest)


@on_shard
def another_header(content: bytes, data: st.DataObject) -> bytes:
    nested = ("[" * 100_000, '{"a":' * 100_000, "[" * 100 + "]" * 100)
    header = data.draw(st.builds(json.dumps, json_values) | st.sampled_from((*nested, "", "{", "\ud800")))
    return compose(header, parse(content)[1])


@on_shard
def a_name_twice(content: bytes, data: st.DataObject) -> bytes:
    header, rest = parse(content)
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    again = header[name] | {"shape": header[name]["shape"][::-1], "dtype": data.draw(st.sampled_from(("F32", "I32")))}
    text = json.dumps(header)
    return compose(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(again)}}}", rest)


@on_shard
def what_the_library_skips(content: bytes, data: st.DataObject) -> bytes:
    """Values of a key that it does not know, which it need not understand, and Python's reader cannot."""
    header, rest = parse(content)
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    skipped = data.draw(st.sampled_from(("[" * 50_000 + "]" * 50_000, "1" * 5000, "1e999", "-0")))
    header[name]["skipped"] = "HERE"
    return compose(json.dumps(header).replace('"HERE"', skipped), rest)


@on_shard
def a_tensor_missing(content: bytes, data: st.DataObject) -> bytes:
    tensors = unpack(content)
    tensors.pop(data.draw(st.sampled_from(sorted(tensors))))
    return repack(tensors)


@on_shard
def a_tensor_more(content: bytes, data: st.DataObject) -> bytes:
    tensors = unpack(content)
    dtype, shape, part = tensors[data.draw(st.sampled_from(sorted(tensors)))]
    other = data.draw(st.sampled_from(("the same", *sorted(DTYPE_BYTES))))
    if other != "the same":
        dtype, shape = other, [len(part) // DTYPE_BYTES[other]]
    tensors[data.draw(tensor_names)] = dtype, shape, part
    return repack({name.encode("utf-8", "replace").decode(): entry for name, entry in tensors.items()})


@on_shard
def a_tensor_renamed(content: bytes, data: st.DataObject) -> bytes:
    tensors = unpack(content)
    entry = tensors.pop(data.draw(st.sampled_from(sorted(tensors))))
    return repack({**tensors, data.draw(tensor_names).encode("utf-8", "replace").decode(): entry})


@on_shard
def tensors_in_another_order(content: bytes, data: st.DataObject) -> bytes:
    """As sound as before."""
    tensors = unpack(content)
    return repack({name: tensors[name] for name in data.draw(st.permutations(sorted(tensors)))})


@on_shard
def one_value_not_finite(content: bytes, data: st.DataObject) -> bytes:
    return content[:-4] + data.draw(st.sampled_from((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f")))


@damage
def a_tied_head(files: Files, data: st.DataObject) -> None:
    """Beside the table, the same or another, in any dtype."""
    for name in files.shards:
        tensors = unpack(files.content[name])
        if EMBEDDING in tensors:
            dtype, shape, part = tensors[EMBEDDING]
            other = data.draw(st.sampled_from(("same", "flipped", *sorted(DTYPE_BYTES))))
            if other in DTYPE_BYTES:
                dtype, shape = other, [shape[0], shape[1] * DTYPE_BYTES[dtype] // DTYPE_BYTES[other]]
                tensors[EMBEDDING] = (dtype, shape, part)
            tensors[HEAD] = (dtype, shape, part[::-1] if other == "flipped" else part)
            files.content[name] = repack(tensors)


@damage
def an_index_entry_changed(files: Files, data: st.DataObject) -> None:
    index = index_of(files)
    index["weight_map"][data.draw(st.sampled_from(sorted(index["weight_map"])))] = data.draw(shard_names)
    files.content[WEIGHTS_INDEX] = json.dumps(index).encode()


@damage
def another_weight_map(files: Files, data: st.DataObject) -> None:
    maps = json_values | st.dictionaries(st.text(max_size=5), shard_names, max_size=3)
    files.content[WEIGHTS_INDEX] = json.dumps({"weight_map": data.draw(maps)}).encode()


@damage
def another_index(files: Files, data: st.DataObject) -> None:
    texts = ("", "[" * 100_000, '{"weight_map":' * 100_000, '{"weight_map": {}}', "1" * 5000, "\ufeff{}")
    files.content[WEIGHTS_INDEX] = data.draw(st.sampled_from(texts) | st.builds(json.dumps, json_values)).encode()


@damage
def index_bits_flipped(files: Files, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(index_of(files)).encode())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    files.content[WEIGHTS_INDEX] = bytes(raw)


@damage
def a_shard_missing(files: Files, data: st.DataObject) -> None:
    if len(files.shards) > 1:
        del files.content[data.draw(st.sampled_from(files.shards))]


@damage
def a_link(files: Files, data: st.DataObject) -> None:
    """Out of the checkpoint, to nothing, to itself, round in a circle, or to a file beside it."""
    name = data.draw(st.sampled_from(sorted(files.content)))
    kind = data.draw(st.sampled_from(("outside", "absolute", "nothing", "itself", "circle", "directory", "beside")))
    outside = "../outside.safetensors"
    target = {"outside": outside, "absolute": "/etc/passwd", "nothing": "../gone", "itself": name, "directory": ".."}
    files.links[name] = target.get(kind, "other")
    if kind == "circle":
        files.links["other"] = name
    if kind == "beside":
        files.content["other"] = files.content[name]


@damage
def a_cache(files: Files, data: st.DataObject) -> None:
    """As sound as before."""
    files.in_cache = True


def index_of(files: Files) -> dict[str, Any]:
    """The index; for a checkpoint of one file, one that names it."""
    try:
        index = json.loads(files.content[WEIGHTS_INDEX])
        if index["weight_map"].keys():
            return index
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    return {"weight_map": {EMBEDDING: files.shards[0]}}


def strictly_read(path: Path, file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """What a weights file holds, with every rule of the format asserted."""
    homes = (path, path.parent.parent / "blobs")
    assert any(home in Path(os.path.realpath(file)).parents for home in homes), f"{file} was read from elsewhere"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert 8 + length <= len(content)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a name twice"
        return dict(pairs)

    header = json.loads(content[8 : 8 + length].decode(), object_pairs_hook=unique)
    data = content[8 + length :]
    metadata = header.pop("__metadata__", None) or {}
    assert all(isinstance(text, str) for text in (*metadata, *metadata.values()))
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        begin, following = entry["data_offsets"]
        assert begin == end, "overlap, or hole"
        size = DTYPE_BYTES[entry["dtype"]]
        for kv_length in entry["shape"]:
            assert type(kv_length) is int and kv_length >= 0
            size *= kv_length
        assert following - begin == size
        end = following
    assert end == len(data)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }


@contextmanager
def little_memory() -> Iterator[None]:
    """An allocation of what a header merely claims fails here, whether or not it would be touched."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@dataclass(frozen=True)
class Sources:
    """Sound checkpoints, the shapes of their tensors, and a place for damaged ones."""

    files: tuple[dict[str, bytes], ...] = field(repr=False)
    shapes: dict[str, list[int]]
    place: Path

    def draw(self, data: st.DataObject, kinds: tuple[str, ...], most: int) -> tuple[Files, list[str]]:
        files = Files(dict(self.files[data.draw(st.integers(0, len(self.files) - 1))]))
        drawn = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most))
        applied = []
        for kind in drawn:
            try:
                DAMAGES[kind](files, data)
            except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError):
                continue  # it was damaged too much before
            applied.append(kind)
        return files, applied


@pytest.fixture(scope="session")
def sources(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of this process cannot be read here")
    sound = (
        workshop.checkpoint("small"),
        workshop.new_checkpoint("small-sharded", Variant(num_layers=1, sharded=True)),
    )
    files = tuple({file.name: file.read_bytes() for file in path.iterdir()} for path in sound)
    shapes = {name: shape for name, (_, shape, _) in unpack(files[0][SINGLE_WEIGHTS]).items()}
    return Sources(files, shapes, tmp_path_factory.mktemp("fuzzed"))


def assert_names_a_file_or_tensor(error: CheckpointError, path: Path, sources: Sources) -> None:
    message = str(error)
    files = {file.name for file in path.iterdir()}.union(*sources.files, (WEIGHTS_INDEX,))
    named = any(name in message for name in (*files, *sources.shapes)) or re.search(r"tensor ['\"]", message)
    assert named, message


def assert_exact_or_refused(path: Path, sources: Sources) -> str:
    """Read all of a checkpoint, in little memory, and compare."""
    before = snapshot(sources.place)
    try:
        with little_memory():
            checkpoint = open_checkpoint(path)
            check_tensors(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
            read = {name: checkpoint.read(name) for name in checkpoint.tensors}
    except CheckpointError as error:
        assert_names_a_file_or_tensor(error, path, sources)
        return "refused"
    finally:
        assert snapshot(sources.place) == before, "a reader wrote something"
    stored: dict[str, tuple[str, list[int], bytes]] = {}
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        stored |= strictly_read(path, file)
    assert stored.keys() == read.keys()
    assert all(stored[name][1] == shape for name, shape in sources.shapes.items())
    assert stored.keys() - sources.shapes.keys() <= set(HARMLESS)
    for name, (dtype, shape, content) in stored.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, list(info.shape), list(read[name].shape)) == (dtype, shape, shape)
        assert read[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == content, name
    return "read"


def fuzz(sources: Sources, num_cases: int) -> tuple[Counter[str], Counter[str]]:
    """How cases ended, and how often each damage was done."""
    outcomes: Counter[str] = Counter()
    done: Counter[str] = Counter()

    @settings(
        max_examples=num_cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        files, applied = sources.draw(data, tuple(DAMAGES), most=3)
        with tempfile.TemporaryDirectory(dir=sources.place) as directory:
            outcomes[assert_exact_or_refused(files.write(Path(os.path.realpath(directory))), sources)] += 1
        done.update(applied)

    run()
    return outcomes, done


def test_a_damaged_checkpoint_is_read_exactly_or_refused_by_name(sources: Sources):
    outcomes, _ = fuzz(sources, 120)
    assert outcomes.keys() == {"read", "refused"}


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints_are_read_exactly_or_refused_by_name(sources: Sources):
    outcomes, done = fuzz(sources, 5000)
    assert sum(outcomes.values()) >= 4000, outcomes
    assert min(outcomes["read"], outcomes["refused"]) >= 100, outcomes
    assert done.keys() == DAMAGES.keys()
    assert min(done.values()) >= 30, done


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_alone_leaves_a_checkpoint_that_is_read_exactly_or_refused_by_name(sources: Sources, kind: str):
    @settings(max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        files, _ = sources.draw(data, (kind,), most=1)
        with tempfile.TemporaryDirectory(dir=sources.place) as directory:
            assert_exact_or_refused(files.write(Path(os.path.realpath(directory))), sources)

    run()


MOSTLY_OPEN = ("bits flipped", "another dtype", "a tensor more", "tensors in another order", "a tied head", "a cache")


@pytest.mark.slow
def test_a_build_of_a_damaged_checkpoint_gives_a_whole_bundle_or_leaves_nothing(sources: Sources):
    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        files, _ = sources.draw(data, MOSTLY_OPEN, most=2)
        with tempfile.TemporaryDirectory(dir=sources.place) as directory:
            path = files.write(Path(os.path.realpath(directory)))
            before = snapshot(sources.place)
            target = Path(directory) / "out" / "bundle"
            target.parent.mkdir()
            try:
                build(path, target)
            except CheckpointError as error:
                assert_names_a_file_or_tensor(error, path, sources)
                assert not any(target.parent.iterdir())
            else:
                open_bundle(target).check_files()
                assert [file.name for file in target.parent.iterdir()] == ["bundle"]
            shutil.rmtree(target.parent)
            assert snapshot(sources.place) == before

    run()
