"""Which layers are kept: none where the budget holds, else the fewest of the worst, and never on a promise alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.calibration.linear_inputs import LinearLayer
from cllm_export.calibration.search.fit import Budget, fit
from cllm_export.calibration.search.flips import Flips
from cllm_export.calibration.search.measured import Losses, Quality
from cllm_export.calibration.search.sensitivity import LayerSensitivity
from cllm_export.checks import parse_share
from cllm_export.errors import CalibrationError, OptionError
from tests.fakes import properties

NUM_LAYERS = 12


def sensitivity(number):
    name = f"layer.{number}"
    layer = LinearLayer(weight=f"{name}.T", tensors=(name,), rows="x", transposed=False, shape=(4, 4))
    return LayerSensitivity(layer=layer, flips=Flips(), tpf_loss=0)


def losses(**measured):
    """The losses of a bundle that loses nothing else."""
    nothing = Losses(tpf=0, quality=Quality(0, "exact_match"), agreement=1, perplexity=0, same_text=1)
    return replace(nothing, **measured)


class Ranking:
    """Layers that cost a known share each, of tokens per forward and ``quality`` times that of quality; a stand-in may
    promise less than a bundle loses."""

    def __init__(self, costs, promise=1.0, quality=0.0):
        self.costs, self.promise, self.quality, self.num_ranked = costs, promise, quality, 0
        self.ranked = [sensitivity(number) for number in range(len(costs))]
        self.layers = [entry.layer for entry in self.ranked]

    def rank(self):
        self.num_ranked += 1
        return self.ranked

    def losses(self, keep):
        return self.losses_of(keep, self.promise)

    def losses_of(self, keep, promise=1.0):
        loss = promise * self.true_loss(keep)
        return losses(tpf=loss, quality=Quality(self.quality * loss, "exact_match"))

    def true_loss(self, keep):
        return sum(cost for cost, entry in zip(self.costs, self.ranked, strict=True) if entry.layer.name not in keep)


def run(ranking, budget, *, quality=None, **options):
    """A bundle is the set of tensors it keeps."""
    built = []

    def build(keep):
        built.append(keep)
        return keep

    return fit(
        ranking, build, ranking.losses_of, Budget(max_tpf_loss=budget, max_quality_loss=quality), **options
    ), built


def test_nothing_is_kept_or_ranked_where_the_budget_holds():
    ranking = Ranking([0.001] * NUM_LAYERS)
    chosen, built = run(ranking, 0.03)
    assert chosen.kept == () and built == [()] and ranking.num_ranked == 0
    assert chosen.losses.tpf == pytest.approx(0.012)


def test_layers_are_ranked_all_the_same_where_a_report_of_them_is_asked_for():
    chosen, _ = run(Ranking([0.001] * NUM_LAYERS), 0.03, always_rank=True)
    assert chosen.kept == () and len(chosen.ranking) == NUM_LAYERS


@properties
@given(
    costs=st.lists(st.floats(0.001, 0.1), min_size=2, max_size=NUM_LAYERS).map(lambda costs: sorted(costs)[::-1]),
    budget=st.floats(0.02, 0.3),
)
def test_the_fewest_of_the_worst_are_kept(costs, budget):
    ranking = Ranking(costs)
    if costs[-1] > budget:  # not even one layer fits
        with pytest.raises(CalibrationError):
            run(ranking, budget)
        return
    chosen, built = run(ranking, budget)
    count = len(chosen.kept)
    assert list(chosen.kept) == ranking.ranked[:count]
    assert ranking.true_loss(chosen.bundle) <= budget
    assert chosen.bundle == built[-1]
    if count:
        assert ranking.true_loss([entry.layer.name for entry in ranking.ranked[: count - 1]]) > budget


def test_more_are_kept_where_a_bundle_loses_more_than_its_stand_in():
    ranking = Ranking([0.02] * NUM_LAYERS, promise=0.2)
    chosen, built = run(ranking, 0.03)
    assert ranking.true_loss(chosen.bundle) <= 0.03
    assert [len(keep) for keep in built] == [0, 5, 10, 11]
    assert [trial.measured_on for trial in chosen.trials].count("bundle") == len(built)


def test_layers_are_kept_for_quality_where_tokens_per_forward_hold_without():
    ranking = Ranking([0.004] * NUM_LAYERS, quality=0.5)
    assert run(ranking, 0.05)[0].kept == ()
    chosen, _ = run(ranking, 0.05, quality=0.01)
    assert len(chosen.kept) == 7 and chosen.losses.quality.loss <= 0.01
    with pytest.raises(
        CalibrationError,
        match=r"the loss of quality within 0\.0%: the least was 0\.2%; allow more with max_quality_loss,",
    ):
        run(ranking, 0.05, quality=0.0001)


@pytest.mark.parametrize(
    ("limit", "measured"),
    [
        ({}, {"agreement": 0.5}),
        ({"min_agreement": 1.0}, {"agreement": 0.99}),
        ({}, {"perplexity": 0.3}),
        ({"max_perplexity_rise": 0.01}, {"perplexity": 0.02}),
        ({"min_same_text": 0.9}, {"same_text": 0.8}),
        ({"max_quality_loss": 0.01}, {"quality": Quality(0.02, "exact_match")}),
    ],
)
def test_each_measure_is_in_the_budget(limit, measured):
    """Agreement and perplexity are so by default: they need no answers, and a parent without right ones has them."""
    assert Budget(**limit).holds(losses())
    assert not Budget(**limit).holds(losses(**measured))


def test_a_gain_holds_every_budget():
    gain = losses(tpf=-0.0292, perplexity=-0.1, quality=Quality(-0.5, "exact_match"))
    assert Budget(max_tpf_loss=0, max_perplexity_rise=0, max_quality_loss=0).holds(gain)


@pytest.mark.parametrize(
    "shares",
    [{"max_tpf_loss": 1.0}, {"max_tpf_loss": -0.1}, {"max_quality_loss": float("nan")}, {"min_agreement": 1.01}],
)
def test_a_budget_that_is_no_share_is_refused(shares):
    with pytest.raises(OptionError, match=r"must be from 0% to (below )?100%"):
        Budget(**shares)


def test_a_budget_that_nothing_holds_is_refused_with_the_least_loss():
    with pytest.raises(
        CalibrationError,
        match=r"the loss of tokens per forward within 1\.0%: the least was 5\.0%; allow more with max_tpf_loss,",
    ):
        run(Ranking([0.05] * NUM_LAYERS), 0.01)


def test_the_report_says_which_layers_were_kept():
    chosen, _ = run(Ranking([0.05, 0.01, 0.01]), 0.03)
    report = chosen.to_dict()
    assert [entry["layer"] for entry in report["kept"]] == ["layer.0"]
    assert report["tpf_loss"] == pytest.approx(0.02) and len(report["sensitivity"]) == 3


@pytest.mark.parametrize(("text", "share"), [("3%", 0.03), ("0.03", 0.03), ("0", 0), ("12.5%", 0.125)])
def test_a_share_is_a_number_or_a_percentage(text, share):
    assert parse_share(text, name="max_tpf_loss") == pytest.approx(share)


def test_what_must_be_kept_may_be_all():
    assert parse_share("100%", name="min_agreement") == 1


@pytest.mark.parametrize("text", ["three", "3%%", "-1%", "100%", "1.5", "nan"])
def test_another_share_is_refused(text):
    with pytest.raises(OptionError, match="max_tpf_loss must be"):
        parse_share(text, name="max_tpf_loss")
