"""A GGUF file that cannot be imported is refused by name, in one sentence, and nothing is written."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFEndian

from cllm_export.errors import CheckpointError, CllmExportError, OutputError, UnsupportedError
from cllm_export.exporter.gguf.architectures import check_gguf
from cllm_export.exporter.gguf.convert import import_gguf
from cllm_export.exporter.gguf.header import GgufFile, read_gguf
from cllm_export.exporter.gguf.options import ImportOptions
from cllm_export.progress import Voice
from tests.checkpoints import LONGROPE, Variant
from tests.conftest import Workshop
from tests.unit.exporter.gguf.made import write_gguf

TOKENS, PRE = "tokenizer__ggml__tokens", "tokenizer__ggml__pre"


@pytest.fixture(scope="module")
def checkpoint(workshop: Workshop) -> Path:
    return workshop.checkpoint("small")


@pytest.fixture(scope="module")
def good(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("good") / "good.gguf", checkpoint)


def refused(path: Path, *, kind: type[CheckpointError] = CheckpointError) -> str:
    """The message with which an import is refused. Nothing is left, not even a scratch directory."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(kind) as caught:
        import_gguf(path, path.with_name("out"))
    assert sorted(path.parent.iterdir()) == before
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert ("; " in message) or (": " in message), "it says what to do next"
    return message


def changed(tmp_path: Path, good: Path, at: int, data: bytes) -> Path:
    raw = bytearray(good.read_bytes())
    raw[at : at + len(data)] = data
    path = tmp_path / "changed.gguf"
    path.write_bytes(raw)
    return path


def raw_gguf(
    path: Path, *, fields: bytes = b"", num_fields: int = 0, entries: bytes = b"", num_tensors: int = 0
) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + fields + entries + bytes(64))
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_the_good_file_is_taken(good: Path, tmp_path: Path):
    assert import_gguf(good, tmp_path / "out").num_bytes > 0


def test_a_file_that_is_missing_or_a_directory(tmp_path: Path):
    assert "does not exist" in refused(tmp_path / "absent.gguf")
    (tmp_path / "directory.gguf").mkdir()
    assert "is a directory" in refused(tmp_path / "directory.gguf")


@pytest.mark.parametrize("start", [b"", b"GGU", b"ggjt" + bytes(100), b"PK\3\4" + bytes(100), b"\x80\x02" + bytes(100)])
def test_another_kind_of_file(tmp_path: Path, start: bytes):
    path = tmp_path / "other.gguf"
    path.write_bytes(start)
    assert "is not a GGUF file" in refused(path)


def test_the_other_byte_order(checkpoint: Path, tmp_path: Path):
    path = write_gguf(tmp_path / "big.gguf", checkpoint, endian=GGUFEndian.BIG)
    assert "other byte order" in refused(path, kind=UnsupportedError)


@pytest.mark.parametrize("version", [0, 1, 4, 2**31])
def test_another_version(good: Path, tmp_path: Path, version: int):
    path = changed(tmp_path, good, 4, struct.pack("<I", version))
    assert f"version {version}" in refused(path, kind=UnsupportedError)


@pytest.mark.parametrize("at", [8, 16])
@pytest.mark.parametrize("count", [10**6, 2**40, 2**64 - 1])
def test_absurd_counts(good: Path, tmp_path: Path, at: int, count: int):
    assert f"claims {count}" in refused(changed(tmp_path, good, at, struct.pack("<Q", count)))


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_cut_file(good: Path, tmp_path: Path, share: float):
    path = tmp_path / "cut.gguf"
    path.write_bytes(good.read_bytes()[: max(8, int(good.stat().st_size * share))])
    assert "cut" in refused(path)


def test_a_file_that_lacks_its_last_byte(good: Path, tmp_path: Path):
    """Of the last tensor; what pads it may be missing."""
    last = max(read_gguf(good).tensors.values(), key=lambda tensor: tensor.offset)
    path = tmp_path / "cut.gguf"
    path.write_bytes(good.read_bytes()[: last.offset + last.length - 1])
    assert f"its tensor {last.name!r} ends at byte" in refused(path)


def test_absurd_lengths_in_the_header(tmp_path: Path):
    path = tmp_path / "raw.gguf"
    for fields in (
        struct.pack("<Q", 2**63),
        text("a") + struct.pack("<IQ", 8, 2**60),
        text("a") + struct.pack("<IIQ", 9, 4, 2**60),
        text("a") + struct.pack("<IIQ", 9, 8, 2**60),
    ):
        message = refused(raw_gguf(path, fields=fields, num_fields=1))
        assert "cut" in message or "claims" in message


