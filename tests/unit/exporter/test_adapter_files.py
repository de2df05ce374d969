"""What the files of a checkpoint show without torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint.adapter_files import require_tensors

SHAPES = {
    "lm_head.weight": [2, 2],
    "model.embed_tokens.weight": [2, 2],
    "model.layers.0.mlp.down_proj.weight": [2, 2],
    "model.norm.weight": [2],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    entries, end = {}, 0
    for name, shape in SHAPES.items():
        start, end = end, end + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    return tmp_path


def test_a_layer_to_keep_is_a_matrix_of_the_checkpoint(checkpoint: Path):
    require_tensors(checkpoint, ["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize("name", ["attic", "model.norm.weight"])
def test_another_name_is_refused_with_an_example_of_a_layer(checkpoint: Path, name: str):
    """Not with the embedding, which is no linear layer."""
    with pytest.raises(OptionError, match=f"keep='{name}' .* such as model.layers.0.mlp.down_proj.weight"):
        require_tensors(checkpoint, [name])
