"""The report of ``gpu_forwards.py`` as text: tables and, below each, what was not measured and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Value = dict[str, Any]
"""Has ``median``, ``low`` and ``high``, or ``not_measured`` with the reason."""

TARGET_SHARE, TARGET_PARAMETERS = 0.7, 10**9
"""Target share of the copy bandwidth, for a forward of one row of a model of at least that size."""


def show_value(value: Value, scale: float = 1.0, form: str = ",.2f") -> str:
    """``median [low, high]``, or a dash if the value is missing; a line below the table gives the reason."""
    if "not_measured" in value:
        return "-"
    return "{} [{}, {}]".format(*(format(value[name] * scale, form) for name in ("median", "low", "high")))


Columns = dict[str, Callable[[dict[str, Any]], str]]
GRAPHS = {None: "", True: "graphs", False: "no graphs"}
LABELS: Columns = {
    "form": lambda row: GRAPHS[row["cuda_graphs"]],
    "n": lambda row: str(row["block_size"]),
}
LOOP_LABELS: Columns = LABELS | {"k": lambda row: str(row["forwards_per_sync"] or "host")}
FORWARDS: Columns = LABELS | {
    "T(n) ms": lambda row: show_value(row["seconds"], 1e3, ",.3f"),
    "T(n)/T(1)": lambda row: show_value(row["over_one"]),
    "MB read": lambda row: f"{row['bytes'] / 1e6:,.1f}",
    "% of copy bandwidth": lambda row: show_value(row["bandwidth_share"], 100, ".1f"),
    "% of matrix rate": lambda row: show_value(row["matrix_share"], 100, ".1f"),
}
LOOPS: Columns = LOOP_LABELS | {
    "us a forward": lambda row: show_value(row["wall_seconds"], 1e6, ",.0f"),
    "us the loop adds": lambda row: show_value(row["overhead_seconds"], 1e6, ",.1f"),
    "syncs a token": lambda row: show_value(row["syncs_per_token"], 1, ".3f"),
    "forwards in vain": lambda row: show_value(row["forwards_in_vain"], 1, ".0f"),
}
BUS: Columns = LOOP_LABELS | {
    name: lambda row, name=name: f"{row[name]:,.0f}" if name in row else "-"
    for name in ("to_device", "to_host", "bytes", "target")
}
DECODING: Columns = {
    "form": LABELS["form"],
    "method": lambda row: row["method"],
    "tokens/s": lambda row: show_value(row["tokens_per_second"], 1, ",.0f"),
    "tokens/forward": lambda row: show_value(row["tokens_per_forward"]),
    "over autoregressive": lambda row: show_value(row["over_autoregressive"], 1, ".3f"),
    "sequences that differ": lambda row: (
        "-" if isinstance(row["differing_sequences"], dict) else str(row["differing_sequences"])
    ),
}


def table(rows: Sequence[dict[str, Any]], columns: Columns) -> list[str]:
    """A table of the rows that have measured values, and a line for each reason why a value is missing."""
    labels = [name for name in ("form", "n", "k", "method") if name in columns]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        missing = missing_of(row)
        if "" not in missing.values():
            lines.append("| " + " | ".join(show(row) for show in columns.values()) + " |")
        label = ", ".join(f"{name} {columns[name](row)}" for name in labels if columns[name](row))
        for reason, names in missing.items():
            reasons.setdefault((reason, names), []).append(label)
    return lines + [
        f"not measured: {names + ' of ' if names else ''}{'; '.join(of_rows)}: {reason}"
        for (reason, names), of_rows in reasons.items()
    ]


def missing_of(row: dict[str, Any]) -> dict[str, str]:
    """Reason -> the missing figures of a row. No figure is named if all are missing for one reason."""
    if "not_measured" in row:
        return {row["not_measured"]: ""}
    values = {name: value for name, value in row.items() if isinstance(value, dict)}
    missing: dict[str, list[str]] = {}
    for name, value in values.items():
        if "not_measured" in value:
            missing.setdefault(value["not_measured"], []).append(name)
    return {reason: "" if len(names) == len(values) else ", ".join(names) for reason, names in missing.items()}


def target_line(report: dict[str, Any]) -> str:
    """Whether a forward of one row reaches its share of the copy bandwidth."""
    parameters = report["bundle"]["parameters"]
    if parameters < TARGET_PARAMETERS:
        return (
            f"target of {TARGET_SHARE:.0%} of the copy bandwidth at n = 1: for 1 B parameters, here are {parameters:,}"
        )
    shares = [row["bandwidth_share"] for row in report["forwards"] if row["block_size"] == 1]
    found = [share["median"] for share in shares if "median" in share]
    best = f"{max(found):.1%}, {'met' if max(found) >= TARGET_SHARE else 'not met'}" if found else "not measured"
    return f"target of {TARGET_SHARE:.0%} of the copy bandwidth at n = 1: {best}"


def show(report: dict[str, Any]) -> str:
    bundle, ceilings = report["bundle"], report["ceilings"]
    lines = [
        f"{bundle['name']} ({bundle['precision']}, {bundle['parameters'] / 1e6:,.0f} M parameters in products) on "
        f"{report['provider']}: {json.dumps(report['machine'])}",
        f"medians [quartiles] of {report['rounds']} rounds, {report['past']} rows of KV in sight",
    ]
    for name, value, scale, unit in (
        ("copy bandwidth, read and written", ceilings["copy_bytes_per_second"], 1e-9, "GB/s"),
        ("matrix rate", ceilings["matrix_operations_per_second"], 1e-12, "T operations/s"),
    ):
        reason = value.get("not_measured")
        lines.append(f"{name}: " + (f"not measured: {reason}" if reason else f"{show_value(value, scale)} {unit}"))
    parts = {"forwards": FORWARDS, "loops": LOOPS, "bus": BUS, "decoding": DECODING}
    for name, columns in parts.items():
        lines += ["", name if name != "bus" else "bytes over the bus per forward, as the engine asks for copies"]
        lines += table(report[name], columns)
    return "\n".join([*lines, "", target_line(report)])
