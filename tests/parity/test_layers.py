"""A bundle compared with its checkpoint layer by layer: sound ones pass, and a wrong part is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import OptionError
from cllm_export.exporter.checkpoint.files import SINGLE_WEIGHTS
from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.exporter.parity.layer_parity import LayerError, compare_layers
from cllm_export.exporter.parity.layer_reference import LayerReference
from cllm_export.verification import verify as verify_module
from cllm_export.verification.report import VerifyOptions
from cllm_export.verification.verify import verify
from tests.checkpoints import VARIANTS
from tests.conftest import PINNED, THREADS, Workshop

TOKENS = [3, 14, 15, 9, 26, 5, 35]


def compare(bundle: Bundle, checkpoint: Path) -> list[LayerError]:
    length = bundle.manifest.max_length
    opened = open_checkpoint(checkpoint, max_length=length)
    reference = LayerReference(opened, bundle.manifest.precision, max_length=length)
    return compare_layers(bundle, reference, TOKENS, threads=THREADS)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_part_of_a_sound_bundle_agrees_with_the_checkpoint(workshop: Workshop, name: str):
    errors = compare(workshop.bundle(name), workshop.checkpoint(name))
    assert [entry.part for entry in errors][:2] == ["embedding", "layer 0"]
    assert errors[-1].part == "head"
    assert all(entry.passed for entry in errors), errors


@pytest.mark.parametrize("options", [{"precision": "fp16"}, PINNED], ids=["fp16", "pinned"])
def test_precision_and_pinned_shapes_change_nothing(workshop: Workshop, options: dict[str, object]):
    errors = compare(workshop.bundle("small", **options), workshop.checkpoint("small"))
    assert all(entry.passed for entry in errors), errors


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "layer 1"),
        ("model.layers.0.mlp.down_proj.weight", "layer 0"),
        ("model.layers.1.input_layernorm.weight", "layer 1"),
    ],
)
def test_only_the_layer_that_differs_is_named(workshop: Workshop, tmp_path: Path, tensor: str, part: str):
    name = next(iter(VARIANTS))
    changed = Path(shutil.copytree(workshop.checkpoint(name), tmp_path / "changed"))
    weights = load_file(changed / SINGLE_WEIGHTS)
    weights[tensor] = weights[tensor] * 1.1
    save_file(weights, changed / SINGLE_WEIGHTS, metadata={"format": "pt"})
    errors = compare(workshop.bundle(name), changed)
    assert [entry.part for entry in errors if not entry.passed] == [part]


def test_a_bundle_too_large_for_memory_is_compared_layer_by_layer(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verify_module, "available_memory", lambda: 1000)
    bundle = workshop.build(workshop.checkpoint("small"))
    with pytest.raises(OptionError, match="GB are free\\): give checkpoint"):
        verify(bundle)
    parity = verify(bundle, checkpoint=workshop.checkpoint("small"), options=VerifyOptions(threads=THREADS))
    assert parity.passed
    assert "are free" in parity.conditions["by_layer"]
    by_name = {check.name: check for check in parity.checks}
    assert by_name["decoding"].passed is None
    assert by_name["layer by layer against the PyTorch checkpoint"].passed
