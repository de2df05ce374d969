"""The table of schemes: it agrees with the bundle's plain data, and a stand-in rounds as independent formulas do."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from cllm_export.bundle.contract import PRECISIONS  # noqa: E402 - after the skip
from cllm_export.bundle.quantization import (  # noqa: E402
    ENGINES,
    SCHEME_NAMES,
    SCHEME_SPECS,
    Engine,
    builds_for,
)
from cllm_export.errors import OptionError  # noqa: E402
from cllm_export.exporter.graph.groups import restored  # noqa: E402
from cllm_export.exporter.graph.rounding import PairRounding  # noqa: E402
from cllm_export.exporter.lint.rules import DTYPES  # noqa: E402
from cllm_export.exporter.quantize.options import LayerOptions, QuantizeOptions, quantize_options  # noqa: E402
from cllm_export.exporter.quantize.scheme import FakeInput, FakeLayer  # noqa: E402
from cllm_export.exporter.quantize.schemes import SCHEMES  # noqa: E402

FEW_ROUNDINGS = 1e-6
"""Relative: a scale may differ in its last bit."""


class Constants:
    """A graph that only names its constants."""

    def add_scalar(self, name: str, number: object) -> ir.Value:
        return ir.Value(name=name)

    def add_constant(self, values: list[int]) -> ir.Value:
        return ir.Value(name="axes")

    def add_values(self, name: str, values: object) -> ir.Value:
        return ir.Value(name=name)


def weights() -> np.ndarray:
    """[9, 70] of many magnitudes, with a channel of zeros."""
    matrix = np.random.default_rng(0).standard_normal((9, 70)).astype(np.float32) ** 3
    matrix[3] = 0
    return matrix


def fake(scheme: str, matrix: np.ndarray, amax: np.ndarray | None = None, engine: Engine | None = None) -> FakeLayer:
    given = FakeInput(
        constants=Constants(),
        name="fake.layer",
        rows=ir.Value(name="rows"),
        weight=torch.from_numpy(matrix),
        group_size=next(iter(SCHEME_SPECS[scheme].forms[0].group_sizes), None),
        engine=engine,
        amax=None if amax is None else torch.from_numpy(amax),
    )
    return SCHEMES[scheme].fake(given)


def test_the_exporter_and_the_bundle_know_the_same_schemes():
    assert tuple(SCHEMES) == tuple(SCHEME_SPECS) == SCHEME_NAMES
    assert all(SCHEMES[name].name == name == SCHEME_SPECS[name].name for name in SCHEME_NAMES)


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_a_scheme_and_its_plain_data_agree(name: str):
    scheme, spec = SCHEMES[name], SCHEME_SPECS[name]
    forms = [engine for form in spec.forms for engine in form.engines]
    assert forms and len(set(forms)) == len(forms) and set(forms) <= set(ENGINES)
    assert all(set(form.compute) <= set(PRECISIONS) for form in spec.forms)
    assert not scheme.reads_gram or spec.takes("scales")
    assert bool(scheme.unjudged) == any("tensorrt" not in form.engines for form in spec.forms)
    assert 0 < scheme.min_agreement < 1


def test_only_operators_that_tensorrt_does_not_take_so_are_left_out_of_the_lint():
    left_out = {operator for scheme in SCHEMES.values() for operator in scheme.unjudged}
    assert left_out - set(DTYPES) == {"MatMulInteger", "MatMulNBits"}


def test_advice_for_an_engine_names_every_scheme_that_has_a_graph_for_it():
    assert builds_for("tensorrt") == "precision='int8', precision='int4' with engine='tensorrt' or precision='fp8'"


def test_a_group_size_is_settled_only_where_weights_have_groups():
    assert QuantizeOptions(scheme="int4").settled_group_size == 32
    assert QuantizeOptions(scheme="int4", engine="tensorrt", group_size=128).settled_group_size == 128
    assert QuantizeOptions(scheme="int8-dynamic").settled_group_size is None


def test_a_group_size_whose_kernels_depend_on_the_number_of_rows_is_refused():
    """ONNX Runtime's kernels for groups of 64 and 128 give the only row of a forward other bits."""
    with pytest.raises(OptionError, match="group_size must be 32 for ONNX Runtime, got 64") as refused:
        QuantizeOptions(scheme="int4", group_size=64)
    assert refused.value.fields == ("group_size",)
    with pytest.raises(OptionError, match="group_size must be one of 32, 64, 128 for TensorRT, got 48"):
        QuantizeOptions(scheme="int4", engine="tensorrt", group_size=48)


def test_options_of_quantisation_need_a_scheme():
    assert quantize_options(None, LayerOptions()) is None
    with pytest.raises(OptionError, match="group_size needs a precision that quantises") as refused:
        quantize_options(None, LayerOptions(group_size=32))
    assert refused.value.fields == ("group_size", "precision")


def test_8_bit_weights_leave_room_for_a_pair_beside_activations_of_8_bits():
    matrix = weights()
    fours = np.sort(np.abs(np.pad(matrix, ((0, 0), (0, 2)))).reshape(9, -1, 4), axis=-1)
    pairs = fours[..., -2:].sum(axis=-1).max(axis=1)
    scales = np.maximum(np.abs(matrix).max(axis=1) / 127, pairs / (128 * (1 - 2.0**-12)))[:, None]
    scales[scales == 0] = 1
    expected = np.round(matrix / scales) * scales
    found = restored(PairRounding()(torch.from_numpy(matrix.copy())), matrix.shape[1])
    assert np.allclose(found.numpy(), expected, rtol=FEW_ROUNDINGS, atol=0)


