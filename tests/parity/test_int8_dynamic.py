"""int8-dynamic bundles: their arithmetic, rows that stay apart, and Jacobi decoding that stays lossless."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402 - after the skip
from torch.nn import functional  # noqa: E402

from cllm_export.bundle.contract import Batch  # noqa: E402
from cllm_export.bundle.inspect import describe  # noqa: E402
from cllm_export.bundle.manifest import WEIGHTS_NAME, Bundle  # noqa: E402
from cllm_export.bundle.quantization import Agreement  # noqa: E402
from cllm_export.errors import OptionError, QuantizationError  # noqa: E402
from cllm_export.exporter.checkpoint.read import open_checkpoint  # noqa: E402
from cllm_export.exporter.graph.rounding import ChannelRounding, PairRounding  # noqa: E402
from cllm_export.exporter.options import BuildOptions  # noqa: E402
from cllm_export.exporter.parity import smoke  # noqa: E402
from cllm_export.exporter.parity.layer_parity import LayeredGraph  # noqa: E402
from cllm_export.exporter.parity.smoke import measure_agreement  # noqa: E402
from cllm_export.exporter.pipeline import build, export  # noqa: E402
from cllm_export.exporter.quantize import int8_dynamic  # noqa: E402
from cllm_export.exporter.quantize.options import QuantizeOptions  # noqa: E402
from cllm_export.prompts import read_prompts  # noqa: E402
from cllm_export.runtime.decoding.request import METHODS  # noqa: E402
from cllm_export.runtime.engines.onnxruntime import OrtEngine  # noqa: E402
from cllm_export.runtime.load import load  # noqa: E402
from cllm_export.runtime.model import Model  # noqa: E402
from cllm_export.runtime.teacher_forced import ForcedText, read_texts  # noqa: E402
from cllm_export.verification.engine_checks import EngineRun, check_rows_are_isolated  # noqa: E402
from cllm_export.verification.report import VerifyOptions  # noqa: E402
from cllm_export.verification.verify import verify  # noqa: E402
from tests.checkpoints import VARIANTS, edit_weights, make_checkpoint  # noqa: E402
from tests.conftest import DEMO, THREADS, Workshop  # noqa: E402
from tests.parity.compare import random_prompts  # noqa: E402

DYNAMIC = QuantizeOptions(scheme="int8-dynamic")
INT8 = {"quantize": DYNAMIC}
INT4 = QuantizeOptions(scheme="int4")
INT8_HEAD = {"quantize": QuantizeOptions(scheme="int8-dynamic", head=True)}
FAMILIES = ("llama", "llama-linear-bias-mqa", "qwen3", "gemma2", "phi3")
NUM_NEW_TOKENS = 24
MIN_SHARE_OF_TPF = 0.97

TYPICAL, LARGEST = 5e-4, 5e-3
"""Median and largest difference of a logit from the same arithmetic in PyTorch, in standard deviations of the logits.

Integer products are exact on both sides. What differs in the last bit before an activation is rounded may move it by
one step, 1 / 7,938 of its row's largest, which a row of logits then carries. A value of 14 bits lies that near to the
middle of two steps once in 2,000. The unquantised model is 0.01 away in the median.
"""


def int8_linear(rows: Tensor, layer: nn.Linear) -> Tensor:
    """What an 8-bit layer computes: scales from each row and each output channel, exact sums of integers between.

    Rows are rounded to steps of 1 / 63 of their largest, and what is left to steps of 1 / 126 of a step. Weights are
    divided in fp32, as they are when a bundle is built: of bf16 weights many are half of their channel's largest to the
    bit, and lie between two integers.
    """
    weight, rows = layer.weight, rows.double()
    w_scale = weight.abs().amax(1, keepdim=True) / 127
    step = rows.abs().amax(-1, keepdim=True) / 63
    scaled = torch.nan_to_num(rows / step)
    fine = torch.round(scaled) + torch.round((scaled - torch.round(scaled)) * 126) / 126
    codes = torch.round(torch.nan_to_num(weight / w_scale)).double()
    product = functional.linear(fine, codes) * step * w_scale[:, 0].double()
    return (product if layer.bias is None else product + layer.bias.double()).float()


def stock_logits(checkpoint: Path, tokens: list[int], *, quantized: bool, head: bool = False) -> np.ndarray:
    """Logits [T, V] of the stock model, with 8-bit layers in the place of its own or as it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    for name, module in model.named_modules():
        if quantized and isinstance(module, nn.Linear) and (head or name != "lm_head"):
            module.forward = lambda rows, layer=module: int8_linear(rows, layer)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


