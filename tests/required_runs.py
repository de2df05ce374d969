"""The options ``--require-run FOLDER`` and ``--no-skips``: what was skipped fails the run, and says why.

A folder whose tests are all skipped looks as green as one whose tests pass. CI names the folders that must run there.
With ``--no-skips`` a single skipped test fails it: contacts with outside things are worth nothing if they are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest


class RequiredRuns:
    """Watches the reports of a run, at the controller where xdist has several processes.

    Args:
        folders: relative to the root, as the ids of tests are.
    """

    def __init__(self, folders: Sequence[str], *, no_skips: bool = False) -> None:
        self._no_skips = no_skips
        self._skipped: list[str] = []
        self._folders = [folder.rstrip("/") for folder in folders]
        self._ran: set[str] = set()
        self._skips: dict[str, list[str]] = {folder: [] for folder in self._folders}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        is_skipped = report.skipped and not hasattr(report, "wasxfail")
        reason = str(report.longrepr[-1] if report.longrepr else "no reason") if is_skipped else ""
        if is_skipped and self._no_skips:
            self._skipped.append(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")
        for folder in self._folders:
            if not report.nodeid.startswith(f"{folder}/"):
                continue
            if is_skipped:
                self._skips[folder].append(reason)
            elif report.when == "call" or report.failed:
                self._ran.add(folder)

    def missing(self) -> list[str]:
        """A line for each folder of which no test ran, and for each test that was skipped where none may be."""
        folders = [self._describe(folder) for folder in self._folders if folder not in self._ran]
        return folders + [f"--no-skips: {skipped}" for skipped in self._skipped]

    def _describe(self, folder: str) -> str:
        if not (skips := self._skips[folder]):
            return f"{folder}: no test of it was collected, and --require-run {folder} asks for one; -rs tells of skips"
        reason = skips[0].removeprefix("Skipped: ")
        return (
            f"{folder}: all {len(skips)} tests were skipped, and --require-run {folder} asks for one; first: {reason}"
        )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.missing() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.missing():
            terminalreporter.write_line(f"ERROR {line}", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-run",
        action="append",
        default=[],
        metavar="FOLDER",
        help="fail where no test of this folder ran; may be given several times",
    )
    parser.addoption("--no-skips", action="store_true", help="fail where any test is skipped")


def pytest_configure(config: pytest.Config) -> None:
    folders = config.getoption("require_run")
    if unknown := [folder for folder in folders if not (config.rootpath / folder).is_dir()]:
        raise pytest.UsageError(f"--require-run {unknown[0]}: there is no such folder below {config.rootpath}")
    no_skips = config.getoption("no_skips")
    if (folders or no_skips) and not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(RequiredRuns(folders, no_skips=no_skips))
