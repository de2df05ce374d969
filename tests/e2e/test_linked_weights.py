"""Bundles that read their weights from the checkpoint: equal to copied ones, and refused once it is another."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cllm_export.bundle.manifest import WEIGHTS_NAME, Bundle, open_bundle
from cllm_export.errors import BundleError, ChecksumError, EngineError
from cllm_export.exporter.lint.rules import NOT_PARSED, lint
from cllm_export.runtime.load import load
from tests.checkpoints import VARIANTS, make_checkpoint
from tests.conftest import THREADS, Workshop
from tests.e2e.conftest import Cli, assert_refused, snapshot
from tests.parity.compare import MARGIN_EPSILON as EPSILON
from tests.parity.compare import assert_own_greedy_tokens, assert_same_tokens, random_prompts

LINKED = [
    *("llama", "llama-linear-bias-mqa", "qwen3-untied-bias"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "qwen2", "qwen3")),
]
"""fp32 checkpoints: heads tied and not, biases, grouped and single keys, QK-norms, one file and shards."""


@pytest.fixture
def moved(tmp_path: Path, small: Path, workshop: Workshop) -> Bundle:
    """A linked bundle whose checkpoint a test may change."""
    checkpoint = shutil.copytree(small, tmp_path / "checkpoint")
    return workshop.build(checkpoint, weights="link")


def weights_of(bundle: Bundle) -> Path:
    return Path(next(iter(bundle.manifest.linked_files.values())).path)


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_bundle_gives_the_checkpoints_tokens_and_writes_no_weight(workshop: Workshop, name: str):
    """Sums of other kernels may round otherwise: tokens may differ where the reference ties, within the tolerance of
    the copied bundle's own parity test."""
    bundle = workshop.bundle(name, weights="link")
    graph = onnx.load(bundle.graph_path(), load_external_data=False)
    assert lint(graph, waived=NOT_PARSED) == [], "TensorRT parses a graph of its own"
    held = {tensor.name for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert held - {"rotary.cos", "rotary.sin"} == set(bundle.manifest.linked_weights)
    model, reference = load(bundle.path, threads=THREADS), workshop.reference(name)
    for prompt in random_prompts(model.engine.geometry.vocab_size, [1, 9, 40]):
        options = {"max_new_tokens": 16, "block_size": 4}
        expected = model.generate(prompt, method="autoregressive", **options).token_ids
        assert_own_greedy_tokens(reference, prompt, expected, epsilon=EPSILON, what=name)
        assert_same_tokens(model.generate(prompt, method="jacobi", **options).token_ids, expected, name)


def test_a_linked_bundle_of_fixed_shapes_decodes_as_the_symbolic_one(workshop: Workshop):
    options = {"block_size": 4, "max_length": 64, "weights": "link"}
    fixed = load(workshop.bundle("small", fixed_shapes=True, **options).path, threads=THREADS)
    symbolic = load(workshop.bundle("small", **options).path, threads=THREADS)
    for prompt in ([5], [7, 11, 13]):
        tokens = [model.generate(prompt, max_new_tokens=12).token_ids for model in (fixed, symbolic)]
        assert tokens[0] == tokens[1]


def test_the_manifest_gives_each_weight_the_very_bytes_of_its_tensor(workshop: Workshop):
    from safetensors.numpy import load_file

    manifest = workshop.bundle("small", weights="link").manifest
    path = workshop.checkpoint("small") / "model.safetensors"
    stored, data = load_file(path), path.read_bytes()
    assert set(manifest.linked_weights) == set(stored)
    for name, weight in manifest.linked_weights.items():
        held = np.frombuffer(data[weight.offset : weight.offset + weight.length], np.float32)
        assert np.array_equal(held.reshape(weight.shape), stored[name])


def test_weights_are_copied_unless_links_are_asked_for(cli: Cli, small: Path, tmp_path: Path, output: Path):
    """Though every weight has the engine's dtype already: the bundle outlives its checkpoint."""
    checkpoint = shutil.copytree(small, tmp_path / "checkpoint")
    outcome = cli("build", checkpoint, "--output", output)
    assert outcome.code == 0, outcome
    assert "weights: copy" in outcome.err
    shutil.rmtree(checkpoint)
    assert not open_bundle(output).manifest.linked_files
    assert load(output, threads=THREADS).generate([5], max_new_tokens=2).token_ids


def test_links_that_are_asked_for_are_made(cli: Cli, small: Path, output: Path):
    outcome = cli("build", small, "--output", output, "--weights", "link")
    assert outcome.code == 0, outcome
    assert "weights: link" in outcome.err
    assert open_bundle(output).manifest.linked_weights


def test_linking_what_cannot_be_linked_is_refused(cli: Cli, workshop: Workshop, output: Path):
    outcome = cli("build", workshop.checkpoint("small"), "--output", output, "--weights", "link", "--precision", "bf16")
    assert_refused(outcome, "no weight can be linked", "BF16", "F32", "--weights copy")


def test_what_needs_work_is_written_beside_what_is_linked(workshop: Workshop, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    checkpoint = shutil.copytree(workshop.checkpoint("small"), tmp_path / "mixed")
    tensors = load_file(checkpoint / "model.safetensors")
    halved = {name: tensor.half() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(halved, checkpoint / "model.safetensors", metadata={"format": "pt"})
    bundle = workshop.build(checkpoint, weights="link")
    assert not [name for name in bundle.manifest.linked_weights if "norm" in name]
    copied = load(workshop.build(checkpoint).path, threads=THREADS)
    linked = load(bundle.path, threads=THREADS)
    assert linked.generate([5, 9], max_new_tokens=8).token_ids == copied.generate([5, 9], max_new_tokens=8).token_ids


def test_linked_tensors_are_scanned(cli: Cli, moved: Bundle, output: Path):
    path = weights_of(moved)
    weight = moved.manifest.linked_weights["model.layers.0.mlp.up_proj.weight"]
    data = bytearray(path.read_bytes())
    data[weight.offset : weight.offset + 4] = np.float32("nan").tobytes()
    path.write_bytes(data)
    outcome = cli("build", path.parent, "--output", output, "--weights", "link")
    assert_refused(outcome, "model.layers.0.mlp.up_proj.weight", "1 of 6144", "NaN")
    assert snapshot(output.parent) == {}


def test_a_checkpoint_that_moved_is_named(moved: Bundle):
    path = weights_of(moved)
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(BundleError, match=r"model\.safetensors.*linked to.*put the checkpoint back, or rebuild"):
        open_bundle(moved.path)


def test_a_checkpoint_of_another_size_is_named(moved: Bundle):
    with weights_of(moved).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"model\.safetensors.*bytes instead of.*the checkpoint changed"):
        open_bundle(moved.path)


def test_a_checkpoint_whose_header_gives_another_place_is_refused(moved: Bundle):
    path = weights_of(moved)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b"input_layernorm", b"input_layernork")
    path.write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises(BundleError, match=r"input_layernorm.*the checkpoint changed"):
        open_bundle(moved.path)


def test_one_changed_value_in_a_linked_file_fails_verification(cli: Cli, moved: Bundle):
    path = weights_of(moved)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"model\.safetensors is corrupted.*put the checkpoint back or rebuild"):
        open_bundle(moved.path).check_files()
    assert_refused(cli("verify", moved.path, "--threads", 1), "model.safetensors is corrupted")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"path": "model.safetensors"}, "absolute path"),
        ({"path": "/tmp/../etc/passwd"}, "absolute path"),
        ({"path": "/etc/passwd"}, "absolute path to a .safetensors file"),
    ],
    ids=["relative", "climbing", "no safetensors"],
)
def test_a_linked_path_that_build_would_not_write_is_refused(moved: Bundle, change: dict[str, Any], match: str):
    edit_manifest(moved, lambda raw: raw["linked_files"]["model.safetensors"].update(change))
    with pytest.raises(BundleError, match=match):
        open_bundle(moved.path)


