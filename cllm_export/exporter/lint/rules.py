"""Checks a graph, without TensorRT, against the rules of TensorRT's ONNX parser (10.15 to 11.x) and of KVCacheUpdate.

The lint runs at export time on any machine. It finds graphs that an engine build on the GPU would refuse, or would
accept and then compute wrongly. It does not prove that a graph builds. onnx.checker checks for valid ONNX, and the
passes check the contract. The lint reads only dims and dtype of weights, because their data may not be written yet.

The rules come from onnx-tensorrt's docs/operators.md and importers. A rule that is stricter than the parser says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto

from cllm_export.bundle.contract import OPSET
from cllm_export.errors import GraphError
from cllm_export.exporter.lint.values import (
    BOOL,
    FLOATS,
    INTEGERS,
    QUANTIZED,
    Dim,
    Values,
    _without_data,
    attribute,
    attributes,
    dtype_name,
    infer,
    input_name,
    nodes_of,
)

Broken = Iterator[tuple[str, str]]
"""A (rule, message) pair for each rule that a node breaks."""

MAX_LISTED = 10
FOLDED = "attention-folded"
NOT_PARSED = frozenset({FOLDED})
"""Rules that a graph may break if TensorRT is given another graph of the bundle."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule that a node, a value or the model breaks."""

    node: str
    """The operator type and name of a node; ``value`` and a name; or ``model``."""
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message} [{self.rule}]"


def lint(
    model: ModelProto, *, max_opset: int = OPSET, unjudged: Collection[str] = (), waived: Collection[str] = ()
) -> list[Finding]:
    """Every rule that the graph breaks, in graph order; an empty list if there is none.

    ``unjudged`` names operators, of any domain, to skip because the graph is made for another engine than TensorRT.
    ``waived`` names rules to skip.
    """
    described, failure = infer(_without_data(model))
    values = Values.of(model, described)
    findings = [Finding(node="model", rule=rule, message=text) for rule, text in (*_opset(model, max_opset), *failure)]
    findings += [Finding(node=f"value {name}", rule=rule, message=text) for name, rule, text in _float64(values)]
    for node, inside in nodes_of(model.graph):
        if node.op_type in unjudged:
            continue
        label = f"{node.op_type} {node.name}".strip()
        findings += [Finding(node=label, rule=rule, message=text) for rule, text in _check(node, inside, values)]
    return [finding for finding in findings if finding.rule not in waived]


def require_clean(model: ModelProto, *, unjudged: Collection[str] = (), waived: Collection[str] = ()) -> None:
    """Check that the graph breaks no rule; see ``lint``.

    Raises:
        GraphError: it breaks a rule; lists the first findings and their number.
    """
    findings = lint(model, unjudged=unjudged, waived=waived)
    if not findings:
        return
    lines = [f"  {finding}" for finding in findings[:MAX_LISTED]]
    if len(findings) > MAX_LISTED:
        lines.append(f"  and {len(findings) - MAX_LISTED} more")
    raise GraphError(
        f"TensorRT would refuse this graph or compute it wrongly ({len(findings)} findings); "
        "a pass has to rewrite these nodes:\n" + "\n".join(lines)
    )


# The dtypes that each operator takes. Any other operator is refused, even if TensorRT knows it.

DTYPES: dict[str, frozenset[int]] = {
    operator: dtypes
    for operators, dtypes in (
        (
            "Attention Ceil Clip Cos CumSum Einsum Erf Exp Floor Gelu Gemm LayerNormalization Log LogSoftmax MatMul "
            "QuantizeLinear RMSNormalization Reciprocal RotaryEmbedding Round Sigmoid Sin Softmax Softplus Sqrt Tanh",
            FLOATS,
        ),
        # The parser's table adds int32, but TensorScatter becomes KVCacheUpdate, which takes only floats.
        ("TensorScatter", FLOATS),
        (
            "Abs Add ArgMax ArgMin Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Neg Pad Pow Range "
            "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
            "ReduceSumSquare Relu ScatterElements ScatterND Sign Sub Sum TopK",
            FLOATS | INTEGERS,
        ),
        (
            "Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity If Loop OneHot "
            "Reshape Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
            FLOATS | INTEGERS | BOOL,
        ),
        ("And Not Or Xor", BOOL),
        ("Cast", FLOATS | INTEGERS | BOOL | {TensorProto.UINT8}),
        ("DequantizeLinear", QUANTIZED),
    )
    for operator in operators.split()
}

