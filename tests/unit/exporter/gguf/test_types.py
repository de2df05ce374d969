"""Every type that the package ``gguf`` dequantises is read, bit for bit as transformers reads it."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from safetensors.torch import load_file

from cllm_export.errors import OptionError
from cllm_export.exporter.gguf.convert import import_gguf
from cllm_export.exporter.gguf.header import GgufFile, GgufTensor, read_gguf, readable_types
from cllm_export.exporter.gguf.options import ImportOptions
from cllm_export.exporter.gguf.values import PIECE_BYTES, read_rows, unpermuted
from tests.checkpoints import Variant
from tests.conftest import Workshop
from tests.unit.exporter.gguf.made import permuted, plain, stored_values, write_gguf

torch = pytest.importorskip("torch")

NAMED = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
"""Types of the files that people have."""
TYPES = sorted(found.name for found in readable_types().values())
WIDE = {"hidden_size": 256, "intermediate_size": 256}
"""Rows of a whole number of blocks of every type."""


@pytest.fixture(scope="module")
def checkpoint(workshop: Workshop) -> Path:
    """A model of more than twice as many matrices as there are types, q and k among them."""
    return workshop.new_checkpoint("gguf-types", Variant(num_layers=8, head_dim=64, config=WIDE))


@pytest.fixture(scope="module")
def file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its matrices in every type in turn."""
    turn = itertools.cycle(TYPES)
    target = tmp_path_factory.mktemp("types") / "types.gguf"
    return write_gguf(target, checkpoint, kind_of=lambda name: Kind[next(turn)])


@pytest.fixture(scope="module")
def imported(file: Path) -> dict[str, torch.Tensor]:
    return load_file(import_gguf(file, file.with_name("imported")).path / "model.safetensors")


@pytest.fixture(scope="module")
def of_transformers(file: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()


def names_of(file: Path, kind: str) -> list[str]:
    return [name for name, tensor in read_gguf(file).tensors.items() if tensor.type_name == kind]


def test_the_types_that_people_have_are_among_them():
    assert set(NAMED) <= set(TYPES)


def test_every_type_is_in_the_file(file: Path):
    for kind in TYPES:
        assert names_of(file, kind), kind


def test_every_weight_is_that_of_transformers(
    imported: dict[str, torch.Tensor], of_transformers: dict[str, torch.Tensor]
):
    assert imported.keys() == of_transformers.keys() - {"lm_head.weight"}
    for name, values in imported.items():
        assert values.dtype == torch.float32
        assert torch.equal(values, of_transformers[name]), name


@pytest.mark.parametrize("kind", TYPES)
def test_a_tensor_has_the_values_that_gguf_dequantises(tmp_path: Path, kind: str):
    """In pieces of any size, and in any order of rows."""
    values = np.random.default_rng(1).standard_normal((24, 512)).astype(np.float32)
    stored = stored_values(values, Kind[kind])
    raw = stored.view(np.uint8).reshape(24, -1)
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(64) + raw.tobytes())
    tensor = GgufTensor(name="t", type_name=kind, shape=(24, 512), offset=64, row_bytes=raw.shape[1])
    whole, opened = dequantize(raw, Kind[kind]), GgufFile(path=path, metadata={}, tensors={})
    assert np.isfinite(whole).all()
    for piece_bytes in (1, 5 * 4 * 512, 1 << 20):
        assert np.array_equal(np.concatenate(list(read_rows(opened, tensor, piece_bytes=piece_bytes))), whole)
        order = unpermuted(24, 3)
        assert np.array_equal(
            np.concatenate(list(read_rows(opened, tensor, order, piece_bytes=piece_bytes))), whole[order]
        )


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_the_order_of_rows_is_undone(heads: int):
    rows = np.arange(48)
    assert np.array_equal(permuted(rows, heads)[unpermuted(48, heads)], rows)


def test_a_large_tensor_is_never_dequantised_whole(workshop: Workshop, tmp_path: Path):
    """The embedding takes ten times the memory that is allowed here."""
    checkpoint = workshop.new_checkpoint("gguf-large", Variant(num_layers=1, config={"hidden_size": 512}))
    tokens = [f"t{number}" for number in range(80_000)]
    table = np.ones((len(tokens), 512), np.float32)
    fields = {"tokens": tokens, "token_type": [1] * len(tokens), "merges": ["t 0"]}
    file = write_gguf(
        tmp_path / "large.gguf",
        checkpoint,
        kind_of=lambda name: Kind.Q8_0 if name == "token_embd.weight" else Kind.F32,
        tensors={"token_embd.weight": table},
        **{f"tokenizer__ggml__{key}": value for key, value in fields.items()},
    )
    opened = read_gguf(file)
    tensor = opened.tensors["token_embd.weight"]
    assert 4 * table.size > 9 * PIECE_BYTES
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in read_rows(opened, tensor)) == len(tokens)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * PIECE_BYTES


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_another_dtype_rounds_what_fp32_holds(
    file: Path, imported: dict[str, torch.Tensor], tmp_path: Path, precision, dtype
):
    made = load_file(import_gguf(file, tmp_path / "out", ImportOptions(dtype=precision)).path / "model.safetensors")
    for name, values in imported.items():
        assert torch.equal(made[name], values.to(dtype)), name


def test_a_value_beyond_fp16_is_named(checkpoint: Path, tmp_path: Path):
    large = np.full((256,), 7e4, np.float32)
    file = write_gguf(tmp_path / "large.gguf", checkpoint, tensors={"output_norm.weight": large})
    with pytest.raises(OptionError, match=r"dtype='fp16' cannot hold 70000, a value of output_norm\.weight"):
        import_gguf(file, tmp_path / "out", ImportOptions(dtype="fp16"))
    assert not (tmp_path / "out").exists()


def test_several_weight_files_have_an_index(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers loads the same model from them as from one."""
    from transformers import AutoModelForCausalLM

    file = write_gguf(tmp_path / "model.gguf", checkpoint, kind_of=plain)
    one = import_gguf(file, tmp_path / "one").path
    monkeypatch.setattr("cllm_export.exporter.gguf.weights.SHARD_BYTES", 1 << 20)
    several = import_gguf(file, tmp_path / "several").path
    assert len(list(several.glob("model-*-of-*.safetensors"))) > 2
    models = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (one, several)]
    assert all(torch.equal(values, models[1][name]) for name, values in models[0].items())