@pytest.mark.parametrize(
    "change", [{"offset": 0}, {"length": 8}, {"offset": -8}, {"shape": [1 << 40]}, {"dtype": "I64"}]
)
def test_a_linked_place_that_is_not_the_tensors_is_refused(moved: Bundle, change: dict[str, Any]):
    edit_manifest(moved, lambda raw: raw["linked_weights"]["model.norm.weight"].update(change))
    with pytest.raises(BundleError, match=r"linked weight|model\.norm\.weight"):
        open_bundle(moved.path)


def test_a_linked_file_that_is_no_file_is_refused(moved: Bundle):
    path = weights_of(moved)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BundleError, match="linked to, is no regular file"):
        open_bundle(moved.path)


def edit_manifest(bundle: Bundle, edit: Any) -> None:
    path = bundle.path / "bundle.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def test_verify_and_inspect_take_a_linked_bundle(cli: Cli, workshop: Workshop, tmp_path: Path):
    bundle = workshop.copy(workshop.bundle("small", weights="link"), tmp_path / "bundle")
    options = ("--checkpoint", workshop.checkpoint("small"), "--max-new-tokens", 4, "--threads", 1)
    outcome = cli("verify", bundle.path, *options)
    assert outcome.code == 0, outcome
    assert "1 linked ones too" in outcome.out
    copied = workshop.bundle("small")
    description = json.loads(cli("inspect", bundle.path, "--json").out)
    linked = sum(weight.length for weight in bundle.manifest.linked_weights.values())
    assert description["memory"]["weights"] == bundle.file(WEIGHTS_NAME).stat().st_size + linked
    assert linked < copied.file(WEIGHTS_NAME).stat().st_size


