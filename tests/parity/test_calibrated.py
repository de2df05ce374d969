"""Bundles of 4 bits and of static 8 bits: their arithmetic in PyTorch, losslessness, the lint, and refused scales."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402 - after the skip
from torch.nn import functional  # noqa: E402

from cllm_export.bundle.contract import Batch  # noqa: E402
from cllm_export.bundle.manifest import Bundle  # noqa: E402
from cllm_export.bundle.quantization import Engine  # noqa: E402
from cllm_export.bundle.scales import open_scales  # noqa: E402
from cllm_export.errors import OptionError, QuantizationError, ScalesError  # noqa: E402
from cllm_export.exporter.graph.groups import GroupRounding, restored  # noqa: E402
from cllm_export.exporter.graph.rounding import Rounding  # noqa: E402
from cllm_export.exporter.lint.rules import lint  # noqa: E402
from cllm_export.exporter.quantize import int4  # noqa: E402
from cllm_export.exporter.quantize.gptq import Factors, GptqRounding  # noqa: E402
from cllm_export.exporter.quantize.options import QuantizeOptions  # noqa: E402
from cllm_export.runtime.decoding.block_size.exact_sizes import compare_sizes  # noqa: E402
from cllm_export.runtime.engines.machine import processor_features  # noqa: E402
from cllm_export.runtime.engines.onnxruntime import OrtEngine  # noqa: E402
from cllm_export.runtime.load import load  # noqa: E402
from cllm_export.verification.engine_checks import EngineRun, check_rows_are_isolated  # noqa: E402
from tests.conftest import THREADS, Workshop  # noqa: E402
from tests.parity.compare import random_prompts, read_cache  # noqa: E402
from tests.parity.test_int8_dynamic import assert_lossless, differences, engine_logits  # noqa: E402
from tests.scales import observe_stock, save_scales  # noqa: E402

FAMILIES = ("llama", "qwen3", "gemma2", "phi3")
FEW_AND_SLOW_FAMILIES = [
    pytest.param(name, marks=() if name in ("llama", "phi3") else pytest.mark.slow) for name in FAMILIES
]
SCHEMES = ("int8", "int4", "fp8")
INT8, FLOAT8 = 127.0, 448.0

TYPICAL, LARGEST = 2e-5, 0.6
"""Median and largest difference of a logit from the same arithmetic in PyTorch, in standard deviations of the logits.

What differs in the last bit before an activation is rounded may move it by a step: 1 / 127 of the calibration's largest
for all rows alike, an eighth of itself in fp8, which its row's logits then carry. Most rows meet none.
"""

SIZES = (2, 3, 4, 5, 8, 12, 16)
"""Block sizes that are compared with one token."""

Layer = Callable[[Tensor, nn.Linear], Tensor]


class Shop:
    """Scales of each checkpoint of the workshop, made once."""

    def __init__(self, workshop: Workshop, directory: Path) -> None:
        self._workshop = workshop
        self._directory = directory
        self._made: dict[str, Path] = {}

    def scales(self, name: str) -> Path:
        if name not in self._made:
            stock, plain = self._workshop.stock(name), self._workshop.bundle(name)
            rows = observe_stock(stock, plain.manifest.geometry.vocab_size)
            known = set(stock.state_dict()) if not stock.config.tie_word_embeddings else set(rows) - {"lm_head.weight"}
            rows = {tensor: seen for tensor, seen in rows.items() if tensor in known}
            self._made[name] = save_scales(self._directory / f"{name}.scales", plain, rows, gram=True)
        return self._made[name]

    def options(self, name: str, scheme: Any) -> dict[str, Any]:
        scales = self.scales(name) if scheme != "int4" else None
        return {"quantize": QuantizeOptions(scheme=scheme, scales=scales)}

    def bundle(self, name: str, scheme: str) -> Bundle:
        return self._workshop.bundle(name, **self.options(name, scheme))


@pytest.fixture(scope="module")
def shop(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(workshop, tmp_path_factory.mktemp("scales"))


def expected_logits(checkpoint: Path, tokens: list[int], make: Callable[[nn.Module, str], Layer]) -> np.ndarray:
    """Logits [T, V] of the stock model whose linear layers but the head are replaced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.forward = partial(_swapped(make(model, name)), module)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


def _swapped(layer: Layer) -> Callable[[nn.Linear, Tensor], Tensor]:
    return lambda module, rows: layer(rows, module)


