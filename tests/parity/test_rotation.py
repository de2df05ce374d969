"""A rotated model is the same function: in fp32 for every family, and in 8 bits as its formulas say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from cllm_export.bundle.contract import Batch  # noqa: E402 - after the skip
from cllm_export.bundle.manifest import Bundle  # noqa: E402
from cllm_export.errors import OptionError  # noqa: E402
from cllm_export.exporter import pipeline  # noqa: E402
from cllm_export.exporter.checkpoint.read import Checkpoint, open_checkpoint  # noqa: E402
from cllm_export.exporter.graph import rotate as rotations  # noqa: E402
from cllm_export.exporter.graph.model import DecoderGraph  # noqa: E402
from cllm_export.exporter.graph.rotate import RotationPlan, plan_rotation, rotate  # noqa: E402
from cllm_export.exporter.options import BuildOptions  # noqa: E402
from cllm_export.exporter.quantize import int8_dynamic  # noqa: E402
from cllm_export.exporter.quantize.linear import linear_layers  # noqa: E402
from cllm_export.exporter.quantize.options import QuantizeOptions  # noqa: E402
from cllm_export.exporter.settle import settle  # noqa: E402
from cllm_export.exporter.stages import Stages  # noqa: E402
from cllm_export.runtime.engines.onnxruntime import OrtEngine  # noqa: E402
from cllm_export.verification.report import VerifyOptions  # noqa: E402
from cllm_export.verification.verify import verify  # noqa: E402
from tests.checkpoints import VARIANTS  # noqa: E402
from tests.conftest import THREADS, Workshop  # noqa: E402

OTHERS = ("starcoder2", "stablelm", "gemma2", "gemma3_text", "olmo2")
"""Families that have LayerNorm, or a norm at the end of a block."""
RMS_NORM = tuple(name for name, variant in VARIANTS.items() if variant.family not in OTHERS)
SAME = 2e-4
"""Largest difference of a logit, in standard deviations of the logits. Both sides compute in fp32 with the same
formulas, and round in other places: 6e-6 for most families, and 6e-5 where the embedding is multiplied. A rotation that
is forgotten at one weight gives differences of about 1."""
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19]


def graph_of(checkpoint: Path) -> tuple[DecoderGraph, Checkpoint]:
    """The graph of a checkpoint after its passes, before any weight is read."""
    opened = open_checkpoint(checkpoint, max_length=None)
    stages = Stages(lambda _: None, lambda *_: None)
    return pipeline._make_graph(opened, settle(BuildOptions(), opened), stages, link=False), opened


def rotated_bundle(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Bundle, RotationPlan, DecoderGraph]:
    """An fp32 bundle whose graph was rotated; no option gives one, since it brings nothing."""
    made: list[Any] = []
    make = pipeline._make_graph

    def rotating(checkpoint: Checkpoint, *arguments: Any, **options: Any) -> DecoderGraph:
        graph = make(checkpoint, *arguments, **options)
        made.extend([rotate(graph, checkpoint.read), graph])
        return graph

    monkeypatch.setattr(pipeline, "_make_graph", rotating)
    bundle = workshop.build(workshop.checkpoint(name))
    monkeypatch.undo()
    return bundle, made[0], made[1]


def logits(bundle: Bundle) -> np.ndarray:
    forward = OrtEngine(bundle, num_slots=1, threads=THREADS).forward(Batch([TOKENS], [1], [0]), with_logits=True)
    assert forward.logits is not None
    return forward.logits[0].copy()


@pytest.mark.parametrize("name", RMS_NORM)
def test_a_rotated_model_of_each_rms_norm_family_is_the_same_function(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
):
    bundle, plan, graph = rotated_bundle(workshop, name, monkeypatch)
    assert plan.rotated == ("residual", "values") and not plan.refused
    plain = logits(workshop.bundle(name))
    assert np.abs(logits(bundle) - plain).max() < SAME * plain.std()
    unspread = {linear.name for linear in linear_layers(graph) if linear.rows not in graph.spread}
    assert all(".down_proj." in name for name in unspread), unspread


@pytest.mark.parametrize(
    ("name", "rotated", "reason"),
    [
        ("gemma2", ("values",), "a RMSNormalization is added to the residual stream"),
        ("gemma3", ("values",), "a RMSNormalization is added to the residual stream"),
        ("olmo2", ("values",), "a MatMul reads the residual stream"),
        ("starcoder2", ("values",), "a LayerNormalization reads the residual stream"),
        ("stablelm-parallel", ("values",), "a LayerNormalization reads the residual stream"),
    ],
)
def test_a_model_whose_residual_stream_cannot_turn_is_rotated_in_its_values_alone(
    workshop: Workshop, name: str, rotated: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
):
    bundle, plan, _ = rotated_bundle(workshop, name, monkeypatch)
    assert plan.rotated == rotated and plan.refused == {"residual": reason}
    plain = logits(workshop.bundle(name))
    assert np.abs(logits(bundle) - plain).max() < SAME * plain.std()


def plan_of_changed(checkpoint: Path, change: Callable[[ir.Graph], None]) -> RotationPlan:
    """What can be rotated in the graph of a checkpoint after a change of its nodes."""
    graph, _ = graph_of(checkpoint)
    change(graph.graph)
    return plan_rotation(graph.graph, lambda value: value.name in graph.weights)


def _read_residual(graph: ir.Graph) -> None:
    residual = next(node for node in graph if node.op_type == "Gather").outputs[0]
    graph.append(ir.node("Relu", [residual]))


def _read_norm(graph: ir.Graph) -> None:
    norm = next(node for node in graph if node.op_type == "RMSNormalization")
    graph.append(ir.node("Relu", [norm.outputs[0]]))


def _share_scale(graph: ir.Graph) -> None:
    norms = [node for node in graph if node.op_type == "RMSNormalization"]
    norms[0].replace_input_with(1, norms[1].inputs[1])


def _write_by_another(graph: ir.Graph) -> None:
    add = next(node for node in graph if node.op_type == "Add" and str(node.outputs[0].name).startswith("hidden"))
    other = ir.node("Relu", [add.inputs[1]])
    graph.insert_before(add, other)
    add.replace_input_with(1, other.outputs[0])


def _read_embedding(graph: ir.Graph) -> None:
    table = next(node for node in graph if node.op_type == "Gather").inputs[0]
    graph.append(ir.node("Relu", [table]))


def _return_residual(graph: ir.Graph) -> None:
    graph.outputs.append(next(node for node in graph if node.op_type == "Gather").outputs[0])


def _share_projection(graph: ir.Graph) -> None:
    matmuls = [node for node in graph if node.op_type == "MatMul" and "gate_proj" in str(node.inputs[1].name)]
    matmuls[0].replace_input_with(1, matmuls[1].inputs[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_read_residual, "a Relu reads the residual stream"),
        (_read_norm, "a Relu reads a norm of the residual stream"),
        (_share_scale, "a norm of the residual stream has no scale of its own"),
        (_write_by_another, "a Relu is added to the residual stream"),
        (_read_embedding, "a Relu reads the embedding too"),
        (_return_residual, "the residual stream is an output of the graph"),
        (_share_projection, "model.layers.1.mlp.gate_proj.weight.T is read by several layers"),
    ],
)
def test_a_residual_stream_that_something_else_reads_or_writes_is_left_alone(
    workshop: Workshop, change: Callable[[ir.Graph], None], reason: str
):
    plan = plan_of_changed(workshop.checkpoint("llama"), change)
    assert plan.refused == {"residual": reason} and plan.rotated == ("values",)


def _values(graph: ir.Graph) -> ir.Node:
    return next(
        node for node in graph if node.op_type == "TensorScatter" and str(node.inputs[0].name).startswith("past_value")
    )


def _read_values(graph: ir.Graph) -> None:
    graph.append(ir.node("Relu", [_values(graph).inputs[1]]))


def _read_cache(graph: ir.Graph) -> None:
    graph.append(ir.node("Relu", [_values(graph).outputs[0]]))


def _change_values(graph: ir.Graph) -> None:
    scatter = _values(graph)
    other = ir.node("Relu", [scatter.inputs[1]])
    graph.insert_before(scatter, other)
    scatter.replace_input_with(1, other.outputs[0])


def _swap_axes(graph: ir.Graph) -> None:
    scatter = _values(graph)
    other = ir.node("Transpose", [scatter.inputs[1]], {"perm": [0, 1, 3, 2]})
    graph.insert_before(scatter, other)
    scatter.replace_input_with(1, other.outputs[0])


def _normalise_result(graph: ir.Graph) -> None:
    projection = next(node for node in graph if node.op_type == "MatMul" and "o_proj" in str(node.inputs[1].name))
    other = ir.node("Relu", [projection.inputs[0]])
    graph.insert_before(projection, other)
    projection.replace_input_with(0, other.outputs[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_read_values, "the values of a layer are read by more than its KV cache"),
        (_read_cache, "the values of a layer are read by more than its attention"),
        (_change_values, "a Relu makes the values of a layer"),
        (_swap_axes, "a Transpose makes the values of a layer"),
        (_normalise_result, "a Relu reads the values of a layer"),
    ],
)
def test_values_that_something_else_reads_or_changes_are_left_alone(
    workshop: Workshop, change: Callable[[ir.Graph], None], reason: str
):
    plan = plan_of_changed(workshop.checkpoint("llama"), change)
    assert plan.refused == {"values": reason} and plan.rotated == ("residual",)


def test_a_joint_projection_whose_other_parts_overlap_the_values_is_left_alone(workshop: Workshop):
    graph, _ = graph_of(workshop.checkpoint("phi3"))
    slices = [node for node in graph.graph if node.op_type == "Slice" and str(node.outputs[0].name) == "slice_5"]
    values = next(node for node in graph.graph if str(node.outputs[0].name) == "slice_6")
    slices[0].replace_input_with(2, values.inputs[2])
    plan = plan_rotation(graph.graph, lambda value: value.name in graph.weights)
    assert plan.refused == {"values": "a Slice reads the values of a layer too"}


ROTATE = {"quantize": QuantizeOptions(scheme="int8-dynamic", rotate=True)}


def test_a_rotation_that_is_asked_for_is_refused_where_the_function_would_change(workshop: Workshop, tmp_path: Path):
    with pytest.raises(OptionError, match="rotate is for models whose residual stream can be rotated, and in this one"):
        pipeline.build(workshop.checkpoint("starcoder2"), tmp_path / "bundle", BuildOptions(**ROTATE))
    assert not list(tmp_path.iterdir())


def test_the_manifest_and_the_build_say_what_was_rotated(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = workshop.bundle("llama", **ROTATE).manifest.quantization
    assert whole is not None and whole.rotated == ("residual", "values") and whole.unrotated == {}
    plain = workshop.bundle("llama", quantize=QuantizeOptions(scheme="int8-dynamic"))
    assert plain.manifest.quantization is not None and plain.manifest.quantization.rotated == ()
    reason, said = "a Slice reads the values of a layer too", []

    def refuse(*_: object) -> RotationPlan:
        raise rotations.NotRotatable(reason)

    monkeypatch.setattr(rotations, "_values", refuse)
    export = pipeline.export(workshop.checkpoint("small"), tmp_path / "bundle", BuildOptions(**ROTATE), say=said.append)
    made = export.bundle.manifest.quantization
    assert made is not None and made.rotated == ("residual",) and made.unrotated == {"values": reason}
    assert f"not rotated: the values in the KV cache, since {reason}" in said


def test_a_head_that_shared_the_embedding_is_said_to_become_a_matrix_of_its_own(workshop: Workshop, tmp_path: Path):
    said: list[str] = []
    options = BuildOptions(**ROTATE)
    export = pipeline.export(workshop.checkpoint("llama"), tmp_path / "bundle", options, say=said.append)
    assert any(line.startswith("the head no longer shares the embedding's matrix, which takes 0.1 MB") for line in said)
    made = export.bundle.manifest.quantization
    assert made is not None and made.kept["lm_head.weight"].startswith("head: ")
    assert made.kept["model.embed_tokens.weight"] == "embedding"


def test_parts_of_a_rotated_bundle_are_compared_in_the_basis_of_the_checkpoint(workshop: Workshop):
    """An embedding keeps its precision, so that its part is exact where the rotation is taken back."""
    bundle = workshop.bundle("llama", **ROTATE)
    options = VerifyOptions(max_new_tokens=4, threads=THREADS, by_layer=True)
    checks = verify(bundle, checkpoint=workshop.checkpoint("llama"), options=options).checks
    parts = next(check for check in checks if check.name.startswith("layer by layer")).data["parts"]
    assert parts[0]["part"] == "embedding" and parts[0]["error"] < 1e-5
    assert all(part["error"] < 1 for part in parts[:-1])


def test_outliers_of_the_residual_stream_cost_rows_of_8_bits_less_in_a_rotated_bundle(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One channel of the embedding is 100 times as large as the others, as in pre-trained models."""
    from tests.checkpoints import edit_weights, make_checkpoint

    checkpoint = make_checkpoint(tmp_path / "outlier", replace(VARIANTS["llama"], num_layers=1, tied=False))
    table = open_checkpoint(checkpoint, max_length=None).read("model.embed_tokens.weight").clone()
    table[:, 5] *= 100
    edit_weights(checkpoint, **{"model.embed_tokens.weight": table})
    plain = logits(workshop.build(checkpoint))
    inner = tuple(f"model.layers.0.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj"))

    monkeypatch.setattr(int8_dynamic, "FineRows", int8_dynamic.CoarseRows)

    def apart(*, rotated: bool) -> float:
        options = QuantizeOptions(scheme="int8-dynamic", rotate=rotated, keep=inner)
        return float(np.median(np.abs(logits(workshop.build(checkpoint, quantize=options)) - plain)))

    assert apart(rotated=True) < 0.7 * apart(rotated=False)  # 0.6 here: the weights are rounded too
