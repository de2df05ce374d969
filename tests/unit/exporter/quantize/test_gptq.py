"""GPTQ: what it is for, and that rows are rounded on their own."""

from __future__ import annotations

from typing import cast

import pytest

torch = pytest.importorskip("torch")

from cllm_export.bundle.scales import Scales  # noqa: E402 - after the skip
from cllm_export.errors import QuantizationError  # noqa: E402
from cllm_export.exporter.graph.rounding import INT4_ZERO, GroupRounding, Rounded  # noqa: E402
from cllm_export.exporter.quantize.gptq import Factors, GptqRounding  # noqa: E402

WIDTH, GROUP = 72, 32


class OneInput:
    """Scales of a single input."""

    name = "layer"

    def __init__(self, rows: torch.Tensor) -> None:
        self._gram = (rows.T @ rows).numpy()

    def of(self, tensor: str) -> OneInput:
        return self

    def gram(self, tensor: str):
        return self._gram


def correlated_rows(seed: int = 0) -> torch.Tensor:
    """Activations of which some channels nearly repeat others, as those of a trained model do."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(400, 12, generator=generator)
    rows = few @ torch.randn(12, WIDTH, generator=generator) + 0.1 * torch.randn(400, WIDTH, generator=generator)
    rows[:, 5] = 0  # a channel that was never used
    return rows


def gptq(rows: torch.Tensor) -> GptqRounding:
    return GptqRounding(group_size=GROUP, tensor="layer", factors=Factors(cast(Scales, OneInput(rows))))


def restored(rounded: Rounded) -> torch.Tensor:
    """The matrix [out, in] that codes and scales stand for."""
    codes = torch.stack([rounded.codes & 15, rounded.codes >> 4], dim=-1).flatten(-2).float() - INT4_ZERO
    return (codes * rounded.scales[..., None]).flatten(1)[:, :WIDTH]


def test_it_halves_the_error_of_the_output():
    rows = correlated_rows()
    weight = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
    error = {
        type(rounding).__name__: float((rows @ (restored(rounding(weight.clone())) - weight).T).square().mean())
        for rounding in (GroupRounding(group_size=GROUP), gptq(rows))
    }
    assert error["GptqRounding"] < 0.5 * error["GroupRounding"], error


def test_rows_are_rounded_on_their_own():
    rounding = gptq(correlated_rows())
    weight = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2))
    whole, parts = rounding(weight.clone()), [rounding(weight[:4].clone()), rounding(weight[4:].clone())]
    # sums over fewer rows may be added in another order, and a code at the half between two go the other way
    apart = (restored(whole) - torch.cat([restored(part) for part in parts])).abs()
    assert (apart > 1e-5).float().mean() < 0.02


def test_without_correlation_it_is_round_to_nearest():
    rows = torch.eye(WIDTH)
    weight = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))
    assert torch.equal(gptq(rows)(weight.clone()).codes, GroupRounding(group_size=GROUP)(weight.clone()).codes)


def test_a_gram_matrix_without_an_inverse_is_refused_by_name():
    class Broken(OneInput):
        def gram(self, tensor: str):
            return -super().gram(tensor)

    factors = Factors(cast(Scales, Broken(correlated_rows())))
    with pytest.raises(QuantizationError, match="Gram matrix of the input of layer has no inverse"):
        factors.of("layer")