def four_bit_layer(engine: Engine, scales: Path | None) -> Callable[[nn.Module, str], Layer]:
    """Weights as the rounding of an engine's form restores them; activations as they are."""
    symmetric = engine == "tensorrt"
    factors = Factors(open_scales(scales)) if scales else None

    def make(_: nn.Module, name: str) -> Layer:
        rounding: Rounding = GroupRounding(group_size=32, symmetric=symmetric)
        if factors:
            rounding = GptqRounding(group_size=32, symmetric=symmetric, tensor=f"{name}.weight", factors=factors)

        def run(rows: Tensor, layer: nn.Linear) -> Tensor:
            weight = restored(rounding(layer.weight.detach().clone()), layer.weight.shape[1])
            return functional.linear(rows, weight, layer.bias)

        return run

    return make


def static_layer(path: Path, *, largest: float) -> Callable[[nn.Module, str], Layer]:
    """Weights and activations rounded to integers, or to 8-bit floats, with the scales of a calibration."""
    scales = open_scales(path)

    def rounded(values: Tensor, step: Tensor) -> Tensor:
        scaled = (values / step).nan_to_num()
        if largest == FLOAT8:
            return scaled.clamp(-FLOAT8, FLOAT8).to(torch.float8_e4m3fn).float() * step
        return scaled.round().clamp(-128, INT8) * step

    def make(model: nn.Module, name: str) -> Layer:
        amax = torch.from_numpy(scales.of(f"{name}.weight").amax.copy())
        factors = torch.ones_like(amax)
        siblings = [group for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if is_in(name, group)]
        if largest == INT8 and (siblings or is_in(name, ("qkv_proj", "gate_up_proj"))):
            parent = name.rsplit(".", 1)[0]
            names = [f"{parent}.{each}" for each in siblings[0]] if siblings else [name]
            weight = torch.stack([model.get_submodule(each).weight.abs().amax(0) for each in names]).amax(0)
            factors = (amax / weight).sqrt()

        def run(rows: Tensor, layer: nn.Linear) -> Tensor:
            weight = layer.weight * factors
            step = (amax / factors).max() / largest
            w_step = weight.abs().amax(1, keepdim=True) / largest
            return functional.linear(rounded(rows / factors, step), rounded(weight, w_step), layer.bias)

        return run

    return make


def is_in(name: str, projections: tuple[str, ...]) -> bool:
    return name.rsplit(".", 1)[1] in projections


def test_static_layers_give_the_same_bits_through_a_devices_buffers(shop: Shop):
    """One graph, written with Q/DQ, through one kind of session: equality is required, of logits and of KV."""
    bundle, outcomes = shop.bundle("llama", "int8"), []
    for copies in (False, True):
        engine = OrtEngine(bundle, num_slots=2, threads=THREADS, copies=copies)
        first, second = random_prompts(engine.geometry.vocab_size, [20, 20], seed=4)
        engine.prefill(Batch([first, second], [20, 20], [0, 0]))
        forward = engine.forward(Batch([second, first], [1, 3], [20, 18]), with_logits=True)
        assert forward.logits is not None
        rows = [array.tobytes() for array in read_cache(engine).values()]
        outcomes.append([forward.next_ids, forward.num_accepted, forward.logits.tobytes(), *rows])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", FEW_AND_SLOW_FAMILIES)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_static_layers_round_with_the_scales_of_the_calibration(workshop: Workshop, shop: Shop, name: str, scheme: str):
    tokens = random_prompts(280, [20], seed=3)[0]
    layer = static_layer(shop.scales(name), largest=INT8 if scheme == "int8" else FLOAT8)
    expected = expected_logits(workshop.checkpoint(name), tokens, layer)
    apart = differences(engine_logits(shop.bundle(name, scheme), tokens), expected)
    assert np.median(apart) < TYPICAL and apart.max() < LARGEST, (np.median(apart), apart.max())
    plain = differences(engine_logits(workshop.bundle(name), tokens), expected)
    assert np.median(plain) > 100 * TYPICAL, "nothing was quantised, or the tolerance sees nothing"


