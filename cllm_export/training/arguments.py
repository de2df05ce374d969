"""What ``tune`` can refuse before torch is imported: its files, its output, a run that cannot go on."""

from __future__ import annotations

from pathlib import Path

from cllm_export.bundle.storage import check_output, unfinished_files
from cllm_export.errors import OutputError, TuningError

REPORT_NAME = "tuning.json"
STATE, SETTINGS, COUNTERS = "state", "settings.json", "counters.json"


def work_path(output: Path) -> Path:
    """The directory in which a run that writes to ``output`` works."""
    return output.with_name(f"{output.name}.tuning")


def check_tuning_output(output: Path, *, force: bool, resume: bool) -> None:
    """Check the output of a run, and the directory that it works in. See ``WorkDirectory``.

    Raises:
        OutputError: the output exists and may not be replaced, or an interrupted run would be lost.
        TuningError: there is nothing to resume.
    """
    check_output(output, force=force, marker=REPORT_NAME)
    path = work_path(output)
    has_state = any((path / name / COUNTERS).is_file() for name in (STATE, f"{STATE}.old"))
    if resume and not has_state:
        raise TuningError(f"there is no run to resume in {path}: it has saved no state; start without resume=True")
    if has_state and not (resume or force):
        raise OutputError(f"{path} holds an interrupted run: go on with resume=True, or replace it with force=True")
    _require_own(path)


def _require_own(path: Path) -> None:
    """Refuse a directory of this name that no run made."""
    if not path.exists() and not path.is_symlink():
        return
    is_own = any((path / name).is_file() for name in (SETTINGS, REPORT_NAME))
    if not path.is_dir() or (not is_own and set(path.iterdir()) - set(unfinished_files(path))):
        raise OutputError(
            f"{path} is needed to work in, and is no run's: move it, or choose another output", fields=("output",)
        )
