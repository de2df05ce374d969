"""What a command measured is printed before it is written, and no file is replaced unless that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cllm_export.cli.entry  # it has all commands
from cllm_export.bundle.manifest import Bundle
from cllm_export.cli.app import app
from cllm_export.cli.show.plots import TRADE_OFF, check_plots, plot_trade_off
from cllm_export.cli.show.report import show_report
from cllm_export.errors import OutputError
from cllm_export.measure.bench import _leave_latency
from cllm_export.runtime.decoding.block_size.latency_file import LATENCY_NAME
from cllm_export.runtime.decoding.block_size.measured_times import MeasuredTimes
from tests.fakes import write_bundle

REPORT = {"tokens_per_second": 123}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_report_that_cannot_be_written_is_printed_all_the_same(tmp_path, capsys, as_json):
    """The directory may be gone, or the disk full, after hours of measuring."""
    with pytest.raises(OutputError, match="cannot write"):
        show_report(REPORT, print, as_json=as_json, output=tmp_path / "gone" / "report.json")
    assert "123" in capsys.readouterr().out


def test_a_report_is_printed_as_json_and_written_as_the_same_json(tmp_path, capsys):
    show_report(REPORT, pytest.fail, as_json=True, output=tmp_path / "report.json")  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "report.json").read_text()) == REPORT


def test_times_that_a_bundle_cannot_keep_are_no_error(bundle: Bundle, caplog: pytest.LogCaptureFixture):
    """A container mounts its bundle read-only."""
    (bundle.path / LATENCY_NAME).mkdir()
    _leave_latency([bundle], [MeasuredTimes(seconds={1: 0.5}, quartiles={1: (1.0, 1.0)})], 1)
    assert "the times of forwards are not kept: cannot write" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "BUNDLE", "--output", "FILE"),
        ("convergence", "BUNDLE", "--against", "BUNDLE", "--prompts", "PROMPTS", "--output", "FILE"),
        ("evaluate", "BUNDLE", "--task", "prompts", "--data", "PROMPTS", "--output", "FILE"),
        ("trace", "BUNDLE", "--prompts", "PROMPTS", "--output", "FILE"),
        ("calibrate", "BUNDLE", "--prompts", "PROMPTS", "--output", "FILE"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_file_is_not_replaced_without_force(bundle: Bundle, tmp_path: Path, arguments: tuple[str, ...]):
    assert cllm_export.cli.entry.main
    file, prompts = tmp_path / "file", tmp_path / "prompts.jsonl"
    file.write_text("mine")
    prompts.write_text('{"prompt": "hello"}\n')
    paths = {"BUNDLE": str(bundle.path), "FILE": str(file), "PROMPTS": str(prompts)}
    done = CliRunner().invoke(app, [paths.get(argument, argument) for argument in arguments])
    assert isinstance(done.exception, OutputError)
    assert str(done.exception) == f"{file} exists; replace it with --force or choose another --output"
    assert file.read_text() == "mine"


def test_a_plot_is_not_replaced_without_force(tmp_path: Path):
    pytest.importorskip("matplotlib")
    (tmp_path / TRADE_OFF).write_text("mine")
    check_plots(tmp_path, TRADE_OFF, force=True)
    with pytest.raises(OutputError, match="exists; replace it with force=True or choose another directory"):
        check_plots(tmp_path, TRADE_OFF, force=False)


def test_a_plot_appears_whole(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = plot_trade_off([], tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == [TRADE_OFF]