def test_a_bf16_bundle_is_clean_and_refused_by_the_cpu_engine_in_a_sentence(workshop: Workshop, tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path / "bf16", replace(VARIANTS["llama"], dtype="bfloat16", num_layers=1))
    for mode in ("link", "copy"):
        bundle = workshop.build(checkpoint, precision="bf16", weights=mode)
        graph = onnx.load(bundle.graph_path(), load_external_data=False)
        assert lint(graph, waived=NOT_PARSED) == [], "TensorRT parses a graph of its own"
        past = next(value for value in graph.graph.input if value.name == "past_key.0")
        assert past.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
        with pytest.raises(EngineError, match=r"bf16 bundle.*precision='fp32', or run it on a GPU engine"):
            load(bundle.path, threads=THREADS)


def test_a_link_out_of_the_checkpoint_is_refused_and_one_into_a_hub_cache_is_not(
    cli: Cli, small: Path, tmp_path: Path, output: Path
):
    checkpoint = shutil.copytree(small, tmp_path / "hub" / "snapshots" / "abc")
    outside = tmp_path / "outside.safetensors"
    shutil.move(checkpoint / "model.safetensors", outside)
    (checkpoint / "model.safetensors").symlink_to(outside)
    assert_refused(cli("build", checkpoint, "--output", output), "model.safetensors", "leaves the checkpoint")
    blob = tmp_path / "hub" / "blobs" / "123"
    blob.parent.mkdir()
    shutil.move(outside, blob)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to(blob)
    outcome = cli("build", checkpoint, "--output", output)
    assert outcome.code == 0, outcome
    assert load(output, threads=THREADS).generate([5], max_new_tokens=2).token_ids


def test_tensors_whose_bytes_overlap_are_refused(cli: Cli, small: Path, tmp_path: Path, output: Path):
    checkpoint = shutil.copytree(small, tmp_path / "checkpoint")
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    norms = [name for name in header if name.endswith("layernorm.weight")]
    header[norms[1]]["data_offsets"] = header[norms[0]]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert_refused(cli("build", checkpoint, "--output", output), "model.safetensors", "damaged")


def test_the_first_layers_alone_are_what_the_reference_has_first(cli: Cli, workshop: Workshop, output: Path):
    checkpoint = workshop.checkpoint("qwen3")
    outcome = cli("build", checkpoint, "--output", output, "--num-layers", 1, "--weights", "copy")
    assert outcome.code == 0, outcome
    assert open_bundle(output).manifest.geometry.num_layers == 1
    verified = cli("verify", output, "--checkpoint", checkpoint, "--max-new-tokens", 6, "--threads", 1)
    assert verified.code == 0, verified
    refused = cli("build", checkpoint, "--output", output, "--force", "--num-layers", 3)
    assert_refused(refused, "--num-layers 3", "2 layers")


@pytest.mark.parametrize(
    ("size", "phrases"), [("1MB", ("1MB is too small", "smallest that works is")), ("much", ("512MB or 1GB", "'much'"))]
)
def test_a_memory_bound_that_cannot_be_kept_is_refused(
    cli: Cli, small: Path, output: Path, size: str, phrases: tuple[str, ...]
):
    assert_refused(cli("build", small, "--output", output, "--max-memory", size), "--max-memory", *phrases)


@pytest.mark.parametrize("name", ["llama-llama3-bf16-sharded", pytest.param("qwen2-window", marks=pytest.mark.slow)])
def test_pieces_of_any_size_give_the_same_file(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, name: str):
    """A few rows at a time, with and without room for a whole weight: transposed, stacked and cast alike."""
    from cllm_export.exporter import pipeline
    from cllm_export.exporter.weights.memory import MemoryPlan

    expected = workshop.bundle(name, precision="fp16").manifest.files[WEIGHTS_NAME]
    for stage in (0, 20_000):
        plan = MemoryPlan(piece=1000, stage=stage, peak=1)
        monkeypatch.setattr(pipeline, "plan_memory", lambda *_, plan=plan, **__: plan)
        built = workshop.build(workshop.checkpoint(name), precision="fp16")
        assert built.manifest.files[WEIGHTS_NAME] == expected
        built.check_files()
