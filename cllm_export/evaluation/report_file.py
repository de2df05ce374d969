"""Writes a report whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cllm_export.errors import OutputError


def check_report_path(path: Path) -> None:
    """Whether a report can be written here: asked before the work that goes into it.

    Raises:
        OutputError: it is a directory, or lies in one that does not exist or takes no file.
    """
    directory = path.absolute().parent
    if path.is_dir() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise OutputError(
            f"cannot write the report to {path}: give a file in a directory that exists and can be written"
        )


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, beside its target first.

    Raises:
        OutputError: the system refuses; whatever stood at the path still does.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    staging = path.absolute().with_name(f".cllm-export-report-{secrets.token_hex(4)}")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        with suppress(OSError):
            staging.unlink()
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