def test_unknown_kinds_of_metadata(tmp_path: Path):
    path = tmp_path / "raw.gguf"
    for fields in (text("a") + struct.pack("<I", 13), text("a") + struct.pack("<IIQ", 9, 9, 1)):
        assert "unknown type" in refused(raw_gguf(path, fields=fields, num_fields=1))


def test_names_that_are_no_text(tmp_path: Path):
    bad = struct.pack("<Q", 2) + b"\xff\xfe"
    assert "not UTF-8" in refused(raw_gguf(tmp_path / "raw.gguf", fields=bad + bytes(16), num_fields=1))
    assert "not UTF-8" in refused(raw_gguf(tmp_path / "raw.gguf", entries=bad + bytes(16), num_tensors=1))


def test_a_name_that_comes_twice(tmp_path: Path):
    path = tmp_path / "raw.gguf"
    field = text("a") + struct.pack("<II", 4, 1)
    assert "metadata field 'a' twice" in refused(raw_gguf(path, fields=field * 2, num_fields=2))
    assert "tensor 'b' twice" in refused(raw_gguf(path, entries=entry("b", (4,)) * 2, num_tensors=2))


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1), (0,), (2**40, 2**40), (2**63,)])
def test_absurd_shapes(tmp_path: Path, shape: tuple[int, ...]):
    assert "its tensor 'b' has" in refused(
        raw_gguf(tmp_path / "raw.gguf", entries=entry("b", shape) + bytes(64), num_tensors=1)
    )


def test_a_tensor_behind_the_end_or_in_another(tmp_path: Path):
    path = tmp_path / "raw.gguf"
    assert "its tensor 'b' ends" in refused(raw_gguf(path, entries=entry("b", (4,), offset=2**40), num_tensors=1))
    both = entry("b", (4,)) + entry("c", (4,), offset=8)
    assert "tensors 'b' and 'c' overlap" in refused(raw_gguf(path, entries=both, num_tensors=2))


@pytest.mark.parametrize(
    ("kind", "name"), [(4, "type 4"), (27, "type I64"), (28, "type F64"), (999, "unknown type 999")]
)
def test_a_type_that_cannot_be_read(tmp_path: Path, kind: int, name: str):
    path = raw_gguf(tmp_path / "raw.gguf", entries=entry("b", (4,), kind), num_tensors=1)
    message = refused(path, kind=UnsupportedError)
    assert name in message
    assert "Q4_K" in message


def test_a_row_that_is_no_whole_number_of_blocks(tmp_path: Path):
    path = raw_gguf(tmp_path / "raw.gguf", entries=entry("b", (31,), 8), num_tensors=1)
    assert "rows of 31 values, and Q8_0 has blocks of 32" in refused(path)


def test_an_alignment_that_is_no_power_of_two(checkpoint: Path, tmp_path: Path):
    field = text("general.alignment") + struct.pack("<II", 4, 24)
    assert "alignment is 24" in refused(raw_gguf(tmp_path / "raw.gguf", fields=field, num_fields=1))


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("granite", "build its Hugging Face checkpoint"),
        ("olmo2", "build its Hugging Face checkpoint"),
        ("gemma", "build its Hugging Face checkpoint"),
        ("bert", "the graph cannot express it"),
        ("mamba", "the graph cannot express it"),
        ("no-such-thing", "the graph cannot express it"),
        ("qwen2moe", "mixture of several experts"),
    ],
)
def test_another_architecture(good: Path, architecture: str, says: str):
    """It is named, beside those that are imported."""
    file = read_gguf(good)
    other = GgufFile(path=good, metadata=file.metadata | {"general.architecture": architecture}, tensors=file.tensors)
    with pytest.raises(UnsupportedError) as caught:
        check_gguf(other)
    assert repr(architecture) in str(caught.value)
    assert says in str(caught.value)