REFUSED: dict[str, str] = {
    "Swish": "exists only since TensorRT 11.0: write Mul(x, Sigmoid(x))",
    "DynamicQuantizeLinear": "is not in TensorRT, and its one scale per tensor lets the rows of a block see each other",
    "MatMulInteger": "is not in TensorRT: quantise with QuantizeLinear and DequantizeLinear",
}
"""Refused operators that occur often -> the reason, and what to use instead."""

TYPED_VALUES: dict[str, Callable[[NodeProto], Sequence[str]]] = {
    "Where": lambda node: node.input[1:2],
    "Cast": lambda node: [*node.input[:1], *node.output[:1]],
    "Constant": lambda node: node.output[:1],
    "ConstantOfShape": lambda node: node.output[:1],
    "If": lambda node: node.output,
    "OneHot": lambda node: node.input[2:3],
}
"""Operator -> values whose dtype is checked, where that is not the dtype of the first input."""


# Rules for the whole model.


def _opset(model: ModelProto, newest: int) -> Broken:
    """The parsers of 10.15 and 11.1 support opsets up to 24."""
    versions = [entry.version for entry in model.opset_import if _is_default(entry.domain)]
    if not versions:
        yield "opset", "imports no opset of the default domain"
    elif versions[0] > newest:
        yield "opset", f"opset {versions[0]} is above {newest}, the newest that is parsed"


def _float64(values: Values) -> Iterator[tuple[str, str, str]]:
    """TensorRT has no float64: the parser clamps it to float32 without an error."""
    for name, dtype in values.dtypes.items():
        if dtype == TensorProto.DOUBLE:
            yield name, "float64", "is float64, which TensorRT narrows to float32 in silence"


# Rules for every node.


def _check(node: NodeProto, inside: str, values: Values) -> Broken:
    """Apply the rules of every node, then those of its operator. An unknown operator gives one finding only."""
    if not _is_default(node.domain):
        yield "domain", f"operator of domain {node.domain!r}: TensorRT would look for a plugin of that name"
    elif node.op_type not in DTYPES:
        yield "operator", REFUSED.get(node.op_type, "operator is not on the list of those that TensorRT parses")
    else:
        yield from _dtype(node, values)
        yield from _subgraph(node, inside)
        for rule in RULES.get(node.op_type, ()):
            yield from rule(node, values)


def _is_default(domain: str) -> bool:
    return domain in {"", "ai.onnx"}


def _dtype(node: NodeProto, values: Values) -> Broken:
    """TensorRT 11 is strongly typed: a layer gets the dtype in the ONNX graph, and each layer takes its own set."""
    allowed = DTYPES[node.op_type] | {TensorProto.UNDEFINED, TensorProto.DOUBLE}  # float64 has its own rule
    names = TYPED_VALUES.get(node.op_type, _first_input)(node)
    for dtype in sorted({values.dtypes.get(name, TensorProto.UNDEFINED) for name in names} - allowed):
        known = ", ".join(dtype_name(other) for other in sorted(DTYPES[node.op_type]))
        yield "dtype", f"does not take {dtype_name(dtype)}, only {known}"


def _first_input(node: NodeProto) -> Sequence[str]:
    return list(node.input[:1])


def _subgraph(node: NodeProto, inside: str) -> Broken:
    """TensorRT 10.16 fails to build Attention inside a conditional."""
    if inside and node.op_type == "Attention":
        yield "attention-subgraph", f"stands in a subgraph of {inside}, where TensorRT 10.16 cannot build it"


# Rules for one operator each.


def _attention_ports(node: NodeProto, values: Values) -> Broken:
    """IAttention takes a 4-D query, key, value and mask, and has one output. KVCacheUpdate handles the past."""
    for index, port in enumerate(("Q", "K", "V", "attn_mask")):
        name = input_name(node, index)
        if name and values.rank(name) != 4:
            yield "attention-rank", f"{port} must be 4-D, {name} has rank {values.rank(name)}"
    for index, port in enumerate(("past_key", "past_value", "nonpad_kv_seqlen"), start=4):
        if input_name(node, index):
            yield "attention-inputs", f"input {port} is unsupported, and it is {input_name(node, index)}"
    if any(node.output[1:]):
        yield "attention-outputs", f"only the output Y is supported, this has {list(node.output)}"


