"""What `quantize` and `convergence` print: a gain reads as a gain, and a score of nothing right is no evidence."""

from __future__ import annotations

import pytest

from cllm_export.cli.show.calibration import change, show_choice, show_convergence
from cllm_export.cli.show.console import OUT
from cllm_export.cli.show.training import show_evaluation

WIDE = 200


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cell is wrapped, whatever COLUMNS said when this process started."""
    monkeypatch.setattr(OUT, "_width", WIDE)


LOSSES = {
    "tpf_loss": -0.0292,
    "quality_loss": 0.6667,
    "quality_measure": "same_text",
    "agreement": 0.886,
    "perplexity_rise": 0.0397,
    "same_text": 0.3333,
}
CANDIDATE = {"scheme": "int8-dynamic", "refused": None, **LOSSES, "kept": [], "sensitivity": []}
CHOICE = {
    "max_tpf_loss": 0.03,
    "min_agreement": 0.92,
    "max_perplexity_rise": 0.05,
    "min_same_text": None,
    "max_quality_loss": 0.01,
    "chosen": "int8-dynamic",
    "candidates": [{**CANDIDATE, "trials": [{"num_kept": 0, **LOSSES, "measured_on": "bundle"}]}],
    "timings": None,
}


def evaluated(right: int):
    """A model in the report of `evaluate`, with this many right answers of two."""
    share = {"share": right / 2, "right": right, "of": 2}
    decoding = {"tokens_per_forward": 1.0, "iterations_per_block": 1.0, "fast_forwarded_per_block": 0.0, "forwards": 4}
    return {
        **{"path": "bundle", "decoded": 2, "prompts": 2, "skipped": {}, "general_perplexity": 7.81},
        "scores": {"all": {"exact_match": share}, "groups": {}, "notes": []},
        "decoding": {**decoding, "stationary_per_block": 0.0, "exact": {"equal": 2, "of": 2}}
        | {"finish_reasons": {}, "acceptance_histogram": {}},
    }


@pytest.mark.parametrize(("right", "doubt"), [((0, 0), " (no evidence: none is right)"), ((0, 1), "")])
def test_a_score_that_a_model_and_its_parent_have_nothing_of_is_no_evidence(capsys, right, doubt):
    compared = {"same_text": {"equal": 1, "of": 2}, "general_agreement": {"equal": 9, "of": 10, "share": 0.9}}
    models = dict(zip(("model", "parent"), map(evaluated, right), strict=True))
    show_evaluation({"settings": {"block_size": 4}, "task": "prompts", "models": models, "compared": compared})
    out = " ".join(capsys.readouterr().out.split())
    assert f"exact match{doubt} 0.0% (0 of 2)" in out
    assert "perplexity, general text 7.81 7.81" in out
    assert "same text: 1 of 2; same token predicted on general text: 90.0% of 10 tokens" in out


def test_a_single_model_has_the_score_that_it_has(capsys):
    show_evaluation(
        {"settings": {"block_size": 4}, "task": "prompts", "models": {"model": evaluated(0)}, "compared": None}
    )
    assert "no evidence" not in capsys.readouterr().out


def bundle(**changes):
    shares = {"exact_match": {"share": 0.0, "right": 0, "of": 3}}
    flips = {"all": {"rate": 0.1, "rows": 10, "lost": 1, "gained": 0}}
    agreement = {"equal": 886, "of": 1000, "share": 0.886}
    return {
        **{"path": "fp32", "weight_bytes": 10**6, "tokens_per_forward": 1.0, "scores": shares},
        **{"perplexity": 2.0, "general_perplexity": 7.81, "tpf_loss": -0.0292, "flips": flips},
        **dict.fromkeys(("agreement", "general_agreement", "prompts_agreement"), agreement),
        **{"exact_match": {"equal": 1, "of": 3, "share": 0.3333}, "first_divergence": None},
        **changes,
    }


@pytest.mark.parametrize(("share", "text"), [(0.0292, "+2.92%"), (-0.0292, "-2.92%"), (0.0, "none"), (1e-9, "none")])
def test_a_change_has_its_sign(share, text):
    assert change(share) == text


def test_a_choice_shows_every_measure_and_calls_no_gain_a_loss(capsys: pytest.CaptureFixture[str]):
    show_choice("out", CHOICE)
    out = " ".join(capsys.readouterr().out.split())
    assert "agreement at least 92.0%, perplexity risen within 5.0%, quality lost within 1.0%" in out
    assert "0 kept, bundle +2.92% 88.6% +3.97% 33.3% no evidence: no right answers" in out
    assert "wrote out: int8-dynamic, 0 layers kept, agreement 88.6%, change of tokens per forward +2.92%" in out
    assert "-2.92%" not in out and "0.00%" not in out


def test_a_choice_shows_a_score_that_is_evidence(capsys: pytest.CaptureFixture[str]):
    trial = {"num_kept": 0, **LOSSES, "measured_on": "bundle", "quality_loss": 0.1, "quality_measure": "exact_match"}
    show_choice("out", {**CHOICE, "candidates": [{**CANDIDATE, "trials": [trial]}]})
    assert "-10.00% (exact match)" in capsys.readouterr().out


def test_convergence_shows_agreement_perplexity_and_equal_texts(capsys: pytest.CaptureFixture[str]):
    report = {"prompts": 3, "settings": {"block_size": 4}, "baseline": bundle()}
    show_convergence(report | {"candidates": [bundle(path="int8", general_perplexity=8.12)]})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "same token, general text 88.6% of 1,000" in lines
    assert "perplexity, general text 7.81 8.12" in lines and "change +3.97%" in lines
    assert "same text 1 of 3" in lines
    assert "exact match (no evidence: none is right) 0.0% 0.0%" in lines