WRONG_FIELDS: dict[str, tuple[dict[str, object], str]] = {
    "experts": ({"llama__expert_count": 8}, "mixture of 8 experts"),
    "layers": ({"llama__block_count": 2}, "block_count is 2"),
    "absurd layers": ({"llama__block_count": 2**30}, "block_count is"),
    "no layers": ({"llama__block_count": 0}, "llama.block_count is 0"),
    "no heads": ({"llama__attention__head_count": 0}, "head_count is 0"),
    "heads by layer": ({"llama__attention__head_count_kv": [2, 1]}, "for each layer"),
    "text for a number": ({"llama__embedding_length": "wide"}, "embedding_length is 'wide'"),
    "fraction": ({"llama__context_length": 1.5}, "context_length is 1.5"),
    "not a number": ({"llama__rope__freq_base": float("nan")}, "freq_base is nan"),
    "another width": ({"llama__embedding_length": 128}, "has the shape"),
    "another inner width": ({"llama__feed_forward_length": 2**30}, "has the shape"),
    "more heads": ({"llama__attention__head_count_kv": 4}, "has the shape"),
    "value length": ({"llama__attention__key_length": 16, "llama__attention__value_length": 8}, "values of 8"),
    "rope type": ({"llama__rope__scaling__type": "unheard"}, "rope scaling of type 'unheard'"),
    "window": ({"llama__attention__sliding_window": 16}, "sliding window of 16 tokens"),
    "attention scale": ({"llama__attention__scale": 0.5}, "llama.attention.scale is 0.5"),
    "logit scale": ({"llama__logit_scale": 0.5}, "llama.logit_scale is 0.5"),
    "encoder": ({"llama__attention__causal": False}, "llama.attention.causal is False"),
    "part of a split file": ({"split__count": 3}, "one of 3 parts"),
    "adapter": ({"general__type": "adapter"}, "of type 'adapter'"),
    "tokenizer of another kind": ({"tokenizer__ggml__model": "bert"}, "tokenizer of kind 'bert'"),
    "split of text": ({PRE: "unheard-of"}, "splits text as 'unheard-of'"),
    "tokens that are numbers": ({TOKENS: [1, 2, 3]}, "tokens are no texts"),
    "fewer tokens": ({TOKENS: ["a", "b"], "tokenizer__ggml__token_type": [1, 1]}, "outside its vocabulary of 2"),
    "types of tokens": ({"tokenizer__ggml__token_type": [1]}, "token_type does not fit"),
    "end of sequence": ({"tokenizer__ggml__eos_token_id": 10**6}, "eos_token_id is 1000000"),
    "chat template": ({"tokenizer__chat_template": 5}, "chat_template is 5"),
    "space before a text": ({"tokenizer__ggml__add_space_prefix": 2}, "add_space_prefix is 2"),
    "odd rotation": ({"llama__rope__dimension_count": 15}, "rotates 15 of"),
    "flag": ({"tokenizer__ggml__add_bos_token": 2}, "add_bos_token is 2"),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_wrong_metadata_is_named(checkpoint: Path, tmp_path: Path, case: str):
    fields, says = WRONG_FIELDS[case]
    assert says in refused(write_gguf(tmp_path / "wrong.gguf", checkpoint, **fields))


def test_a_token_that_is_there_twice(checkpoint: Path, good: Path, tmp_path: Path):
    tokens = read_gguf(good).metadata["tokenizer.ggml.tokens"]
    twice = [*tokens[:-1], tokens[9]]
    assert f"the token {tokens[9]!r} 2 times" in refused(write_gguf(tmp_path / "a.gguf", checkpoint, **{TOKENS: twice}))


def test_more_tokens_than_rows(checkpoint: Path, good: Path, tmp_path: Path):
    metadata = read_gguf(good).metadata
    fields = {
        TOKENS: [*metadata["tokenizer.ggml.tokens"], "one more"],
        "tokenizer__ggml__token_type": [*metadata["tokenizer.ggml.token_type"], 1],
        "llama__vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }
    assert "token_embd.weight has" in refused(write_gguf(tmp_path / "a.gguf", checkpoint, **fields))


def test_a_panic_of_tokenizers_is_refused(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is no Exception, so a plain handler lets it through. To stop the program is no panic."""

    class PanicException(BaseException):
        pass

    path = tmp_path / "model.gguf"
    path.write_bytes(good.read_bytes())

    def convert(kind: type[BaseException]) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise kind("no such entry")

        return fail

    monkeypatch.setattr("cllm_export.exporter.gguf.tokenizer._converted", convert(PanicException))
    assert "PanicException: no such entry" in refused(path)
    monkeypatch.setattr("cllm_export.exporter.gguf.tokenizer._converted", convert(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        import_gguf(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("original", [0, 1])
def test_a_length_from_which_nothing_scales(workshop: Workshop, tmp_path: Path, original: int):
    source = workshop.new_checkpoint(
        "gguf-no-length", Variant(family="phi3", rope=LONGROPE, config={"original_max_position_embeddings": 64})
    )
    field = {"phi3__rope__scaling__original_context_length": original}
    path = write_gguf(tmp_path / "a.gguf", source, **field)
    assert f"original context of {original} tokens" in refused(path, kind=UnsupportedError)


MISSING = {
    "general.architecture": "no general.architecture",
    "llama.block_count": "no llama.block_count",
    "llama.context_length": "no llama.context_length",
    "llama.attention.head_count": "no llama.attention.head_count",
    "tokenizer.ggml.tokens": "no tokenizer (tokenizer.ggml.tokens is missing)",
    "tokenizer.ggml.model": "no tokenizer (tokenizer.ggml.model is missing)",
    "tokenizer.ggml.eos_token_id": "no token that ends a text",
    "tokenizer.ggml.merges": "without tokenizer.ggml.merges",
    "token_embd.weight": "no tensor 'token_embd.weight'",
    "blk.0.attn_q.weight": "no tensor 'blk.0.attn_q.weight'",
    "output_norm.weight": "no tensor 'output_norm.weight'",
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(checkpoint: Path, tmp_path: Path, name: str):
    path = write_gguf(tmp_path / "missing.gguf", checkpoint, drop=[name])
    if name == "general.architecture":
        raw = path.read_bytes().replace(b"general.architecture", b"general.arkhitecture")
        path.write_bytes(raw)
    assert MISSING[name] in refused(path)


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.0.attn_sinks.weight", "v.patch_embd.weight"])
def test_a_tensor_without_a_place_is_named(checkpoint: Path, tmp_path: Path, name: str):
    """Left out, it would give another model without a word."""
    path = write_gguf(tmp_path / "more.gguf", checkpoint, tensors={name: np.ones(16, np.float32)})
    assert repr(name) in refused(path, kind=UnsupportedError)


def test_factors_of_rope_that_no_scaling_gives(checkpoint: Path, tmp_path: Path):
    factors = np.array([1, 2, 1, 2, 1, 2, 1, 2], np.float32)
    path = write_gguf(tmp_path / "rope.gguf", checkpoint, tensors={"rope_freqs.weight": factors})
    assert "that no llama3 scaling gives" in refused(path, kind=UnsupportedError)
    fields = {"llama__rope__scaling__factor": 2.0}
    path = write_gguf(tmp_path / "twice.gguf", checkpoint, tensors={"rope_freqs.weight": factors}, **fields)
    assert "scales rope twice" in refused(path, kind=UnsupportedError)


def test_a_checksum_of_another_version(good: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"{good} has the sha256 [0-9a-f]{{64}}, and not {'0' * 64}"):
        import_gguf(good, tmp_path / "out", ImportOptions(sha256="0" * 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(150))
def test_a_flipped_byte_never_gives_another_error(good: Path, tmp_path: Path, seed: int):
    """It is refused by name, or it is one of those that no reader can notice."""
    random = np.random.default_rng(seed)
    raw = bytearray(good.read_bytes())
    header = min(tensor.offset for tensor in read_gguf(good).tensors.values())
    for place in random.integers(4, header, random.integers(1, 4)):
        raw[place] = random.choice([0, 1, 0x7F, 0x80, 0xFF, int(random.integers(256))])
    path = tmp_path / "flipped.gguf"
    path.write_bytes(raw)
    try:
        check_gguf(read_gguf(path))
    except CllmExportError as error:
        assert str(path) in str(error)


def test_a_full_disk_is_refused_before(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"total": 10**9, "free": 1000})
    monkeypatch.setattr("cllm_export.exporter.weights.weights.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"the disk is full: .* free space, or choose another output$"):
        import_gguf(good, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(good: Path, tmp_path: Path):
    def fill(stage: str, done: int, total: int, note: str = "", /) -> None:
        if stage == "weights" and done > total / 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"the disk is full while writing .*; free space"):
        import_gguf(good, tmp_path / "out", voice=Voice(progress=fill))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_meanwhile_is_refused(good: Path, tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(good.read_bytes())

    def grow(stage: str, done: int, total: int, note: str = "", /) -> None:
        if stage == "tokenizer":
            path.write_bytes(good.read_bytes() + b"more")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        import_gguf(path, tmp_path / "out", voice=Voice(progress=grow))
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_import_is_never_replaced(good: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds no import\.json"):
        import_gguf(good, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
