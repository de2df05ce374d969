"""The lint's rules of Attention, held to the real parser and builder: what each does with a graph that breaks the rule.

A rule is needed most where the library says nothing. Where it refuses, its own words are the control. The graphs are
those of the lint's mutations, with numbers for their axes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from onnx.shape_inference import infer_shapes

from cllm_export.tensorrt.build_plan import allow_decomposing
from cllm_export.tensorrt.library import TENSORRT_RTX, Log, import_library
from cllm_export.tensorrt.plan_contents import PlanContents, read_contents
from tests.tensorrt.rtx.plans import require_library
from tests.unit.exporter.lint.test_rule_mutations import MUTATIONS, PAST, QKV, Case

LENGTHS = {"B": "1", "n": "16", "S": "256", "P": "8"}
NO_KERNEL = "Attention operation was not supported by a dedicated kernel"
REFUSED_BY_PARSER = {
    "attention-outputs": "TensorRT only supports Attention nodes with one output",
    "attention-softcap": "Setting softcap is not supported in TensorRT Attention",
    "attention-softmax-precision": "Setting softmax precision is not supported in TensorRT Attention",
    "attention-causal-mask": "Option mask cannot be used together with",
}
REFUSED_BY_BUILDER = {
    "attention-mask-dtype": r"element type \(half\) differs from input 1's element type \(float\)",
    "attention-subgraph": "Called with unknown input tensor",
    "attention-folded": NO_KERNEL,
}
TAKEN_IN_SILENCE = ("attention-inputs", "attention-causal-length", "attention-qk-output", "attention-rank")
"""The first two then compute other numbers. The last two do no harm here: other versions refuse them."""
SOUND, UNFOLDED = MUTATIONS["attention-rank"][0], MUTATIONS["attention-folded"][0]


@dataclass
class Outcome:
    """What the library made of a graph."""

    errors: str
    """What the parser says. Empty if it takes the graph."""
    said: str
    """Warnings and errors of the parser and the builder."""
    attention: Any = None
    """The first attention of the network."""
    contents: PlanContents | None = None
    """Of the plan. None if it was not built."""


def build(case: Case, *, decomposable: bool = False) -> Outcome:
    """Parse a graph and build a plan of it for SM89."""
    trt = import_library(TENSORRT_RTX)
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(infer_shapes(fixed(case).model()).SerializeToString()):
        errors = " ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        return Outcome(errors=errors, said=log.explain(""))
    outcome = Outcome(errors="", said="", attention=attention_of(network, trt))
    if decomposable:
        allow_decomposing(network, trt)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    if builder.build_serialized_network(network, config) is not None:
        outcome.contents = read_contents(log.report, kv_length=1)
        assert outcome.contents is not None
    outcome.said = log.explain("")
    return outcome


def fixed(case: Case) -> Case:
    """The graph with a number for each axis that has a name."""
    shapes = re.compile(r"\[([^]]*)\]")
    inputs = shapes.sub(
        lambda match: f"[{','.join(LENGTHS.get(axis, axis) for axis in match[1].split(','))}]", case.inputs
    )
    return case._replace(inputs=inputs)


def attention_of(network: Any, trt: Any) -> Any:
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            kinds = trt.CausalMaskKind
            return {
                "causal": "upper left" if layer.attention.causal_kind == kinds.UPPER_LEFT else "other",
                "lengths": layer.attention.key_value_lengths is not None,
            }
    return None


@pytest.fixture(scope="module", autouse=True)
def _version() -> None:
    require_library()


def test_every_rule_of_attention_has_a_control():
    controls = [*REFUSED_BY_PARSER, *REFUSED_BY_BUILDER, *TAKEN_IN_SILENCE]
    assert sorted(controls) == sorted(rule for rule in MUTATIONS if rule.startswith("attention-"))


@pytest.mark.parametrize("rule", [rule for rule in MUTATIONS if rule.startswith("attention-")])
def test_a_graph_that_the_lint_passes_is_parsed_and_built(rule: str):
    outcome = build(MUTATIONS[rule][0])
    assert not outcome.errors
    assert outcome.contents is not None, outcome.said


@pytest.mark.parametrize("rule", REFUSED_BY_PARSER)
def test_the_parser_refuses_it_in_words(rule: str):
    assert REFUSED_BY_PARSER[rule] in build(MUTATIONS[rule][1]).errors


@pytest.mark.parametrize("rule", REFUSED_BY_BUILDER)
def test_the_parser_takes_it_and_the_builder_refuses_it(rule: str):
    outcome = build(MUTATIONS[rule][1])
    assert not outcome.errors
    assert outcome.contents is None
    assert re.search(REFUSED_BY_BUILDER[rule], outcome.said)


@pytest.mark.parametrize("rule", TAKEN_IN_SILENCE)
def test_it_is_built_without_a_word_on_attention(rule: str):
    outcome = build(MUTATIONS[rule][1])
    assert outcome.contents is not None
    assert "Attention" not in outcome.said


def test_the_number_of_valid_rows_is_ignored():
    """The seventh input of the operator. The plan reads rows that hold nothing, and nobody reads the input."""
    broken = MUTATIONS["attention-inputs"][1]
    assert "length" in broken.nodes
    outcome = build(broken)
    assert outcome.attention is not None
    assert not outcome.attention["lengths"]
    assert "Unused Input: length" in outcome.said
    assert outcome.contents == build(Case(QKV, "y = Attention(q, k, v)")).contents


def test_a_past_inside_attention_is_refused_in_words():
    outcome = build(Case(f"{QKV}, {PAST}", "y = Attention(q, k, v, , past_key, past_value)"))
    assert "Setting past_key for the Attention node is not supported" in outcome.errors


def test_is_causal_is_aligned_to_the_upper_left():
    """By the operator's rule it is the lower right that counts: row 0 of 16 sees 241 of 256 keys, and here one."""
    sound, broken = (build(case).attention for case in MUTATIONS["attention-causal-length"])
    assert sound["causal"] == broken["causal"] == "upper left"


def test_folded_groups_lose_their_kernel_and_unfolded_ones_have_it():
    folded = build(MUTATIONS["attention-folded"][1], decomposable=True)
    unfolded = build(UNFOLDED, decomposable=True)
    assert folded.contents is not None
    assert unfolded.contents is not None
    assert folded.contents.profiles[0].attention == {}
    assert sum(unfolded.contents.profiles[0].attention.values()) == 1


def test_fp32_has_no_kernel_and_is_built_because_it_may_be_decomposed():
    fp32 = SOUND._replace(inputs=SOUND.inputs.replace("float16", "float"))
    refused, built = build(fp32), build(fp32, decomposable=True)
    assert refused.contents is None
    assert NO_KERNEL in refused.said
    assert built.contents is not None
    assert built.contents.profiles[0].attention == {}
