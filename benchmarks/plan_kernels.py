"""Count the kernels that TensorRT for RTX makes of a bundle's graph: step by step, and of other forms. Needs no GPU.

    python benchmarks/plan_kernels.py BUNDLE [--for sm89] [--block-size 1 16] [--only FORM ...] [--json OUT]

The steps are those of ``cllm_export/exporter/graph/tensorrt_graph.py``, added one by one to the greedy graph. The other
forms change the finished graph for TensorRT. Several of them compute other tokens, or the right ones only where S is
the whole cache: they show what a form would cost, and none of them is a product. The bundle must have symbolic shapes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from cllm_export.bundle.contract import Geometry
from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle, open_bundle
from cllm_export.exporter.graph.model import DecoderGraph, WeightSource
from cllm_export.exporter.graph.tensorrt_graph import STEPS, Step, derive_tensorrt_graph, read_cache_together
from cllm_export.tensorrt.build_plan import _configure, _set_targets, allow_decomposing
from cllm_export.tensorrt.library import TENSORRT_RTX, Log, import_library
from cllm_export.tensorrt.plan_contents import PlanContents, read_contents
from cllm_export.tensorrt.plan_options import PlanOptions, settle

Change = Callable[[DecoderGraph, Geometry], None]


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of the graph: the steps to take, and what else to change in the graph, the network or the profiles."""

    steps: Sequence[Step] = STEPS
    changes: Sequence[Change] = ()
    network: Callable[[Any, Any], None] | None = None
    """Changes the parsed network. It gets the library's module, too."""
    single_row_kernels: bool = False


def nodes(graph: DecoderGraph, op_type: str) -> list[ir.Node]:
    return [node for node in graph.graph if node.op_type == op_type]


