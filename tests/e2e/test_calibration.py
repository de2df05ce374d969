"""From a checkpoint and prompts to a quantised bundle within a budget, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cllm_export.bundle.manifest import open_bundle
from cllm_export.bundle.scales import open_scales
from cllm_export.extras import install_line
from tests.conftest import Workshop
from tests.e2e.conftest import Cli, assert_refused, run_process
from tests.e2e.test_missing_extras import without

FEW = ("--max-new-tokens", 6, "--threads", 1)
LOOSE = ("--max-tpf-loss", "60%", "--min-agreement", "10%", "--max-perplexity-rise", "50%")
"""A budget for tiny random models, whose margins are small."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": f"select name {number} from city", "answer": "where"} for number in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Path:
    return workshop.bundle("small").path


def test_calibrate_writes_scales_and_says_what_it_saw(cli: Cli, bundle: Path, prompts: Path, tmp_path: Path):
    scales = tmp_path / "scales"
    arguments = ("calibrate", bundle, "--prompts", prompts, "-o", scales, "--rows", 256, *FEW)
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "30 prompts, 0 skipped; 256 rows: clean 128 (50%)" in done.out
    assert_refused(cli(*arguments), "exists; replace it with --force")
    again = cli(*arguments, "--force", "--json")
    assert again.code == 0
    written = json.loads(again.out)
    assert written["rows"] == open_scales(scales).provenance.rows and written["prompts"] == 30


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (("--mix", 1.5), "--mix must be a number from 0 to 1, got 1.5"),
        (("--rows", 0), "--rows must be an integer of at least 1"),
        (("--limit", 3), "too few prompts: 3 of 3"),
        (("--block-size", 9999), "--block-size must be at most"),
    ],
)
def test_options_out_of_range_are_refused(cli: Cli, bundle: Path, prompts: Path, tmp_path: Path, options, phrase):
    outcome = cli("calibrate", bundle, "--prompts", prompts, "-o", tmp_path / "scales", *options, *FEW)
    assert_refused(outcome, phrase)
    assert not (tmp_path / "scales").exists()


def test_a_bundle_has_lost_nothing_against_itself(cli: Cli, bundle: Path, prompts: Path, tmp_path: Path):
    report = tmp_path / "report.json"
    arguments = ("--against", bundle, "--prompts", prompts, "--limit", 5, "--output", report, *FEW)
    done = cli("convergence", bundle, *arguments)
    assert done.code == 0, done.err
    (found,) = json.loads(report.read_text())["candidates"]
    assert found["agreement"]["share"] == found["general_agreement"]["share"] == 1
    assert found["tpf_loss"] == 0 and found["flips"]["all"]["flipped"] == 0 < found["flips"]["all"]["rows"]
    assert found["exact_match"] == {"equal": 5, "of": 5, "share": 1.0} and found["first_divergence"] is None
    assert "same text" in done.out and "5 of 5" in done.out


def test_bundles_of_different_checkpoints_are_not_compared(cli: Cli, workshop: Workshop, bundle: Path, prompts: Path):
    other = workshop.bundle("llama").path
    outcome = cli("convergence", other, "--against", bundle, "--prompts", prompts, "--limit", 1, *FEW)
    assert_refused(outcome, "are of different checkpoints")


def test_bench_names_the_fastest_of_several_bundles(cli: Cli, bundle: Path, prompts: Path, tmp_path: Path):
    report = tmp_path / "report.json"
    sizes = ("--block-size", 2, "--block-size", 4, "--repeats", 1, "--limit", 2)
    done = cli("bench", bundle, bundle, "--prompts", prompts, *sizes, "--output", report, "--plots", tmp_path, *FEW)
    assert done.code == 0, done.err
    settings = json.loads(report.read_text())["settings"]
    assert len(settings) == 4 and {entry["block_size"] for entry in settings} == {2, 4}
    speeds = [entry["tokens_per_second"] for entry in settings]
    assert speeds == sorted(speeds, reverse=True)
    for entry in settings:
        ratio = entry["first_milliseconds"] / entry["milliseconds"]
        assert entry["expected_speedup"] == pytest.approx(entry["tokens_per_forward"] * ratio)
        assert entry["equal"] == 2 and entry["weight_bytes"] > 0
    assert f"with n = {settings[0]['block_size']}" in done.out
    assert (tmp_path / "trade_off.png").read_bytes().startswith(b"\x89PNG")


