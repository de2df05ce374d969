"""What the commands of calibration print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from cllm_export.display import OUT

MAX_SHOWN = 10


def show_calibration(report: Mapping[str, Any]) -> None:
    """What was observed, and which channels tower above the others."""
    rows = report["rows"]
    total = sum(rows.values())
    shares = ", ".join(f"{kind} {count:,} ({count / total:.0%})" for kind, count in rows.items())
    OUT.print(f"{report['prompts']} prompts, {report['skipped']} skipped; {total:,} rows: {shares}", markup=False)
    if report["outliers"]:
        OUT.print(_outlier_table(report["outliers"]))
    gram = " and Gram matrices" if report["gram"] else ""
    OUT.print(f"wrote {report['scales']}: ranges{gram} of {report['layers']} layers", markup=False)


def _outlier_table(outliers: list[Mapping[str, Any]]) -> Table:
    table = make_table("outliers in the input of", "channel", "amax", "x median", "99.9 % / amax", "dead channels")
    for entry in outliers[:MAX_SHOWN]:
        note = " (beyond fp16)" if entry["overflows_fp16"] else ""
        table.add_row(
            entry["input"],
            str(entry["channel"]),
            f"{entry['amax']:.4g}{note}",
            f"{entry['ratio']:.1f}",
            f"{entry['high_share']:.4f}",
            str(entry["dead_channels"]),
        )
    if (left := len(outliers) - MAX_SHOWN) > 0:
        table.add_row(f"and {left} more", "", "", "", "", "")
    return table


def make_table(first: str, *others: str) -> Table:
    """A table without lines: names on the left, numbers on the right."""
    table = Table(box=None)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
