"""A calibration's directory: of one run alone, with whole files alone, and gone in the end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cllm_export.calibration.run_directory import RUN_NAME, RunSettings, run_directory
from cllm_export.errors import CalibrationError, DamagedRunError, OutputError

SETTINGS = RunSettings(
    bundle_fingerprint="b" * 64,
    prompts_sha256="p" * 64,
    num_prompts=20,
    loop="sliding",
    proposer="pad",
    block_size=16,
    max_new_tokens=32,
    seed=0,
    mix=0.5,
    num_rows=1000,
    gram=False,
    threads=1,
    onnxruntime="1",
)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "scales"


def interrupt(output, settings=SETTINGS):
    with pytest.raises(KeyboardInterrupt), run_directory(output, settings) as directory:
        directory.make(directory.recordings(0), lambda path: path.write_text("done"))
        raise KeyboardInterrupt


def test_a_run_that_ends_leaves_nothing(output, tmp_path):
    with run_directory(output, SETTINGS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_goes_on_with_what_is_done(output):
    interrupt(output)
    with run_directory(output, SETTINGS) as directory:
        assert directory.recordings(0).read_text() == "done"
        directory.make(directory.recordings(0), lambda path: path.write_text("again"))
        assert directory.recordings(0).read_text() == "done"


def test_an_interruption_tells_what_is_kept_and_how_to_go_on(output):
    with run_directory(output, SETTINGS) as directory:
        assert "keeps what was done (no finished part yet)" in directory.describe()
        for shard in (0, 1):
            directory.make(directory.recordings(shard), lambda path: path.write_text("done"))
        directory.make(directory.statistics(0), lambda path: path.write_text("done"))
        assert directory.describe() == (
            f"{output}.calibrating keeps what was done (2 recordings, 1 statistics): "
            "run the same command again to go on"
        )


@pytest.mark.parametrize("change", [{"bundle_fingerprint": "c" * 64}, {"mix": 1.0}, {"seed": 1}, {"gram": True}])
def test_an_interrupted_run_of_another_bundle_or_of_other_options_is_refused(output, change):
    interrupt(output)
    with pytest.raises(CalibrationError, match=f"interrupted calibration with {next(iter(change))}"):
        interrupt(output, replace(SETTINGS, **change))


def test_a_file_that_was_cut_short_is_not_there(output):
    def fail(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), run_directory(output, SETTINGS) as directory:
        directory.make(directory.statistics(1), fail)
    assert [path.name for path in output.with_name("scales.calibrating").iterdir()] == [RUN_NAME]


def test_a_damaged_run_is_refused_by_name(output):
    interrupt(output)
    (output.with_name("scales.calibrating") / RUN_NAME).write_text("{")
    with pytest.raises(CalibrationError, match=r"run\.json is damaged"):
        interrupt(output)


def test_a_directory_of_somebody_else_is_refused(output):
    output.with_name("scales.calibrating").mkdir()
    (output.with_name("scales.calibrating") / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt, which is not ours"):
        interrupt(output)


def test_a_run_that_cannot_succeed_leaves_nothing_to_go_on_with(output, tmp_path):
    with pytest.raises(CalibrationError, match="too few"), run_directory(output, SETTINGS) as directory:
        directory.make(directory.recordings(0), lambda path: path.write_text("done"))
        raise CalibrationError("too few prompts")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_leaves_the_others(output):
    with pytest.raises(DamagedRunError), run_directory(output, SETTINGS) as directory:
        directory.make(directory.recordings(0), lambda path: path.write_text("done"))
        raise DamagedRunError("damaged")
    interrupt(output)
    assert (output.with_name("scales.calibrating") / "recordings-00000.jsonl").read_text() == "done"


def test_two_runs_at_once_are_refused(output):
    with run_directory(output, SETTINGS), pytest.raises(OutputError, match="another calibration is at work"):
        interrupt(output)
