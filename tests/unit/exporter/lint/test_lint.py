"""The lint over the smallest graph that keeps, and the smallest that breaks, each rule."""

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, numpy_helper, parser

from cllm_export.bundle.contract import OPSET
from cllm_export.errors import GraphError
from cllm_export.exporter.lint.rules import DTYPES, NOT_PARSED, Finding, lint, require_clean

CACHE = "float[B,2,16,8] past, float[B,2,n,8] update, int64[B] index"
SCATTER = "present = TensorScatter<axis = -2, mode = 'linear'>(past, update, index)"
QKV = "float[B,4,n,8] q, float[B,2,S,8] k, float[B,2,S,8] v"

OPERATORS_OF_OUR_GRAPHS = (
    "Gather RMSNormalization MatMul Gemm Reshape Transpose Split RotaryEmbedding TensorScatter Slice Attention Add Mul "
    "Sigmoid Cast ArgMax Pad Equal Less LessOrEqual Or Where ReduceMin Shape Concat Unsqueeze Squeeze Expand"
)


def graph(inputs: str, outputs: str, nodes: str, *, constants: str = "", opset: int = OPSET) -> ModelProto:
    """A model from ONNX text; single quotes stand for double ones."""
    text = f"""
        <ir_version: 10, opset_import: ['': {opset}, 'com.microsoft': 1]>
        main ({inputs}) => ({outputs}) {f"<{constants}>" if constants else ""} {{ {nodes} }}
    """
    return parser.parse_model(text.replace("'", '"'))


def rules(model: ModelProto) -> list[str]:
    return [finding.rule for finding in lint(model)]


def attention(inputs: str = f"{QKV}, bool[B,1,n,S] mask", node: str = "y = Attention(q, k, v, mask)") -> ModelProto:
    return graph(inputs, "y", node)