def test_quantize_takes_the_fastest_of_several_precisions_within_the_budget_and_says_why(
    cli: Cli, workshop: Workshop, bundle: Path, prompts: Path, tmp_path: Path
):
    output = tmp_path / "out"
    given = ("--against", bundle, "--prompts", prompts, "--limit", 4, "--block-size", 4, "-o", output, *FEW)
    budget = (*LOOSE, "--max-quality-loss", "99%", "--json", "--plots", tmp_path)
    schemes = ("--precision", "int8-dynamic", "--precision", "int4")
    done = cli("quantize", workshop.checkpoint("small"), *given, *schemes, *budget)
    assert done.code == 0, done.err
    written = json.loads(done.out)
    assert (written["max_tpf_loss"], written["max_quality_loss"], written["min_agreement"]) == (0.6, 0.99, 0.1)
    for candidate, scheme in zip(written["candidates"], ("int8-dynamic", "int4"), strict=True):
        assert candidate["scheme"] == scheme and candidate["trials"][-1]["measured_on"] == "bundle"
        assert candidate["tpf_loss"] <= 0.6 and candidate["quality_loss"] <= 0.99
        assert candidate["agreement"] >= 0.1 and candidate["perplexity_rise"] <= 0.5
    settings = written["timings"]["settings"]
    assert {entry["name"] for entry in settings} == {"fp32", "int8-dynamic", "int4"}
    assert written["chosen"] == settings[0]["name"]
    quantization = open_bundle(output).manifest.quantization
    assert (quantization.scheme if quantization else "fp32") == written["chosen"]
    plots = {"trade_off.png"} | ({"sensitivity.png"} if quantization else set())
    assert {path.name for path in tmp_path.iterdir()} == {"out"} | plots
    if quantization:
        assert_refused(cli("calibrate", output, "--prompts", prompts, "-o", tmp_path / "s", *FEW), "is quantised")


@pytest.mark.slow
def test_quantize_with_one_precision_takes_no_times(
    cli: Cli, workshop: Workshop, bundle: Path, prompts: Path, tmp_path: Path
):
    output = tmp_path / "out"
    given = ("--against", bundle, "--prompts", prompts, "--limit", 4, "--precision", "int8-dynamic", *FEW)
    done = cli("quantize", workshop.checkpoint("small"), *given, "-o", output, *LOOSE)
    assert done.code == 0, done.err
    assert f"wrote {output}: int8-dynamic, 0 layers kept" in done.out.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (("--precision", "int4", "--precision", "int4"), "once for each scheme"),
        (("--precision", "int8-dynamic", "--scales", "f"), "--scales is for int8 and int4 and fp8"),
        (("--precision", "int8-dynamic", "--group-size", 32), "--group-size is for int4"),
        (
            ("--precision", "int8-dynamic", "--precision", "int4", "--quantize-for", "tensorrt"),
            "must be one alone with --quantize-for",
        ),
        (("--precision", "int4", "--max-quality-loss", "2"), "--max-quality-loss must be from 0%"),
    ],
)
def test_quantize_refuses_options_that_do_not_go_together(
    cli: Cli, workshop: Workshop, bundle: Path, prompts: Path, tmp_path: Path, options: tuple[object, ...], phrase: str
):
    given = ("--against", bundle, "--prompts", prompts, "-o", tmp_path / "out", *FEW)
    assert_refused(cli("quantize", workshop.checkpoint("small"), *given, *options), phrase)
    assert not list(tmp_path.iterdir())


def test_a_place_for_plots_is_judged_before_the_work_and_made_after_it(
    cli: Cli, bundle: Path, prompts: Path, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        outcome = cli("bench", bundle, "--prompts", prompts, "--plots", place)
        assert_refused(outcome, "cannot write --plots to", "is no directory")
    outcome = cli("bench", bundle, "--prompts", tmp_path / "missing.jsonl", "--plots", tmp_path / "a" / "b")
    assert_refused(outcome, "cannot read prompts")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_plots_without_their_extra_are_refused_before_any_work(bundle: Path, prompts: Path, tmp_path: Path):
    arguments = ("bench", bundle, "--prompts", prompts, "--plots", tmp_path / "plots")
    outcome = run_process(*arguments, prelude=without("matplotlib"))
    assert_refused(outcome, "matplotlib", install_line("plot"))
    assert not (tmp_path / "plots").exists()