def _attention_attributes(node: NodeProto, _: Values) -> Broken:
    """IAttention does not have these settings. The parser of 10.15 refuses softmax_precision with any value."""
    if attribute(node, "softcap", 0.0) != 0:
        yield "attention-softcap", f"softcap is unsupported, and it is {attribute(node, 'softcap', 0.0)}"
    if attribute(node, "qk_matmul_output_mode", 0) != 0:
        yield "attention-qk-output", "qk_matmul_output_mode is unsupported"
    if attributes(node, "softmax_precision"):
        yield "attention-softmax-precision", "softmax_precision is unsupported: leave it out"


def _attention_mask(node: NodeProto, values: Values) -> Broken:
    """A mask must be bool or have the dtype of the query. IAttention refuses a mask together with is_causal."""
    mask, query = input_name(node, 3), values.dtypes.get(input_name(node, 0), TensorProto.UNDEFINED)
    if not mask:
        return
    if (dtype := values.dtypes.get(mask, TensorProto.UNDEFINED)) not in {TensorProto.BOOL, query}:
        yield "attention-mask-dtype", f"mask must be BOOL or {dtype_name(query)} as Q is, not {dtype_name(dtype)}"
    if attribute(node, "is_causal", 0):
        yield "attention-causal-mask", "a mask and is_causal exclude each other"


def _attention_causal(node: NodeProto, values: Values) -> Broken:
    """TensorRT's causal mask is upper-left: with more keys than queries a row misses keys, without an error."""
    if not attribute(node, "is_causal", 0):
        return
    queries, keys = (values.length(input_name(node, index), 2) for index in (0, 1))
    if queries is None or queries != keys:
        yield "attention-causal-length", f"is_causal needs as many keys as queries, got {queries} queries, {keys} keys"


def _attention_folded(node: NodeProto, values: Values) -> Broken:
    """TensorRT has no kernel for one query head and one key/value head. It has one for more query heads, unfolded.

    Without a kernel it spells the attention out where it may, and else refuses to build.
    """
    query = input_name(node, 0)
    producer = values.producers.get(query)
    if producer is None or producer.op_type != "Reshape" or values.length(query, 1) != 1:
        return
    heads = values.length(input_name(producer, 0), 1)
    if isinstance(heads, int) and heads > 1:
        yield FOLDED, f"{heads} query heads are folded onto one key/value head: unfold them"


def _scatter_form(node: NodeProto, values: Values) -> Broken:
    """KVCacheUpdate writes linearly along axis -2 of a 4-D cache. operators.md requires the spelling -2."""
    if (axis := attribute(node, "axis", -2)) != -2:
        yield "kv-axis", f"axis must be spelled -2, it is {axis}"
    if (mode := attribute(node, "mode", b"linear")) != b"linear":
        yield "kv-mode", f"mode must be linear, it is {mode.decode()}"
    for index, port in enumerate(("past_cache", "update")):
        if (rank := values.rank(input_name(node, index))) != 4:
            yield "kv-rank", f"{port} must be 4-D, {input_name(node, index)} has rank {rank}"
    if values.rank(input_name(node, 0)) == 4 and not isinstance(length := values.length(input_name(node, 0), 2), int):
        yield "kv-length", f"the cache length (axis 2) must be static, it is {length}"


def _scatter_binding(node: NodeProto, values: Values) -> Broken:
    """Past and present share one address. The order of the write and of another reader of the past is undefined."""
    past, present = input_name(node, 0), node.output[0] if node.output else ""
    if past not in values.inputs:
        yield "kv-past", f"past_cache must be a network input, {past} is not"
    if present not in values.outputs:
        yield "kv-present", f"present_cache must be a network output, {present} is not"
    if (count := values.readers[past]) != 1:
        yield "kv-reader", f"past_cache is written in place and must have one reader, {past} has {count}"


def _rotary(node: NodeProto, values: Values) -> Broken:
    """TensorRT RotaryEmbedding takes only int64 positions. So does ONNX, but shape inference does not check it."""
    positions = input_name(node, 3)
    if positions and (dtype := values.dtypes.get(positions)) != TensorProto.INT64:
        yield "rotary-positions", f"position_ids must be INT64, {positions} is {dtype_name(dtype or 0)}"


def _cumsum(node: NodeProto, values: Values) -> Broken:
    """TensorRT CumSum takes only floats (see DTYPES) and needs a constant axis."""
    if input_name(node, 1) not in values.constants:
        yield "cumsum-axis", f"axis must be a constant, {input_name(node, 1)} is computed"