def externalize(model: ModelProto, name: str) -> None:
    """Leave nothing of an initializer but dims, dtype and a file that does not exist."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    for data in ("raw_data", "float_data", "int64_data"):
        tensor.ClearField(data)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="nowhere.bin")


def test_a_clean_tensor_scatter_graph_has_no_findings():
    model = graph(
        f"{CACHE}, float[B,4,n,8] q, bool[B,1,n,S] mask, int64[1] extent",
        "float[B,2,16,8] present, float[B,4,n,8] y",
        f"{SCATTER} kv = Slice(present, start, extent, axis) y = Attention<scale = 0.5>(q, kv, kv, mask)",
        constants="int64[1] start = {0}, int64[1] axis = {2}",
    )
    assert lint(model) == []
    require_clean(model)


@pytest.mark.parametrize("operator", OPERATORS_OF_OUR_GRAPHS.split())
def test_every_operator_of_our_graphs_is_on_the_list(operator):
    assert operator in DTYPES


def test_a_finding_reads_as_node_message_and_rule():
    assert (
        str(Finding(node="CumSum c", rule="cumsum-axis", message="axis moves")) == "CumSum c: axis moves [cumsum-axis]"
    )


def test_an_opset_above_the_parser_is_refused():
    assert rules(graph("float[n] x", "y", "y = Exp(x)", opset=25)) == ["opset"]


def test_a_newer_parser_may_read_a_newer_opset():
    assert lint(graph("float[n] x", "y", "y = Exp(x)", opset=25), max_opset=25) == []


def test_a_model_without_the_default_domain_is_refused():
    model = graph("float[n] x", "y", "y = Exp(x)")
    del model.opset_import[0]
    assert "opset" in rules(model)


def test_an_operator_of_another_domain_is_refused():
    assert rules(graph("float[n] x", "y", "y = com.microsoft.QuickGelu(x)")) == ["domain"]


@pytest.mark.parametrize(
    "model",
    [
        graph("float[n] x", "y", "y = Swish(x)"),
        graph("float[n] x", "y, s, z", "y, s, z = DynamicQuantizeLinear(x)"),
        graph("uint8[n,4] a, uint8[4,m] b", "y", "y = MatMulInteger(a, b)"),
        graph("float[n] x", "y", "y, i, j, c = Unique(x)"),
    ],
    ids=["Swish", "DynamicQuantizeLinear", "MatMulInteger", "Unique"],
)
def test_an_operator_off_the_list_is_refused(model):
    assert rules(model) == ["operator"]


@pytest.mark.parametrize(
    "model",
    [
        graph("int64[n] x", "y", "y = MatMul(x, x)"),
        graph("bool[n] x", "y", "y = Equal(x, x)"),
        graph("bool[n] c, uint8[n] x", "y", "y = Where(c, x, x)"),
        graph("float[n] x", "y", "y = Cast<to = 3>(x)"),
        graph("int64[n] x", "y", "y = CumSum(x, axis)", constants="int64 axis = {0}"),
        graph(CACHE.replace("float", "int32"), "present", SCATTER),
    ],
    ids=["MatMul", "Equal", "Where", "Cast", "CumSum", "TensorScatter"],
)
def test_a_dtype_that_the_operator_does_not_take_is_refused(model):
    assert rules(model) == ["dtype"]


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_a_cache_of_any_float_dtype_is_clean(dtype):
    assert rules(graph(CACHE.replace("float", dtype), "present", SCATTER)) == []


def test_float64_is_refused_wherever_a_value_has_it():
    model = graph("double[n] x", "y", "d = Mul(x, x) y = Cast<to = 1>(d)")
    assert {(finding.node, finding.rule) for finding in lint(model)} == {("value x", "float64"), ("value d", "float64")}


def test_float64_in_a_weight_that_is_not_on_disk_is_refused():
    model = graph("float[n] x", "y", "y = Cast<to = 1>(w)")
    model.graph.initializer.append(TensorProto(name="w", dims=[2000], data_type=TensorProto.DOUBLE))
    externalize(model, "w")
    assert rules(model) == ["float64"]


def test_attention_with_a_bool_or_a_float_mask_is_clean():
    assert rules(attention()) == []
    assert rules(attention(f"{QKV}, float[B,1,n,S] mask")) == []


def test_attention_over_3d_inputs_is_refused():
    node = "y = Attention<q_num_heads = 4, kv_num_heads = 2>(q, k, v)"
    model = attention("float[B,n,32] q, float[B,S,16] k, float[B,S,16] v", node)
    assert rules(model) == ["attention-rank"] * 3


def test_attention_with_a_mask_that_is_not_4d_is_refused():
    assert rules(attention(f"{QKV}, bool[n,S] mask")) == ["attention-rank"]


def test_attention_over_an_input_of_unknown_rank_is_refused():
    model = graph(QKV, "y", "x = com.microsoft.Mystery(q) y = Attention(x, k, v)")
    assert rules(model) == ["domain", "attention-rank"]


def test_attention_with_a_past_of_its_own_is_refused():
    past = "float[B,2,P,8] past_key, float[B,2,P,8] past_value"
    model = attention(f"{QKV}, {past}", "y = Attention(q, k, v, , past_key, past_value)")
    assert rules(model) == ["attention-inputs"] * 2


def test_attention_with_a_length_per_row_is_refused():
    model = attention(f"{QKV}, int64[B] length", "y = Attention(q, k, v, , , , length)")
    assert rules(model) == ["attention-inputs"]


def test_attention_with_a_second_output_is_refused():
    past = "float[B,2,P,8] past_key, float[B,2,P,8] past_value"
    model = attention(f"{QKV}, {past}", "y, key, value = Attention(q, k, v, , past_key, past_value)")
    assert "attention-outputs" in rules(model)


@pytest.mark.parametrize(
    ("attribute", "rule"),
    [
        ("softcap = 30.0", "attention-softcap"),
        ("qk_matmul_output_mode = 1", "attention-qk-output"),
        ("softmax_precision = 1", "attention-softmax-precision"),
    ],
)
def test_an_attention_attribute_that_tensorrt_lacks_is_refused(attribute, rule):
    assert rules(attention(QKV, f"y = Attention<{attribute}>(q, k, v)")) == [rule]


def test_attention_attributes_at_their_defaults_are_clean():
    node = "y = Attention<softcap = 0.0, qk_matmul_output_mode = 0, is_causal = 0>(q, k, v)"
    assert rules(attention(QKV, node)) == []


def test_attention_with_an_integer_mask_is_refused():
    assert rules(attention(f"{QKV}, int64[B,1,n,S] mask")) == ["attention-mask-dtype"]


def test_attention_with_a_float_mask_of_another_precision_is_refused():
    assert rules(attention(f"{QKV}, float16[B,1,n,S] mask")) == ["attention-mask-dtype"]


def test_attention_with_both_mask_and_is_causal_is_refused():
    square = QKV.replace("S", "n")
    model = attention(f"{square}, bool[B,1,n,n] mask", "y = Attention<is_causal = 1>(q, k, v, mask)")
    assert rules(model) == ["attention-causal-mask"]


@pytest.mark.parametrize("lengths", [("4", "16"), ("n", "S"), ("n", "16")], ids=str)
def test_is_causal_is_refused_unless_queries_and_keys_are_known_to_be_as_many(lengths):
    queries, keys = lengths
    inputs = f"float[B,4,{queries},8] q, float[B,2,{keys},8] k, float[B,2,{keys},8] v"
    assert rules(attention(inputs, "y = Attention<is_causal = 1>(q, k, v)")) == ["attention-causal-length"]


def test_is_causal_over_as_many_queries_as_keys_is_clean():
    assert rules(attention(QKV.replace("S", "n"), "y = Attention<is_causal = 1>(q, k, v)")) == []


def folded(kv_heads: int) -> ModelProto:
    """Four query heads as rows of the key/value heads that they share."""
    inputs = f"float[B,4,n,8] q, float[B,{kv_heads},S,8] k, float[B,{kv_heads},S,8] v"
    nodes = "rows = Reshape(q, to) result = Attention(rows, k, v) y = Reshape(result, back)"
    constants = f"int64[4] to = {{0,{kv_heads},-1,8}}, int64[4] back = {{0,4,-1,8}}"
    return graph(inputs, "y", nodes, constants=constants)


def test_query_groups_folded_onto_one_head_are_refused_where_tensorrt_parses_the_graph():
    assert rules(folded(1)) == ["attention-folded"]
    assert lint(folded(1), waived=NOT_PARSED) == []


def test_query_groups_folded_onto_more_heads_are_clean():
    assert rules(folded(2)) == []


def test_a_model_of_one_head_is_clean():
    """It folds nothing. TensorRT spells its attention out, and there is no other graph to give it."""
    assert rules(attention(QKV.replace("B,4,", "B,1,").replace("B,2,", "B,1,"), "y = Attention(q, k, v)")) == []


def branches(then_node: str) -> ModelProto:
    node = f"y = If(c) <then_branch = yes () => (t) {{ {then_node} }}, else_branch = no () => (e) {{ e = Exp(q) }}>"
    return graph(f"bool c, {QKV}", "y", node)


def test_attention_inside_a_branch_is_refused():
    findings = lint(branches("t = Attention(q, k, v)"))
    assert [finding.rule for finding in findings] == ["attention-subgraph"]
    assert "If" in findings[0].message


def test_attention_inside_a_loop_is_refused():
    body = "body (int64 i, bool go, float[B,4,n,8] x) => (go, z) { z = Attention(x, k, v) }"
    model = graph(f"int64 count, bool more, {QKV}", "y", f"y = Loop(count, more, q) <body = {body}>")
    assert rules(model) == ["attention-subgraph"]


@pytest.mark.parametrize(
    ("node", "rule"),
    [
        ("t = com.microsoft.QuickGelu(q)", "domain"),
        ("t = Swish(q)", "operator"),
        ("x = Cast<to = 3>(q) t = Cast<to = 1>(x)", "dtype"),
        ("x = Cast<to = 11>(q) t = Cast<to = 1>(x)", "float64"),
    ],
)
def test_subgraphs_are_linted_too(node, rule):
    assert rule in rules(branches(node))


def test_a_clean_branch_has_no_findings():
    assert rules(branches("t = Sigmoid(q)")) == []


def test_a_scatter_axis_that_is_not_spelled_minus_two_is_refused():
    assert rules(graph(CACHE, "present", SCATTER.replace("-2", "2"))) == ["kv-axis"]


def test_a_circular_scatter_is_refused():
    assert rules(graph(CACHE, "present", SCATTER.replace("linear", "circular"))) == ["kv-mode"]


def test_a_cache_that_is_not_4d_is_refused():
    inputs = "float[B,16,8] past, float[B,n,8] update, int64[B] index"
    assert rules(graph(inputs, "present", SCATTER)) == ["kv-rank"] * 2


@pytest.mark.parametrize("length", ["C", "?"])
def test_a_cache_of_dynamic_length_is_refused(length):
    assert rules(graph(CACHE.replace("16", length), "present", SCATTER)) == ["kv-length"]


def test_a_past_that_is_computed_is_refused():
    inputs = CACHE.replace("past", "x")
    assert rules(graph(inputs, "present", f"past = Exp(x) {SCATTER}")) == ["kv-past"]


def test_a_past_that_is_an_initializer_is_refused():
    model = graph(CACHE.replace("B", "1"), "present", SCATTER)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 2, 16, 8), np.float32), "past"))
    assert rules(model) == ["kv-past"]


def test_a_present_that_stays_inside_is_refused():
    assert rules(graph(CACHE, "y", f"{SCATTER} y = Exp(present)")) == ["kv-present"]


@pytest.mark.parametrize(
    ("outputs", "nodes"),
    [
        ("present, y", f"{SCATTER} y = Exp(past)"),
        ("present, past", SCATTER),
        ("present", SCATTER.replace("update", "past")),
        (
            "present, y",
            f"{SCATTER} y = If(c) <then_branch = yes () => (t) {{ t = Exp(past) }}, "
            "else_branch = no () => (e) { e = Exp(present) }>",
        ),
    ],
    ids=["a node", "a network output", "the scatter itself", "a subgraph"],
)
def test_a_past_with_another_reader_is_refused(outputs, nodes):
    assert rules(graph(f"{CACHE}, bool c", outputs, nodes)) == ["kv-reader"]


def rotary(positions: str) -> ModelProto:
    return graph(
        f"float[B,2,n,8] x, float[16,4] cos, float[16,4] sin, {positions}[B,n] at",
        "y",
        "y = RotaryEmbedding(x, cos, sin, at)",
    )


def test_rotary_positions_must_be_int64():
    assert rules(rotary("int64")) == []
    assert rules(rotary("int32")) == ["rotary-positions"]


def test_a_rotary_embedding_without_positions_is_clean():
    assert rules(graph("float[B,2,n,8] x, float[B,n,4] cos", "y", "y = RotaryEmbedding(x, cos, cos)")) == []


def test_the_axis_of_a_cumulative_sum_must_be_constant():
    assert rules(graph("float[n] x, int64 axis", "y", "y = CumSum(x, axis)")) == ["cumsum-axis"]
    assert rules(graph("float[n] x", "y", "y = CumSum(x, axis)", constants="int64 axis = {0}")) == []
    assert rules(graph("float[n] x", "y", "axis = Constant<value_int = 0>() y = CumSum(x, axis)")) == []


def test_the_axes_of_a_reduction_must_be_constant():
    assert rules(graph("float[n,m] x, int64[1] axes", "y", "y = ReduceMin(x, axes)")) == ["reduce-axes"]
    assert rules(graph("float[n,m] x", "y", "y = ReduceMin(x, axes)", constants="int64[1] axes = {1}")) == []
    assert rules(graph("float[n,m] x", "y", "axes = Constant<value_ints = [1]>() y = ReduceMin(x, axes)")) == []
    assert rules(graph("float[n,m] x", "y", "y = ReduceMin(x)")) == []


@pytest.mark.parametrize("operator", ["Squeeze", "Unsqueeze"])
def test_the_axes_of_squeeze_and_unsqueeze_must_be_constant(operator):
    node = f"y = {operator}(x, axes)"
    assert rules(graph("float[1,n] x, int64[1] axes", "y", node)) == ["axes-constant"]
    assert rules(graph("float[1,n] x", "y", node, constants="int64[1] axes = {0}")) == []


def test_squeeze_without_axes_needs_a_static_shape():
    assert rules(graph("float[1,n] x", "y", "y = Squeeze(x)")) == ["squeeze-dynamic"]
    assert rules(graph("float[1,4] x", "y", "y = Squeeze(x)")) == []


def test_a_scatter_that_accumulates_is_refused():
    inputs, node = "float[n] x, int64[m,1] at, float[m] u", "y = ScatterND<reduction = '{}'>(x, at, u)"
    assert rules(graph(inputs, "y", node.format("add"))) == ["scatter-reduction"]
    assert rules(graph(inputs, "y", node.format("none"))) == []


@pytest.mark.parametrize(
    ("allowzero", "target", "broken"),
    [(0, "0, -1", []), (1, "4, -1", []), (1, "0, 4", ["reshape-zero"])],
)
def test_a_zero_in_a_reshape_target_must_keep_the_axis(allowzero, target, broken):
    node = f"y = Reshape<allowzero = {allowzero}>(x, to)"
    assert rules(graph("float[n,m] x", "y", node, constants=f"int64[2] to = {{{target}}}")) == broken


@pytest.mark.parametrize(
    "target",
    ["Constant<value_ints = [0, 4]>()", "Constant<value = int64[2] {0, 4}>()", "Shape(x)"],
)
def test_allowzero_over_any_target_that_may_hold_a_zero_is_refused(target):
    model = graph("float[n,m] x", "y", f"to = {target} y = Reshape<allowzero = 1>(x, to)")
    assert rules(model) == ["reshape-zero"]


def test_top_k_must_be_sorted():
    model = graph("float[n] x", "v, i", "v, i = TopK<sorted = 0>(x, k)", constants="int64[1] k = {8}")
    assert rules(model) == ["topk-sorted"]


@pytest.mark.parametrize(("count", "broken"), [(3839, []), (3840, ["topk-count"])])
def test_top_k_is_bounded(count, broken):
    model = graph("float[n] x", "v, i", "v, i = TopK(x, k)", constants=f"int64[1] k = {{{count}}}")
    assert rules(model) == broken


@pytest.mark.parametrize(
    ("shape", "scales", "axis", "broken"),
    [
        ("64,6", "2,6", 0, []),
        ("6,64", "6,2", 1, []),
        ("6,64", "6,2", -1, []),
        ("48,6", "2,6", 0, ["block-scales"]),
        ("64,6", "4,6", 0, ["block-scales"]),
        ("64,6,8", "2,6,8", 0, ["block-axis"]),
    ],
)
def test_blocks_divide_one_of_the_last_two_axes(shape, scales, axis, broken):
    node = f"y = DequantizeLinear<axis: int = {axis}, block_size: int = 32>(x, scale)"
    assert rules(graph(f"int4[{shape}] x, float[{scales}] scale", "y", node)) == broken


def test_four_bit_activations_are_refused():
    nodes = "codes = QuantizeLinear(x, scale, zero) y = DequantizeLinear(codes, scale, zero)"
    model = graph("float[n] x, int4 zero", "y", nodes, constants="float scale = {0.5}")
    assert rules(model) == ["int4-constant"]


@pytest.mark.parametrize(("zero", "broken"), [(0, []), (3, ["zero-point"])])
def test_quantisation_must_be_symmetric(zero, broken):
    constants = f"float scale = {{0.5}}, int8 zero = {{{zero}}}"
    assert rules(graph("int8[n] x", "y", "y = DequantizeLinear(x, scale, zero)", constants=constants)) == broken
    assert rules(graph("float[n] x", "y", "y = QuantizeLinear(x, scale, zero)", constants=constants)) == broken


def test_shapes_that_contradict_each_other_are_a_finding_not_a_traceback():
    findings = lint(graph("float[2,3] a, float[4,5] b", "y", "y = MatMul(a, b)"))
    assert [finding.rule for finding in findings] == ["shape-inference"]
    assert "\n" not in str(findings[0])


def test_other_rules_still_speak_where_shape_inference_fails():
    assert "operator" in rules(graph("float[2,3] a, float[4,5] b", "y", "x = MatMul(a, b) y = Swish(x)"))


def test_a_node_with_too_few_inputs_is_a_finding_not_a_traceback():
    for operator in ("Attention", "TensorScatter", "Where", "CumSum", "Reshape"):
        assert lint(graph("float[n] x", "y", f"y = {operator}(x)")), operator


def test_a_sound_graph_of_fixed_shapes_on_which_data_propagation_fails_is_clean():
    """onnx takes [B] and [n] for shapes and fails to add them as such, although [B, 1] + [n] is sound."""
    nodes = "column = Unsqueeze(index, one) y = Add(column, rows)"
    assert rules(graph("int64[2] index", "y", nodes, constants="int64[1] one = {1}, int64[4] rows = {0,1,2,3}")) == []


def test_weights_are_linted_before_their_data_exists():
    model = graph(
        "int64[n] ids, int64[1] end",
        "y",
        "x = Gather(table, ids) part = Slice(rows, start, end, start) f = Cast<to = 1>(part) y = Mul(x, f)",
        constants="float[8,4] table = {0}, int64[4] rows = {0,1,2,3}, int64[1] start = {0}",
    )
    externalize(model, "table")
    externalize(model, "rows")
    before = model.SerializeToString()
    assert lint(model) == []
    assert model.SerializeToString() == before


def test_require_clean_names_the_findings_and_the_count():
    nodes = " ".join(f"[node{i}] y{i} = Swish(x)" for i in range(12))
    with pytest.raises(GraphError) as error:
        require_clean(graph("float[n] x", "y0", nodes))
    message = str(error.value)
    assert "12 findings" in message
    assert "Swish node9: " in message
    assert "node10" not in message
    assert "and 2 more" in message
