"""GPTQ: what it is for, and that rows are rounded on their own."""

from __future__ import annotations

from typing import cast

import pytest

torch = pytest.importorskip("torch")

from cllm_export.bundle.scales import Scales  # noqa: E402 - after the skip
from cllm_export.errors import QuantizationError  # noqa: E402
from cllm_export.exporter.graph.groups import GroupRounding, restored  # noqa: E402
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


def gptq(rows: torch.Tensor, *, symmetric: bool = False) -> GptqRounding:
    factors = Factors(cast(Scales, OneInput(rows)))
    return GptqRounding(group_size=GROUP, symmetric=symmetric, tensor="layer", factors=factors)


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_halves_the_error_of_the_output(symmetric: bool):
    rows = correlated_rows()
    weight = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
    error = {
        type(rounding).__name__: float((rows @ (restored(rounding(weight.clone()), WIDTH) - weight).T).square().mean())
        for rounding in (GroupRounding(group_size=GROUP, symmetric=symmetric), gptq(rows, symmetric=symmetric))
    }
    assert error["GptqRounding"] < 0.5 * error["GroupRounding"], error


def test_rows_are_rounded_on_their_own():
    rounding = gptq(correlated_rows())
    weight = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2))
    whole, parts = rounding(weight.clone()), [rounding(weight[:4].clone()), rounding(weight[4:].clone())]
    # sums over fewer rows may be added in another order, and a code at the half between two go the other way
    apart = (restored(whole, WIDTH) - torch.cat([restored(part, WIDTH) for part in parts])).abs()
    assert (apart > 1e-5).float().mean() < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_correlation_it_is_round_to_nearest(symmetric: bool):
    rows = torch.eye(WIDTH)
    weight = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(3))
    nearest = GroupRounding(group_size=GROUP, symmetric=symmetric)(weight.clone())
    assert torch.equal(gptq(rows, symmetric=symmetric)(weight.clone()).codes, nearest.codes)


def test_a_weight_on_a_grid_stays_as_it_is():
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 16, (6, WIDTH), generator=generator)
    weight = codes * torch.tensor(0.0625) - 0.3125  # steps and minimum of few bits, as in a file
    assert torch.equal(restored(gptq(correlated_rows())(weight.clone()), WIDTH), weight)


def test_a_gram_matrix_without_an_inverse_is_refused_by_name():
    class Broken(OneInput):
        def gram(self, tensor: str):
            return -super().gram(tensor)

    factors = Factors(cast(Scales, Broken(correlated_rows())))
    with pytest.raises(QuantizationError, match="Gram matrix of the input of layer has no inverse"):
        factors.of("layer")