@pytest.mark.parametrize(
    ("name", "engine", "method"),
    [
        ("llama", "onnxruntime", "round to nearest"),
        ("phi3", "onnxruntime", "round to nearest"),
        ("small", "onnxruntime", "GPTQ"),
        ("small", "tensorrt", "round to nearest"),
        ("small", "tensorrt", "GPTQ"),
    ],
)
def test_four_bit_weights_are_those_meant(
    workshop: Workshop, shop: Shop, name: str, engine: Engine, method: str, monkeypatch: pytest.MonkeyPatch
):
    """With fp32 activations, so that what is compared is the weights alone."""
    monkeypatch.setattr(int4, "INT8_ACTIVATIONS", 1)
    scales = shop.scales(name) if method == "GPTQ" else None
    options = QuantizeOptions(scheme="int4", scales=scales, engine=engine)
    bundle = workshop.build(workshop.checkpoint(name), quantize=options)
    tokens = random_prompts(280, [20], seed=3)[0]
    expected = expected_logits(workshop.checkpoint(name), tokens, four_bit_layer(engine, scales))
    assert differences(engine_logits(bundle, tokens), expected).max() < 1e-3, "the sums are fp32's, in another order"
    record = bundle.manifest.quantization
    assert record is not None and (record.method, record.engines) == (method, (engine,))


@pytest.mark.skipif(
    not any(name.startswith("avx512") for name in processor_features()),
    reason="with AVX2 alone ONNX Runtime has another 4-bit kernel for one row",
)
@pytest.mark.parametrize("name", ["llama", "llama-linear-bias-mqa"])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_int4_are_those_of_one_token_whatever_the_block_size(workshop: Workshop, name: str, threads: int):
    """With the head in 8 bits. At every size for which it holds in fp32."""
    bundle = workshop.bundle(name, quantize=QuantizeOptions(scheme="int4", head=True))
    engine = OrtEngine(bundle, num_slots=1, threads=threads)
    ours = compare_sizes(engine, SIZES)
    engine.close()
    plain = OrtEngine(workshop.bundle(name), num_slots=1, threads=threads)
    assert set(ours.equal) >= set(compare_sizes(plain, SIZES).equal) and ours.equal
    plain.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FEW_AND_SLOW_FAMILIES)
def test_jacobi_decoding_is_lossless_and_rows_stay_apart(workshop: Workshop, shop: Shop, name: str, scheme: str):
    model = workshop.model(name, **shop.options(name, scheme))
    assert_lossless(model, random_prompts(280, (1, 40)), max_new_tokens=24, ignore_eos=True)
    assert check_rows_are_isolated(shop.bundle(name, scheme), EngineRun("cpu", THREADS)).passed


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_static_graph_is_clean_by_tensorrts_rules(shop: Shop, scheme: str):
    bundle = shop.bundle("llama", scheme)
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.engines == ("onnxruntime", "tensorrt")
    assert lint(onnx.load(bundle.graph_path(), load_external_data=False)) == []


def test_int4_with_scales_is_gptq_and_says_so(workshop: Workshop, shop: Shop):
    options = QuantizeOptions(scheme="int4", group_size=32, scales=shop.scales("llama"))
    record = workshop.bundle("llama", quantize=options).manifest.quantization
    assert record is not None
    assert (record.method, record.group_size) == ("GPTQ", 32)
    assert record.scales_sha256 is not None


def test_tensorrts_form_of_int4_is_lossless_and_clean_by_its_rules(workshop: Workshop):
    options = {"quantize": QuantizeOptions(scheme="int4", engine="tensorrt")}
    bundle = workshop.bundle("small", **options)
    model = onnx.load(bundle.graph_path(), load_external_data=False)
    fused = workshop.bundle("small", quantize=QuantizeOptions(scheme="int4"))
    assert bundle.weight_bytes < fused.weight_bytes, "4-bit integers do not share bytes"
    blocks = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert blocks and {node.domain for node in model.graph.node} == {""}
    assert lint(model) == []
    assert_lossless(
        workshop.model("small", **options), random_prompts(280, (1, 40)), max_new_tokens=24, ignore_eos=True
    )
    assert check_rows_are_isolated(bundle, EngineRun("cpu", THREADS)).passed


