"""Quantised bundles from the command line: built, shown, verified, and refused where options make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import Variant
from tests.conftest import Workshop
from tests.e2e.conftest import Cli, assert_refused
from tests.scales import observe_stock, save_scales


def test_an_int8_bundle_is_built_shown_and_verified(cli: Cli, workshop: Workshop, tmp_path: Path):
    target = tmp_path / "bundle"
    built = cli("build", workshop.checkpoint("small"), "--output", target, "--precision", "int8-dynamic", "--rotate")
    assert built.code == 0, built.err
    assert "of 256 tokens of general text" in built.err, "the build does not say how far the bundle is from its model"
    shown = cli("inspect", target)
    assert shown.code == 0
    assert "int8-dynamic, round to nearest" in shown.out
    assert "residual stream rotated; values in the KV cache rotated" in " ".join(shown.out.split())
    verified = cli("verify", target, "--max-new-tokens", 4)
    assert verified.code == 0, verified.out


def test_a_head_is_quantised_only_with_a_precision_that_quantises(cli: Cli, workshop: Workshop, tmp_path: Path):
    refused = cli("build", workshop.checkpoint("small"), "--output", tmp_path / "bundle", "--quantize-head")
    assert refused.code == 2
    assert "--quantize-head needs a --precision that quantises: int8-dynamic" in refused.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (("--precision", "int8"), "--precision int8 needs --scales"),
        (("--precision", "fp8"), "--precision fp8 needs --scales"),
        (("--precision", "int8-dynamic", "--group-size", 64), "--group-size is for int4"),
        (("--precision", "int4", "--group-size", 48), "--group-size must be 32 for ONNX Runtime, got 48"),
        (("--precision", "int4", "--keep", "no.such.weight"), "--keep no.such.weight names no linear layer"),
        (("--precision", "int4", "--scales", "no-such-file"), "no-such-file cannot be read"),
        (("--precision", "int8-dynamic", "--quantize-for", "tensorrt"), "--quantize-for is for int4"),
        (("--quantize-for", "tensorrt"), "--quantize-for needs a --precision that quantises"),
        (("--precision", "int4", "--quantize-for", "tensorrt", "--group-size", 128), "no whole number of groups"),
    ],
)
def test_options_that_do_not_fit_end_in_one_sentence_and_leave_nothing(
    cli: Cli,
    workshop: Workshop,
    output: Path,
    options: tuple[object, ...],
    phrase: str,
):
    outcome = cli("build", workshop.checkpoint("small"), "--output", output, *options)
    assert (outcome.code, list(output.parent.iterdir())) == (2, []), outcome
    assert phrase in " ".join(outcome.err.split()) and "Traceback" not in outcome.err


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4"])
def test_scales_of_another_checkpoint_end_in_one_sentence_and_leave_nothing(
    cli: Cli,
    workshop: Workshop,
    output: Path,
    tmp_path: Path,
    scheme: str,
):
    rows = {name: seen for name, seen in observe_stock(workshop.stock("small"), 280).items() if "lm_head" not in name}
    scales = save_scales(tmp_path / "scales", workshop.bundle("small"), rows, gram=True)
    other = workshop.new_checkpoint(f"other-{scheme}", Variant(num_layers=1, seed=1))  # of the same shapes
    outcome = cli("build", other, "--output", output, "--precision", scheme, "--scales", scales)
    assert (outcome.code, list(output.parent.iterdir())) == (2, []), outcome
    assert "was calibrated with another checkpoint" in " ".join(outcome.err.split())


def test_int4_for_tensorrt_is_built_shown_and_verified(cli: Cli, workshop: Workshop, output: Path):
    small = workshop.checkpoint("small")
    built = cli("build", small, "--output", output, "--precision", "int4", "--quantize-for", "tensorrt")
    assert built.code == 0, built.err
    assert "groups of 32, for tensorrt" in " ".join(cli("inspect", output).out.split())
    verified = cli("verify", output, "--max-new-tokens", 4)
    assert verified.code == 0, verified.out


def test_a_graph_for_onnx_runtime_is_refused_for_a_plan(cli: Cli, workshop: Workshop, output: Path):
    options = ("--output", output, "--precision", "int4", "--target", "tensorrt")
    assert_refused(cli("build", workshop.checkpoint("small"), *options), "add --quantize-for tensorrt")
    assert list(output.parent.iterdir()) == []
