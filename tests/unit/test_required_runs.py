"""A folder that must run and is skipped as a whole fails the run, in one process and in several."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent.parent
RUNS = "def test_runs(): pass"
SKIPPED = """
import pytest
@pytest.fixture
def bindings(): pytest.skip("the bindings are not installed")
@pytest.mark.parametrize("version", [1, 2])
def test_of(bindings, version): pass
"""
FAILS_IN_SETUP = """
import pytest
@pytest.fixture
def broken(): raise RuntimeError
def test_of(broken): pass
"""
XFAILS = """
import pytest
@pytest.mark.xfail
def test_of(): raise RuntimeError
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs pytest with the option over two folders: ``one``, which runs, and ``two``, with this source."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of xdist's processes
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run_pytest(source: str, *arguments: str) -> pytest.RunResult:
        for folder, content in {"one": RUNS, "two": source}.items():
            pytester.mkdir(folder).joinpath(f"test_{folder}.py").write_text(content, encoding="utf-8")
        return pytester.runpytest_inprocess("-p", "tests.required_runs", *arguments)

    return run_pytest


@pytest.mark.parametrize("processes", [(), ("-p", "xdist", "-n", "1")], ids=["alone", "xdist"])
def test_a_folder_skipped_as_a_whole_fails_the_run(run, processes):
    outcome = run(SKIPPED, *processes, "--require-run", "one", "--require-run", "two/")
    assert outcome.ret == pytest.ExitCode.TESTS_FAILED
    outcome.assert_outcomes(passed=1, skipped=2)
    errors = [line for line in outcome.outlines if line.startswith("ERROR")]
    assert errors == [
        "ERROR two: all 2 tests were skipped, and --require-run two asks for one; first: the bindings are not installed"
    ]


def test_a_folder_that_nobody_names_may_be_skipped(run):
    outcome = run(SKIPPED, "--require-run", "one")
    assert outcome.ret == pytest.ExitCode.OK


def test_one_test_that_runs_is_enough(run):
    assert run(SKIPPED + RUNS, "--require-run", "two").ret == pytest.ExitCode.OK


@pytest.mark.parametrize(("source", "code"), [(FAILS_IN_SETUP, 1), (XFAILS, 0)], ids=["failed", "failed as expected"])
def test_a_test_that_failed_has_run(run, source, code):
    outcome = run(source, "--require-run", "two")
    assert outcome.ret == code
    assert "asks for one" not in outcome.stdout.str()


def test_a_folder_of_which_nothing_is_collected_fails_the_run(run):
    outcome = run(RUNS, "one", "--require-run", "two")
    assert outcome.ret == pytest.ExitCode.TESTS_FAILED
    assert "ERROR two: no test of it was collected" in outcome.stdout.str()


def test_a_folder_that_does_not_exist_is_refused_by_name(run):
    outcome = run(RUNS, "--require-run", "three")
    assert outcome.ret == pytest.ExitCode.USAGE_ERROR
    assert "--require-run three: there is no such folder" in outcome.stderr.str()


def test_a_single_skip_fails_a_run_without_skips(run):
    outcome = run(SKIPPED, "--no-skips")
    assert outcome.ret == pytest.ExitCode.TESTS_FAILED
    outcome.stdout.fnmatch_lines(["ERROR --no-skips: two/test_two.py::test_of*: the bindings are not installed"])


def test_a_run_that_skips_nothing_passes_without_skips(run):
    assert run(RUNS, "--no-skips").ret == pytest.ExitCode.OK