def engine_logits(bundle: Bundle, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of one forward over the whole text."""
    forward = OrtEngine(bundle, num_slots=1, threads=THREADS).forward(Batch([tokens], [1], [0]), with_logits=True)
    assert forward.logits is not None
    return forward.logits[0].copy()


def differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a - b) / b.std(axis=-1, keepdims=True)


def assert_lossless(model: Model, prompts: list[Any], **options: Any) -> list[Any]:
    """Both Jacobi loops give the autoregressive tokens of the same engine and shape; the generations."""
    made = []
    for prompt in prompts:
        expected = model.generate(prompt, method="autoregressive", **options)
        for method in METHODS[:2]:
            actual = model.generate(prompt, method=method, **options)
            assert actual.token_ids == expected.token_ids, f"{method} differs"
            made.append(actual)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_the_arithmetic_is_that_of_integers_with_a_scale_for_each_row_and_channel(workshop: Workshop, name: str):
    tokens = random_prompts(280, [20], seed=3)[0]
    checkpoint = workshop.checkpoint(name)
    ours = engine_logits(workshop.bundle(name, **INT8), tokens)
    apart = differences(ours, stock_logits(checkpoint, tokens, quantized=True))
    assert np.median(apart) < TYPICAL and apart.max() < LARGEST, (np.median(apart), apart.max())
    plain = differences(ours, stock_logits(checkpoint, tokens, quantized=False))
    assert np.median(plain) > 10 * TYPICAL, "nothing was quantised, or the tolerance sees nothing"


@pytest.mark.parametrize(("rounding", "largest"), [(PairRounding(), 255), (ChannelRounding(), 127)])
@pytest.mark.parametrize("rows", [1, 3, 16, 33])
@pytest.mark.parametrize("width", [4, 190, 1024])
def test_no_processor_saturates_a_product_of_the_largest_activations(
    rows: int, width: int, rounding: Any, largest: int
):
    """What ONNX Runtime's kernel of this machine gives is the integer product, with every activation at its largest.

    Without VNNI this fails for weights of 8 bits beside activations of 8; where there is VNNI nothing can saturate.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    generator = torch.Generator().manual_seed(width)
    weights = torch.randn(48, width, generator=generator).abs() + 1  # all of one sign: sums grow as far as they can
    codes = rounding(weights).codes.numpy().T.copy()
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", width])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 48])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(codes, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    activations = np.full((rows, width), largest, np.uint8)
    (found,) = session.run(None, {"x": activations})
    assert np.array_equal(found, activations.astype(np.int32) @ codes.astype(np.int32))


@pytest.mark.parametrize("name", ["llama", "phi3"], ids=["tied", "untied"])
def test_the_head_is_quantised_where_that_is_asked_for(workshop: Workshop, name: str):
    tokens = random_prompts(280, [20], seed=4)[0]
    bundle = workshop.bundle(name, **INT8_HEAD)
    apart = differences(
        engine_logits(bundle, tokens), stock_logits(workshop.checkpoint(name), tokens, quantized=True, head=True)
    )
    assert np.median(apart) < TYPICAL and apart.max() < LARGEST
    record = bundle.manifest.quantization
    assert record is not None and not any("head" in reason for reason in record.kept.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_jacobi_decoding_is_lossless_and_rows_stay_apart(workshop: Workshop, name: str):
    model = workshop.model(name, **INT8)
    prompts = random_prompts(280, (1, 9, 40, 130))
    assert_lossless(model, prompts, max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    assert check_rows_are_isolated(workshop.bundle(name, **INT8), EngineRun("cpu", THREADS)).passed


def test_a_scale_that_rows_share_is_found_out(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    def of_the_whole_tensor(rows: Any, constants: Any) -> list[Any]:
        """As DynamicQuantizeLinear does, but once for each row."""
        nodes = of_each_row(rows, constants)
        largest = nodes[-1].outputs[0]
        shared = ir.node("ReduceMax", [largest, constants.add_constant([0, 1, 2])], {"keepdims": 1})
        return [*nodes, shared, ir.node("Max", [largest, shared.outputs[0]])]

    of_each_row = int8_dynamic._largest
    monkeypatch.setattr(int8_dynamic, "_largest", of_the_whole_tensor)
    check = check_rows_are_isolated(workshop.build(workshop.checkpoint("small"), **INT8), EngineRun("cpu", THREADS))
    assert check.passed is False


def test_verify_requires_losslessness_and_reports_the_distance(workshop: Workshop, tmp_path: Path):
    bundle = workshop.copy(workshop.bundle("small", **INT8), tmp_path / "bundle")
    options = VerifyOptions(max_new_tokens=8, threads=THREADS)
    parity = verify(bundle, checkpoint=workshop.checkpoint("small"), options=options)
    checks = {check.name: check for check in parity.checks}
    assert parity.passed and parity.conditions["quantization"] == "int8-dynamic"
    assert checks["against the PyTorch checkpoint"].passed is None
    assert "prompts equal" in checks["against the PyTorch checkpoint"].detail
    assert checks["rows see each other only through attention"].passed
    layers = verify(bundle, checkpoint=workshop.checkpoint("small"), options=replace(options, by_layer=True)).checks
    by_layer = next(check for check in layers if check.name.startswith("layer by layer"))
    assert by_layer.passed is None and by_layer.data["parts"]


def test_every_weight_is_listed_as_quantised_or_kept_for_a_reason(workshop: Workshop):
    bundle, plain = workshop.bundle("llama", **INT8), workshop.bundle("llama")
    record = bundle.manifest.quantization
    assert record is not None
    assert record.kept["model.embed_tokens.weight"] == "embedding, head: kept unless asked for"
    assert record.kept["model.layers.0.input_layernorm.weight"] == "norm"
    assert "model.layers.1.mlp.down_proj.weight.T" in record.weights
    import onnx

    graph = onnx.load(plain.graph_path(), load_external_data=False).graph
    named = {tensor.name for tensor in graph.initializer if tensor.name.startswith("model.")}
    assert set(record.weights) | set(record.kept) == named
    assert describe(bundle)["quantization"]["scheme"] == "int8-dynamic"
    assert describe(plain)["quantization"] is None


def test_zero_weights_and_zero_rows_give_zeros(workshop: Workshop, tmp_path: Path):
    from safetensors.torch import load_file

    checkpoint = make_checkpoint(tmp_path / "zeros", replace(VARIANTS["llama"], num_layers=1))
    tensors = load_file(checkpoint / "model.safetensors")
    down, table = tensors["model.layers.0.mlp.down_proj.weight"], tensors["model.embed_tokens.weight"]
    down[5], table[7] = 0, 0  # a channel without a scale, and a token whose every activation is 0
    edit_weights(checkpoint, **{"model.layers.0.mlp.down_proj.weight": down, "model.embed_tokens.weight": table})
    tokens = [7, 7, 3, 9, 7]
    ours = engine_logits(workshop.build(checkpoint, **INT8), tokens)
    assert np.isfinite(ours).all()
    assert differences(ours[2:], stock_logits(checkpoint, tokens, quantized=True)[2:]).max() < LARGEST


def test_a_bundle_that_does_not_compute_its_model_is_not_left_behind(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The count of greedy tokens finds it as well, with other words: these are the layer's."""
    monkeypatch.setattr(int8_dynamic, "ChannelRounding", lambda: PairRounding(scale_factor=127))
    with pytest.raises(QuantizationError, match=r"does not compute its model any more: layer 0 is off by \S+ of its"):
        build(
            workshop.checkpoint("small"),
            tmp_path / "bundle",
            BuildOptions(quantize=QuantizeOptions(scheme="int8-dynamic")),
        )
    assert not list(tmp_path.iterdir())


def test_a_layer_too_large_is_found_where_no_token_differs(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    """The norm before the head takes a factor out again: the agreement of tokens sees nothing of it."""
    bundle, checkpoint = workshop.bundle("small", **INT8), open_checkpoint(workshop.checkpoint("small"))
    sound, layer = measure_agreement(bundle, checkpoint, None, least=0.5, threads=THREADS), LayeredGraph.layer
    monkeypatch.setattr(LayeredGraph, "layer", lambda *arguments: 3 * layer(*arguments))
    with pytest.raises(QuantizationError, match=r"layer 0 is off by 2(\.\d)? of its output"):
        measure_agreement(bundle, checkpoint, None, least=0.5, threads=THREADS)
    monkeypatch.setattr(smoke, "MAX_DISTANCE", 10)
    assert measure_agreement(bundle, checkpoint, None, least=0.5, threads=THREADS) == sound


def test_a_bundle_records_the_agreement_that_its_build_measured(workshop: Workshop, tmp_path: Path):
    """The reference runs whole in stock transformers here, and the bundle in its engine."""
    checkpoint, said = workshop.checkpoint("small"), list[str]()
    built = export(checkpoint, tmp_path / "bundle", BuildOptions(quantize=DYNAMIC), say=said.append)
    record = built.bundle.manifest.quantization
    assert record is not None and record.agreement is not None
    tokens = smoke.general_tokens(built.bundle, record.agreement.of)
    [ours] = read_texts(OrtEngine(built.bundle, num_slots=1, threads=THREADS), [ForcedText((*tokens, 0))], 0)
    theirs = stock_logits(checkpoint, tokens, quantized=False).argmax(axis=-1).tolist()
    equal = sum(first == second for first, second in zip(ours.predicted, theirs, strict=True))
    assert record.agreement == Agreement(equal=equal, of=len(tokens)) and 0.5 < record.agreement.share < 1
    assert built.report.agreement == record.agreement.to_dict()
    assert sum(f"predicts the model's own token for {record.agreement} tokens of general" in line for line in said) == 1
    assert describe(built.bundle)["quantization"]["agreement"] == vars(record.agreement)


def test_a_build_whose_agreement_is_below_the_floor_is_refused(workshop: Workshop, tmp_path: Path):
    found = r"predicts the model's own token for only \d+\.\d% of \d+ tokens of general text, and at least 100% are"
    options = BuildOptions(quantize=replace(DYNAMIC, min_agreement=1.0))
    with pytest.raises(QuantizationError, match=found) as refused:
        build(workshop.checkpoint("small"), tmp_path / "bundle", options)
    assert "keep='TENSOR'" in str(refused.value) and "min_agreement" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_build_warns_of_a_bundle_that_agrees_too_little(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """That is so for a tiny random model, whose margins are small. It knows no text, which is said instead."""
    found = {}
    for known in (100.0, 1e9):
        monkeypatch.setattr(smoke, "KNOWN_PERPLEXITY", known)
        said = list[str]()
        options = BuildOptions(quantize=INT4)
        export(workshop.checkpoint("small"), tmp_path / "bundle", options, force=True, say=said.append)
        found[known] = [
            line.partition(". ")[0].partition(" (")[0] for line in said if "agree" in line and "your" in line
        ]
    assert found == {
        100.0: ["the model does not know general text"],
        1e9: ["warning: fewer than 92% of the tokens agree"],
    }


def test_a_bundle_that_agrees_gets_no_warning():
    assert smoke.doubt(Agreement(equal=92, of=100), 9.0) is None
    assert "fewer than 92%" in (smoke.doubt(Agreement(equal=91, of=100), 9.0) or "")
    assert "does not know general text" in (smoke.doubt(Agreement(equal=91, of=100), 3420.0) or "")


def test_linking_is_refused_by_name(workshop: Workshop):
    with pytest.raises(OptionError, match="scheme='int8-dynamic', which stores them rounded"):
        workshop.build(workshop.checkpoint("small"), weights="link", **INT8)


def test_an_adapter_is_merged_before_rounding(workshop: Workshop, tmp_path: Path):
    pytest.importorskip("peft")
    from tests.parity.test_adapter import save_adapter

    base = workshop.checkpoint("small")
    merged = save_adapter(tmp_path / "adapter", base)
    whole = Path(shutil.copytree(base, tmp_path / "merged"))
    edit_weights(whole, **{name: tensor for name, tensor in merged.items() if ".layers." in name})
    ours = np.frombuffer(workshop.build(tmp_path / "adapter", **INT8).file(WEIGHTS_NAME).read_bytes(), np.uint8)
    expected = np.frombuffer(workshop.build(whole, **INT8).file(WEIGHTS_NAME).read_bytes(), np.uint8)
    # the product of the adapter's matrices may differ in a last bit, which moves a code only at the half between two
    assert ours.shape == expected.shape
    assert np.mean(ours != expected) < 0.01


@pytest.mark.slow
def test_the_demo_keeps_its_tokens_per_forward(workshop: Workshop):
    prompts = [prompt.content for prompt in read_prompts(DEMO / "prompts.jsonl")[:40]]

    def tokens_per_forward(model: Model) -> float:
        generations = [generation.statistics for generation in assert_lossless(model, prompts, max_new_tokens=128)]
        return sum(each.new_tokens for each in generations) / sum(each.forwards for each in generations)

    plain = tokens_per_forward(load(workshop.bundle("demo").path, threads=THREADS))
    quantized = tokens_per_forward(load(workshop.bundle("demo", **INT8).path, threads=THREADS))
    assert quantized >= MIN_SHARE_OF_TPF * plain, (quantized, plain)