NO_WORSE = 1.5
"""Times the fp32 form's distance from the unquantised model. fp16 moves activations across 8-bit steps here and there,
each of which the logits of its row carry, so the two forms differ as two roundings of one model do."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_quantised_can_be_computed_in_half_precision(workshop: Workshop, shop: Shop, scheme: str):
    scales = shop.scales("llama") if scheme != "int4" else None
    options = QuantizeOptions(scheme=scheme, scales=scales, engine="tensorrt" if scheme == "int4" else None)  # type: ignore[arg-type]
    half, full = (workshop.bundle("llama", quantize=options, precision=dtype) for dtype in ("fp16", "fp32"))
    graph = onnx.load(half.graph_path(), load_external_data=False)
    assert lint(graph) == []
    floats = {value.type.tensor_type.elem_type for value in graph.graph.value_info} & {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
    }
    assert floats == {onnx.TensorProto.FLOAT16}, "TensorRT's types are those of the graph"
    assert half.manifest.precision == "fp16" and half.manifest.quantization is not None
    tokens = random_prompts(280, [20], seed=5)[0]
    plain = engine_logits(workshop.bundle("llama"), tokens)
    halves, fulls = engine_logits(half, tokens), engine_logits(full, tokens)
    assert differences(halves, fulls).max() > 0, "nothing was computed in half precision"
    assert np.median(differences(halves, plain)) < NO_WORSE * np.median(differences(fulls, plain))
    assert_lossless(load(half.path, threads=THREADS), random_prompts(280, (1, 40)), max_new_tokens=16, ignore_eos=True)


def test_half_precision_is_refused_where_onnx_runtime_computes_in_single(workshop: Workshop):
    for scheme in ("int8-dynamic", "int4"):
        with pytest.raises(OptionError, match="computes in fp32, got fp16: leave precision out"):
            workshop.build(workshop.checkpoint("small"), quantize=QuantizeOptions(scheme=scheme), precision="fp16")


def test_a_layer_is_kept_by_its_checkpoint_name(workshop: Workshop):
    tensor = "model.layers.0.mlp.down_proj.weight"
    bundle = workshop.build(workshop.checkpoint("small"), quantize=QuantizeOptions(scheme="int4", keep=(tensor,)))
    record = bundle.manifest.quantization
    assert record is not None and record.kept[f"{tensor}.T"] == "kept as asked"
    with pytest.raises(OptionError, match="keep='nothing' names no linear layer"):
        workshop.build(workshop.checkpoint("small"), quantize=QuantizeOptions(scheme="int4", keep=("nothing",)))


def test_scales_that_do_not_fit_are_refused_by_name(workshop: Workshop, shop: Shop, tmp_path: Path):
    with pytest.raises(ScalesError, match=r"another checkpoint|no statistics of|channels for"):
        workshop.build(
            workshop.checkpoint("qwen3"), quantize=QuantizeOptions(scheme="int8", scales=shop.scales("llama"))
        )
    plain, stock = workshop.bundle("small"), workshop.stock("small")
    rows = {name: seen for name, seen in observe_stock(stock, 280).items() if name != "lm_head.weight"}
    without = save_scales(tmp_path / "without-gram", plain, rows)
    with pytest.raises(ScalesError, match="has no Gram matrix"):
        workshop.build(workshop.checkpoint("small"), quantize=QuantizeOptions(scheme="int4", scales=without))
    rows["model.layers.0.mlp.down_proj.weight"] = np.zeros_like(rows["model.layers.0.mlp.down_proj.weight"])
    silent = save_scales(tmp_path / "silent", plain, rows)
    with pytest.raises(QuantizationError, match="0 in every row of the calibration"):
        workshop.build(workshop.checkpoint("small"), quantize=QuantizeOptions(scheme="int8", scales=silent))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scheme": "int8"}, "needs scales"),
        ({"scheme": "int8-dynamic", "scales": Path("scales")}, "takes no scales"),
        ({"scheme": "int8-dynamic", "group_size": 32}, "group_size is for int4"),
        ({"scheme": "int4", "group_size": 48}, "must be 32 for ONNX Runtime"),
        ({"scheme": "int3"}, "scheme must be one of"),
        ({"scheme": "int8-dynamic", "engine": "tensorrt"}, "int8-dynamic is for ONNX Runtime alone"),
        ({"scheme": "int8", "scales": Path("scales"), "engine": "tensorrt"}, "int8 is one graph for both engines"),
        ({"scheme": "fp8", "scales": Path("scales"), "engine": "onnxruntime"}, "fp8 is one graph for both engines"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(OptionError, match=reason):
        QuantizeOptions(**options)
