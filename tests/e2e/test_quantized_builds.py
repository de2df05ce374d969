"""Quantised bundles from the command line: built, shown, verified, and refused where options make no sense."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Workshop
from tests.e2e.conftest import Cli, cli, output  # noqa: F401 - fixtures


def test_an_int8_bundle_is_built_shown_and_verified(cli: Cli, workshop: Workshop, tmp_path: Path):  # noqa: F811
    target = tmp_path / "bundle"
    built = cli("build", workshop.checkpoint("small"), "--output", target, "--precision", "int8-dynamic")
    assert built.code == 0, built.err
    assert "random tokens" in built.err + built.out, "the build does not say how far the bundle is from its model"
    shown = cli("inspect", target)
    assert shown.code == 0
    assert "int8-dynamic, round to nearest" in shown.out
    verified = cli("verify", target, "--max-new-tokens", 4)
    assert verified.code == 0, verified.out


def test_a_head_is_quantised_only_with_a_precision_that_quantises(cli: Cli, workshop: Workshop, tmp_path: Path):  # noqa: F811
    refused = cli("build", workshop.checkpoint("small"), "--output", tmp_path / "bundle", "--quantize-head")
    assert refused.code == 2
    assert "--quantize-head needs a --precision that quantises: int8-dynamic" in refused.err
    assert not list(tmp_path.iterdir())