def _reduce(node: NodeProto, values: Values) -> Broken:
    """The axes of a reduce layer are a bit mask that is fixed at build time."""
    axes = input_name(node, 1)
    if axes and axes not in values.constants:
        yield "reduce-axes", f"axes must be an initializer, {axes} is computed"


def _unsqueeze(node: NodeProto, values: Values) -> Broken:
    """The rank of a tensor is fixed at build time, so the axes that change it must be constant."""
    axes = input_name(node, 1)
    if axes and axes not in values.constants:
        yield "axes-constant", f"axes must be a constant, {axes} is computed"


def _squeeze(node: NodeProto, values: Values) -> Broken:
    """The rule of Unsqueeze applies. Without axes, the parser must know every length to find those that are 1."""
    yield from _unsqueeze(node, values)
    shape = values.shapes.get(input_name(node, 0), (None,))
    if not input_name(node, 1) and not all(isinstance(dim, int) for dim in shape):
        yield "squeeze-dynamic", f"needs axes, for the shape of {input_name(node, 0)} is not static: {list(shape)}"


def _scatter_nd(node: NodeProto, _: Values) -> Broken:
    """TensorRT's scatter layer overwrites values; it cannot accumulate."""
    if (reduction := attribute(node, "reduction", b"none")) != b"none":
        yield "scatter-reduction", f"reduction must be none, it is {reduction.decode()}"


def _reshape(node: NodeProto, values: Values) -> Broken:
    """With allowzero a 0 is an empty axis, not a kept one. The parser takes it, but the exporter never intends it."""
    target = values.constants.get(input_name(node, 1))
    if attribute(node, "allowzero", 0) and (target is None or 0 in target):
        shown = "computed" if target is None else list(target)
        yield "reshape-zero", f"allowzero=1 needs a constant target without a 0, it is {shown}"


def _top_k(node: NodeProto, values: Values) -> Broken:
    """TensorRT's TopK layer returns sorted values and supports K below 3840."""
    if not attribute(node, "sorted", 1):
        yield "topk-sorted", "sorted must be 1"
    if (count := values.constants.get(input_name(node, 1))) and count[0] >= 3840:
        yield "topk-count", f"K must be below 3840, it is {count[0]}"


def _symmetric(node: NodeProto, values: Values) -> Broken:
    """TensorRT quantises symmetrically: a zero point is allowed, but must be 0."""
    if any(values.constants.get(input_name(node, 2)) or ()):
        yield "zero-point", f"the zero point must be 0, {input_name(node, 2)} is not"


def _blocked(node: NodeProto, values: Values) -> Broken:
    """A block must lie along one of the last two axes. The parser infers its size by a division without remainder."""
    codes, scales, size = input_name(node, 0), input_name(node, 1), attribute(node, "block_size", 0)
    shape, scale_shape = values.shapes.get(codes), values.shapes.get(scales)
    if values.dtypes.get(codes) == TensorProto.INT4 and codes not in values.constants.keys() | values.inputs:
        yield "int4-constant", f"4-bit integers are for weights alone, and {codes} is computed"
    if not size or shape is None:
        return
    axis = attribute(node, "axis", 1) % len(shape)
    if axis < len(shape) - 2:
        yield "block-axis", f"a block must lie along one of the last two axes, not axis {axis} of {len(shape)}"
    length = shape[axis]
    if not isinstance(length, int) or length % size or scale_shape != _with(shape, axis, length // size):
        yield (
            "block-scales",
            f"{list(shape)} is not divided into {scale_shape} scales by blocks of {size} on axis {axis}",
        )


def _with(shape: tuple[Dim, ...], axis: int, length: int) -> tuple[Dim, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


Rule = Callable[[NodeProto, Values], Broken]

RULES: dict[str, tuple[Rule, ...]] = {
    "Attention": (_attention_ports, _attention_attributes, _attention_mask, _attention_causal, _attention_folded),
    "TensorScatter": (_scatter_form, _scatter_binding),
    "RotaryEmbedding": (_rotary,),
    "CumSum": (_cumsum,),
    "Squeeze": (_squeeze,),
    "Unsqueeze": (_unsqueeze,),
    "ScatterND": (_scatter_nd,),
    "Reshape": (_reshape,),
    "TopK": (_top_k,),
    "QuantizeLinear": (_symmetric,),
    "DequantizeLinear": (_symmetric, _blocked),
    **{name: (_reduce,) for name in DTYPES if name.startswith("Reduce")},
}
"""Operator -> its rules beyond dtype."""
