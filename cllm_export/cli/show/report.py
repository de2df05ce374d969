"""The result of a command: tables for people or JSON on standard output, and the same JSON in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from cllm_export.bundle.storage import write_json


def show_report(
    report: Mapping[str, Any],
    show: Callable[[Mapping[str, Any]], None],
    *,
    as_json: bool = False,
    output: Path | None = None,
) -> None:
    """Print a report, then write it. A file that cannot be written thus loses nothing that was measured.

    Args:
        show: prints the report for people.
        as_json: print the report as JSON instead.
        output: a file for the report as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report)
    sys.stdout.flush()
    if output is not None:
        write_json(output, report)
