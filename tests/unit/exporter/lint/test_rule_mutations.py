"""The check of the lint: for each rule a sound graph and one change of it, which that rule finds and no other does.

A rule without an entry here fails, and so does an entry that another rule answers. So no graph that TensorRT would
refuse, or compute wrongly, passes because a rule fell silent.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from onnx import ModelProto

from cllm_export.exporter.lint import rules as rules_module
from cllm_export.exporter.lint import values as values_module
from cllm_export.exporter.lint.rules import lint
from tests.unit.exporter.lint.test_lint import CACHE, SCATTER, graph

RULE = re.compile(r'(?:yield |\[\(|yield \w+, |FOLDED = |yield \(\s*)"([a-z0-9]+(?:-[a-z0-9]+)*)"')
QKV = "float16[B,4,n,64] q, float16[B,2,S,64] k, float16[B,2,S,64] v"
MASK = f"{QKV}, bool[B,1,n,S] mask"
PAST = "float16[B,2,P,64] past_key, float16[B,2,P,64] past_value"


class Case(NamedTuple):
    """A graph as ONNX text: inputs, nodes, constants and outputs."""

    inputs: str
    nodes: str
    constants: str = ""
    outputs: str = "y"
    opset: int = 24

    def model(self) -> ModelProto:
        return graph(self.inputs, self.outputs, self.nodes, constants=self.constants, opset=self.opset)


SOUND = Case(MASK, "y = Attention(q, k, v, mask)")
MULTI_QUERY = Case(
    "float16[B,4,n,64] q, float16[B,1,S,64] k, float16[B,1,S,64] v, bool[B,1,n,S] mask", "y = Attention(q, k, v, mask)"
)
FOLD = (
    "rows = Reshape(q, folded) repeated = Concat<axis = 2>(mask, mask, mask, mask) "
    "result = Attention(rows, k, v, repeated) y = Reshape(result, heads)"
)
SQUARE = Case(QKV.replace("S", "n"), "y = Attention<is_causal = 1>(q, k, v)")
BRANCH = "y = If(c) <then_branch = yes () => (t) {{ {} }}, else_branch = no () => (e) {{ e = Exp(q) }}>"
WRITE = Case(CACHE, SCATTER, outputs="present")
UNARY = Case("float[n] x", "y = Exp(x)")
DEQUANTIZE = "y = DequantizeLinear<axis: int = {}, block_size: int = 32>(x, scale)"

MUTATIONS: dict[str, tuple[Case, Case]] = {
    "opset": (UNARY, UNARY._replace(opset=25)),
    "shape-inference": (
        Case("float[2,3] a, float[3,5] b", "y = MatMul(a, b)"),
        Case("float[2,3] a, float[4,5] b", "y = MatMul(a, b)"),
    ),
    "float64": (UNARY, Case("float[n] x", "d = Cast<to = 11>(x) y = Cast<to = 1>(d)")),
    "domain": (UNARY, UNARY._replace(nodes="y = com.microsoft.QuickGelu(x)")),
    "operator": (UNARY, UNARY._replace(nodes="y = Swish(x)")),
    "dtype": (UNARY, UNARY._replace(nodes="y = Cast<to = 3>(x)")),
    "attention-rank": (SOUND, SOUND._replace(inputs=MASK.replace("bool[B,1,n,S]", "bool[n,S]"))),
    "attention-inputs": (
        SOUND,
        SOUND._replace(inputs=f"{QKV}, int64[B] length", nodes="y = Attention(q, k, v, , , , length)"),
    ),
    "attention-outputs": (SOUND, SOUND._replace(nodes="y, , , scores = Attention(q, k, v, mask)")),
    "attention-softcap": (SOUND, SOUND._replace(nodes="y = Attention<softcap = 30.0>(q, k, v, mask)")),
    "attention-qk-output": (SOUND, SOUND._replace(nodes="y = Attention<qk_matmul_output_mode = 1>(q, k, v, mask)")),
    "attention-softmax-precision": (
        SOUND,
        SOUND._replace(nodes="y = Attention<softmax_precision = 1>(q, k, v, mask)"),
    ),
    "attention-mask-dtype": (SOUND, SOUND._replace(inputs=MASK.replace("bool", "float"))),
    "attention-causal-mask": (
        SQUARE,
        SQUARE._replace(
            inputs=f"{SQUARE.inputs}, bool[B,1,n,n] mask", nodes="y = Attention<is_causal = 1>(q, k, v, mask)"
        ),
    ),
    "attention-causal-length": (SQUARE, SQUARE._replace(inputs=QKV)),
    "attention-folded": (
        MULTI_QUERY,
        MULTI_QUERY._replace(nodes=FOLD, constants="int64[4] folded = {0,1,-1,64}, int64[4] heads = {0,4,-1,64}"),
    ),
    "attention-subgraph": (
        Case(f"bool c, {QKV}", BRANCH.format("t = Sigmoid(q)")),
        Case(f"bool c, {QKV}", BRANCH.format("t = Attention(q, k, v)")),
    ),
    "kv-axis": (WRITE, WRITE._replace(nodes=SCATTER.replace("-2", "2"))),
    "kv-mode": (WRITE, WRITE._replace(nodes=SCATTER.replace("linear", "circular"))),
    "kv-rank": (WRITE, WRITE._replace(inputs="float[B,16,8] past, float[B,n,8] update, int64[B] index")),
    "kv-length": (WRITE, WRITE._replace(inputs=CACHE.replace("16", "C"))),
    "kv-past": (WRITE, Case(CACHE.replace("past", "x"), f"past = Exp(x) {SCATTER}", outputs="present")),
    "kv-present": (WRITE, WRITE._replace(nodes=f"{SCATTER} y = Exp(present)", outputs="y")),
    "kv-reader": (WRITE, WRITE._replace(nodes=f"{SCATTER} y = Exp(past)", outputs="present, y")),
    "rotary-positions": (
        Case(
            "float[B,2,n,8] x, float[16,4] cos, float[16,4] sin, int64[B,n] at", "y = RotaryEmbedding(x, cos, sin, at)"
        ),
        Case(
            "float[B,2,n,8] x, float[16,4] cos, float[16,4] sin, int32[B,n] at", "y = RotaryEmbedding(x, cos, sin, at)"
        ),
    ),
    "cumsum-axis": (
        Case("float[n] x", "y = CumSum(x, axis)", "int64 axis = {0}"),
        Case("float[n] x, int64 axis", "y = CumSum(x, axis)"),
    ),
    "reduce-axes": (
        Case("float[n,m] x", "y = ReduceMin(x, axes)", "int64[1] axes = {1}"),
        Case("float[n,m] x, int64[1] axes", "y = ReduceMin(x, axes)"),
    ),
    "axes-constant": (
        Case("float[1,n] x", "y = Unsqueeze(x, axes)", "int64[1] axes = {0}"),
        Case("float[1,n] x, int64[1] axes", "y = Unsqueeze(x, axes)"),
    ),
    "squeeze-dynamic": (Case("float[1,4] x", "y = Squeeze(x)"), Case("float[1,n] x", "y = Squeeze(x)")),
    "scatter-reduction": (
        Case("float[n] x, int64[m,1] at, float[m] u", "y = ScatterND(x, at, u)"),
        Case("float[n] x, int64[m,1] at, float[m] u", "y = ScatterND<reduction = 'add'>(x, at, u)"),
    ),
    "reshape-zero": (
        Case("float[n,m] x", "y = Reshape(x, to)", "int64[2] to = {0,4}"),
        Case("float[n,m] x", "y = Reshape<allowzero = 1>(x, to)", "int64[2] to = {0,4}"),
    ),
    "topk-sorted": (
        Case("float[n] x", "y, i = TopK(x, k)", "int64[1] k = {8}", "y, i"),
        Case("float[n] x", "y, i = TopK<sorted = 0>(x, k)", "int64[1] k = {8}", "y, i"),
    ),
    "topk-count": (
        Case("float[n] x", "y, i = TopK(x, k)", "int64[1] k = {3839}", "y, i"),
        Case("float[n] x", "y, i = TopK(x, k)", "int64[1] k = {3840}", "y, i"),
    ),
    "zero-point": (
        Case("int8[n] x", "y = DequantizeLinear(x, scale, zero)", "float scale = {0.5}, int8 zero = {0}"),
        Case("int8[n] x", "y = DequantizeLinear(x, scale, zero)", "float scale = {0.5}, int8 zero = {3}"),
    ),
    "int4-constant": (
        Case("int4[64,6] x, float[2,6] scale", DEQUANTIZE.format(0)),
        Case(
            "float[n] x, int4 zero",
            "codes = QuantizeLinear(x, scale, zero) y = DequantizeLinear(codes, scale, zero)",
            "float scale = {0.5}",
        ),
    ),
    "block-axis": (
        Case("int4[64,6] x, float[2,6] scale", DEQUANTIZE.format(0)),
        Case("int4[64,6,8] x, float[2,6,8] scale", DEQUANTIZE.format(0)),
    ),
    "block-scales": (
        Case("int4[64,6] x, float[2,6] scale", DEQUANTIZE.format(0)),
        Case("int4[64,6] x, float[4,6] scale", DEQUANTIZE.format(0)),
    ),
}


def test_every_rule_has_a_mutation():
    sources = (Path(str(module.__file__)).read_text(encoding="utf-8") for module in (rules_module, values_module))
    assert {name for source in sources for name in RULE.findall(source)} == set(MUTATIONS)


@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_mutation_is_found_by_its_own_rule_and_no_other(rule: str):
    sound, broken = (case.model() for case in MUTATIONS[rule])
    assert lint(sound) == []
    assert {finding.rule for finding in lint(broken)} == {rule}
    assert lint(broken, waived={rule}) == []