def test_8_bit_weights_of_int8_dynamic_take_the_whole_range_beside_activations_of_7_bits():
    matrix = weights()
    scales = np.abs(matrix).max(axis=1, keepdims=True) / 127
    scales[scales == 0] = 1
    expected = np.round(matrix / scales) * scales
    assert np.allclose(fake("int8-dynamic", matrix).weight.numpy(), expected, rtol=FEW_ROUNDINGS, atol=0)


def test_8_bit_floats_have_three_bits_behind_the_first():
    """An exponent below -6 has fewer of them (arXiv 2209.05433)."""
    matrix = weights()
    scales = np.abs(matrix).max(axis=1, keepdims=True) / 448
    scales[scales == 0] = 1
    _, exponents = np.frexp(matrix / scales)
    steps = np.exp2(np.maximum(exponents - 1, -6) - 3)
    expected = np.round(matrix / scales / steps) * steps * scales
    assert np.array_equal(fake("fp8", matrix, np.ones(70, np.float32)).weight.numpy(), expected.astype(np.float32))


def test_static_8_bit_weights_take_over_half_of_the_range_of_their_channel():
    """On a scale of powers (arXiv 2211.10438), and none where the channel was never used."""
    matrix, amax = weights(), np.linspace(0, 5, 70, dtype=np.float32)
    largest = np.abs(matrix).max(axis=0)
    factors = np.where(amax > 0, np.sqrt(amax) / np.sqrt(largest), 1)
    scales = np.abs(matrix * factors).max(axis=1, keepdims=True) / 127
    scales[scales == 0] = 1
    expected = np.round(matrix * factors / scales) * scales
    assert np.allclose(fake("int8", matrix, amax).weight.numpy(), expected, rtol=10 * FEW_ROUNDINGS, atol=0)


def test_4_bit_weights_for_tensorrt_take_the_step_of_least_error_in_each_group():
    matrix = weights()
    groups = np.pad(matrix, ((0, 0), (0, 26))).reshape(9, 3, 32)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    tried = []
    for steps in (7.0, 7.5, 8.0, 8.5):
        scales = np.where(largest > 0, largest / np.float32(steps), 1)
        tried.append(np.clip(np.round(groups / scales), -8, 7) * scales)
    errors = np.stack([np.square(each - groups).sum(axis=-1) for each in tried])
    expected = np.take_along_axis(np.stack(tried), errors.argmin(axis=0)[None, ..., None], axis=0)[0]
    found = fake("int4", matrix, engine="tensorrt")
    assert np.allclose(found.weight.numpy(), expected.reshape(9, -1)[:, :70], rtol=FEW_ROUNDINGS, atol=0)
    assert found.nodes == []


def test_4_bit_weights_take_the_straight_line_of_least_error_in_each_group():
    """Through the points (code, value), for codes of five widths."""
    matrix, found = weights(), fake("int4", weights())
    for row, group in [(row, group) for row in range(9) for group in (slice(0, 32), slice(32, 64), slice(64, 70))]:
        values, restored = matrix[row, group].astype(float), found.weight[row, group].numpy()
        if np.ptp(values) == 0:
            assert np.array_equal(restored, matrix[row, group])
            continue
        assert np.square(restored - values).sum() <= min(map(partial(line_error, values), SHARES)) * 1.0001
    assert found.nodes == []


SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of the range of a group's values, over which codes are spread."""


def line_error(values: np.ndarray, share: float) -> float:
    """The squared error of the best line for codes that are spread over a share of the range."""
    middle, step = (values.max() + values.min()) / 2, np.ptp(values) * share / 15
    codes = np.clip(np.round((values - middle) / step - 0.5), -8, 7)
    return float(np.square(np.polyval(np.polyfit(codes, values, 1), codes) - values).sum())


@pytest.mark.parametrize("name", [name for name in SCHEME_NAMES if name != "int4"])
def test_rows_are_rounded_by_the_operators_of_a_bundle(name: str):
    nodes = fake(name, weights(), np.ones(70, np.float32)).nodes
    operators = [node.op_type for node in nodes]
    restoring = "Cast" if name == "int8-dynamic" else "DequantizeLinear"
    assert operators.count("QuantizeLinear") == 1
    assert restoring in operators
    assert nodes[0].inputs[0] is not None and nodes[0].inputs[0].name == "rows"


def test_only_schemes_whose_activations_have_eight_bits_by_row_are_rotated():
    """Scales of a calibration are of activations that were not rotated."""
    assert [name for name, spec in SCHEME_SPECS.items() if spec.rotates] == ["int8-dynamic"]
    assert all(spec.scales == "refused" for spec in SCHEME_SPECS.values() if spec.rotates)
    with pytest.raises(OptionError, match="rotate is for int8-dynamic, got it with int4: leave it out"):
        QuantizeOptions(scheme="int4", rotate=True)


def test_a_rotation_needs_a_precision_that_quantises():
    with pytest.raises(OptionError, match=r"rotate needs a precision that quantises: int8-dynamic$"):
        quantize_options(None, LayerOptions(rotate=True))