def add(graph: DecoderGraph, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
    """The result of a new node. The graph is sorted afterwards."""
    node = ir.node(op_type, inputs, attributes)
    graph.graph.append(node)
    return node.outputs[0]


def number(graph: DecoderGraph, name: str, value: float) -> ir.Value:
    return graph.add_scalar(name, np.asarray(value, graph.dtype.numpy())[()])


def cache_slices(graph: DecoderGraph) -> list[ir.Node]:
    caches = {value for value in graph.graph.outputs if str(value.name).startswith("present_")}
    return [node for node in nodes(graph, "Slice") if node.inputs[0] in caches]


def whole_cache(graph: DecoderGraph, _: Geometry) -> None:
    """Attention over the whole cache, without a Slice: right where S is the cache's length."""
    rows = graph.graph.initializers["row_numbers"]
    positions = next(value for value in graph.graph.inputs if value.name == "kv_positions")
    for node in cache_slices(graph):
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
    for use in [use for use in positions.uses() if use.node.op_type != "Shape"]:
        use.node.replace_input_with(use.idx, rows)


def gathered_cache(graph: DecoderGraph, _: Geometry) -> None:
    """Rows of the cache looked up by kv_positions instead of sliced."""
    positions = next(value for value in graph.graph.inputs if value.name == "kv_positions")
    for node in cache_slices(graph):
        rows = add(graph, "Gather", node.inputs[0], positions, axis=2)
        ir.convenience.replace_all_uses_with(node.outputs[0], rows)


def without_mask(graph: DecoderGraph, _: Geometry) -> None:
    """No mask: the network then gets lengths and a causal rule instead."""
    for node in nodes(graph, "Attention"):
        node.resize_inputs(3)


def bias_mask(graph: DecoderGraph, _: Geometry) -> None:
    """The mask as numbers that are added to the scores, 0 or minus infinity."""
    for node in nodes(graph, "Attention"):
        bias = add(graph, "Where", node.inputs[3], number(graph, "zero", 0), number(graph, "hidden", -np.inf))
        node.replace_input_with(3, bias)


def scaled_queries(graph: DecoderGraph, _: Geometry) -> None:
    """The scale of attention in the queries, as a weight that is scaled beforehand would have it."""
    for node in nodes(graph, "Attention"):
        scale = node.attributes["scale"].as_float()
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        node.replace_input_with(0, add(graph, "Mul", node.inputs[0], number(graph, f"scale_{scale}", scale)))


def spelled_attention(graph: DecoderGraph, geometry: Geometry) -> None:
    """Attention as matrix products and a softmax, the heads of a group on an axis of their own."""
    for node in nodes(graph, "Attention"):
        query, key, value, mask = node.inputs[:4]
        axis = graph.add_constant([2])
        heads, kv_heads, width = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        grouped = add(graph, "Reshape", query, graph.add_constant([0, kv_heads, heads // kv_heads, -1, width]))
        keys, values, visible = (add(graph, "Unsqueeze", each, axis) for each in (key, value, mask))
        scores = add(graph, "MatMul", grouped, add(graph, "Transpose", keys, perm=[0, 1, 2, 4, 3]))
        scale = number(graph, "scale", node.attributes["scale"].as_float())
        seen = add(graph, "Where", visible, add(graph, "Mul", scores, scale), number(graph, "hidden", -np.inf))
        result = add(graph, "MatMul", add(graph, "Softmax", seen, axis=-1), values)
        back = add(graph, "Reshape", result, graph.add_constant([0, heads, -1, width]))
        ir.convenience.replace_all_uses_with(node.outputs[0], back)


def flat_attention(graph: DecoderGraph, geometry: Geometry) -> None:
    """Attention over 3-D queries, keys, values and result, [B, n, H D]."""
    heads, kv_heads, width = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
    for node in nodes(graph, "Attention"):
        for index, count in enumerate((heads, kv_heads, kv_heads)):
            rows = add(graph, "Transpose", node.inputs[index], perm=[0, 2, 1, 3])
            flat = add(graph, "Reshape", rows, graph.add_constant([0, 0, count * width]))
            node.replace_input_with(index, flat)
        for name, count in (("q_num_heads", heads), ("kv_num_heads", kv_heads)):
            node.attributes[name] = ir.AttrInt64(name, count)
        transpose = node.outputs[0].uses()[0].node
        ir.convenience.replace_all_uses_with(transpose.outputs[0].uses()[0].node.outputs[0], node.outputs[0])


def einsum_output(graph: DecoderGraph, geometry: Geometry) -> None:
    """The projection behind attention as an Einsum over heads, without a Transpose."""
    heads, width, hidden = geometry.num_heads, geometry.head_dim, geometry.hidden_size
    for node in nodes(graph, "Attention"):
        transpose = node.outputs[0].uses()[0].node
        product = transpose.outputs[0].uses()[0].node.outputs[0].uses()[0].node
        weight = add(graph, "Reshape", product.inputs[1], graph.add_constant([heads, width, hidden]))
        summed = add(graph, "Einsum", node.outputs[0], weight, equation="bhnd,hde->bne")
        ir.convenience.replace_all_uses_with(product.outputs[0], summed)


def gates_together(graph: DecoderGraph, _: Geometry) -> None:
    """Gate and up as one product with joined weights, and a Split."""
    products: dict[ir.Value | None, list[ir.Node]] = {}
    for node in nodes(graph, "MatMul"):
        products.setdefault(node.inputs[0], []).append(node)
    for rows, pair in products.items():
        if len(pair) == 2:
            weight = add(graph, "Concat", *(node.inputs[1] for node in pair), axis=1)
            split = ir.node(
                "Split", [add(graph, "MatMul", rows, weight)], {"axis": -1, "num_outputs": 2}, num_outputs=2
            )
            graph.graph.append(split)
            for node, part in zip(pair, split.outputs, strict=True):
                ir.convenience.replace_all_uses_with(node.outputs[0], part)


def argmax_of_half(graph: DecoderGraph, _: Geometry) -> None:
    """The argmax over the head's own numbers, before they are cast to fp32."""
    for node in nodes(graph, "ArgMax"):
        cast = node.inputs[0].producer() if node.inputs[0] is not None else None
        if cast is not None and cast.op_type == "Cast":
            node.replace_input_with(0, cast.inputs[0])


def argmax_by_minimum(graph: DecoderGraph, geometry: Geometry) -> None:
    """The argmax as the least column that equals the largest logit."""
    for node in nodes(graph, "ArgMax"):
        axes, logits = graph.add_constant([-1]), node.inputs[0]
        tensor = ir.tensor(np.arange(geometry.vocab_size)[None], name="columns")
        kind = ir.TensorType(tensor.dtype)
        columns = ir.Value(name="columns", shape=ir.Shape([1, geometry.vocab_size]), type=kind, const_value=tensor)
        graph.graph.register_initializer(columns)
        equal = add(graph, "Equal", logits, add(graph, "ReduceMax", logits, axes, keepdims=1))
        found = add(graph, "Where", equal, columns, graph.add_constant([geometry.vocab_size]))
        ir.convenience.replace_all_uses_with(node.outputs[0], add(graph, "ReduceMin", found, axes, keepdims=0))


def padded_head(graph: DecoderGraph, geometry: Geometry) -> None:
    """The head's table padded to a multiple of eight rows, and the logits sliced."""
    for node in nodes(graph, "Gemm"):
        padding = graph.add_constant([0, 0, -geometry.vocab_size % 8, 0])
        node.replace_input_with(1, add(graph, "Pad", node.inputs[1], padding))
        bounds = [graph.add_constant([bound]) for bound in (0, geometry.vocab_size, 1)]
        uses = list(node.outputs[0].uses())
        logits = add(graph, "Slice", node.outputs[0], *bounds)
        for use in uses:
            use.node.replace_input_with(use.idx, logits)


def lengths_for_mask(network: Any, trt: Any) -> None:
    """``key_value_lengths`` = write_index + n, and LOWER_RIGHT: row i sees write_index + i, as the mask says."""
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    shape = network.add_shape(inputs["input_ids"]).get_output(0)
    block = network.add_cast(network.add_slice(shape, (1,), (1,), (1,)).get_output(0), trt.DataType.INT64)
    ends = network.add_elementwise(inputs["write_index"], block.get_output(0), trt.ElementWiseOperation.SUM)
    lengths = network.add_cast(ends.get_output(0), trt.DataType.INT32).get_output(0)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
            layer.attention.key_value_lengths = lengths


BEFORE_SLICES = tuple(step for step in STEPS if step is not read_cache_together)
TRIED: dict[str, Form] = {
    "whole_cache": Form(steps=BEFORE_SLICES, changes=(whole_cache,)),
    "whole_cache, n = 1 alone": Form(steps=BEFORE_SLICES, changes=(whole_cache,), single_row_kernels=True),
    "n = 1 alone": Form(single_row_kernels=True),
    "gathered_cache": Form(steps=BEFORE_SLICES, changes=(gathered_cache,)),
    "lengths, S rows": Form(changes=(without_mask,), network=lengths_for_mask),
    "lengths, whole_cache": Form(steps=BEFORE_SLICES, changes=(whole_cache, without_mask), network=lengths_for_mask),
    **{
        change.__name__: Form(changes=(change,))
        for change in (
            scaled_queries,
            bias_mask,
            spelled_attention,
            flat_attention,
            einsum_output,
            gates_together,
            argmax_of_half,
            argmax_by_minimum,
            padded_head,
        )
    },
}


def steps_one_by_one() -> dict[str, Form]:
    """The greedy graph, and each step of the graph for TensorRT added in turn."""
    names = ["greedy graph", *(f"+ {step.__name__}" for step in STEPS)]
    return {name: Form(steps=STEPS[:count]) for count, name in enumerate(names)}


def load_greedy(bundle: Bundle) -> DecoderGraph:
    """The greedy graph of a bundle as passes see it, with its weights where they are."""
    model = ir.load(bundle.graph_path(GREEDY_GRAPH))
    stored = {
        name: WeightSource(tensors=(name,))
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return DecoderGraph(model=model, precision=bundle.manifest.precision, weights=stored)


def _steps(changes: Sequence[Change], geometry: Geometry) -> list[Step]:
    return [lambda graph, change=change: change(graph, geometry) for change in changes]


def build(bundle: Bundle, form: Form, options: dict[str, Any]) -> PlanContents | str:
    """What the builder makes of a form, or its error."""
    trt = import_library(TENSORRT_RTX)
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    geometry = bundle.manifest.geometry
    graph = derive_tensorrt_graph(load_greedy(bundle), geometry, steps=(*form.steps, *_steps(form.changes, geometry)))
    with tempfile.TemporaryDirectory() as scratch:
        for path in bundle.path.iterdir():
            (Path(scratch) / path.name).symlink_to(path.resolve())
        path = Path(scratch) / "form.onnx"
        onnx.save(ir.serde.serialize_model(graph.model), path)
        if not parser.parse_from_file(str(path)):
            return log.explain("not parsed")
    allow_decomposing(network, trt)
    if form.network is not None:
        form.network(network, trt)
    plan_options = PlanOptions(engine="tensorrt-rtx", single_row_kernels=form.single_row_kernels, **options)
    config = _configure(bundle, settle(plan_options, bundle.manifest), TENSORRT_RTX, trt, builder)
    _set_targets(config, options["targets"], trt)
    if builder.build_serialized_network(network, config) is None:
        return log.explain("not built")
    contents = read_contents(log.report, kv_length=geometry.cache_length)
    assert contents is not None
    return contents


def table(found: dict[str, PlanContents | str], sizes: Sequence[int]) -> str:
    """A Markdown table. Each cell has one figure for prefill and for each block size."""
    profiles = " / ".join(["prefill", *(f"n = {size}" for size in sizes)])
    lines = [
        f"| form ({profiles}) | kernels | attention | cache copies | host copies | logits copies | weights, MB |",
        "|---" * 7 + "|",
    ]
    for name, contents in found.items():
        if isinstance(contents, str):
            lines.append(f"| `{name}` | {contents} | | | | | | |")
            continue
        figures = [
            [str(profile.kernels) for profile in contents.profiles],
            [", ".join(profile.attention) or "none" for profile in contents.profiles],
            [str(profile.cache_copies) for profile in contents.profiles],
            [str(profile.host_copies) for profile in contents.profiles],
            [str(profile.logits_copies) for profile in contents.profiles],
        ]
        cells = [column[0] if len(set(column)) == 1 else " / ".join(column) for column in figures]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {contents.weight_bytes / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--for", dest="targets", nargs="+", default=["sm89"])
    parser.add_argument("--block-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--only", nargs="+", help="names of the forms; by default all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    forms = {**steps_one_by_one(), **TRIED}
    options = {"targets": tuple(args.targets), "block_sizes": tuple(args.block_size)}
    found = {name: build(bundle, forms[name], options) for name in args.only or forms}
    print(table(found, sorted(set(args.block_size))))
    if args.json:
        shown = {name: each if isinstance(each, str) else asdict(each) for name, each in found.items()}
        args.json.write_text(json.dumps(shown, indent=2) + "\n")


if __name__ == "__main__":
    main()
