"""Measure the value of each part of consistency tuning: rows of equal work from the same parent, with several seeds.

python benchmarks/ablation.py PARENT --prompts TRAIN --held-out HELD_OUT --output DIR [--minutes 10] [--seeds 0 1]
                              [--rows packed global ...] [--jobs 1]

Each row is one `cllm-export tune` command, which is printed, and one `cllm-export evaluate`. Rows get equal processor
time, not equal steps. A short run of each row, one after the other, measures the cost of a step. From that follows the
number of steps that fit into the minutes. Other load on the machine therefore slows the table down but does not change
it. A finished row is not run again, so an interrupted table can be resumed. `--jobs 2` runs two rows at once, each on
one thread. The report (DIR/ablation.json) and the table give each seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COMMON = [
    "--limit",
    "30000",
    "--optimizer",
    "muon",
    "--learning-rate",
    "0.0015",
    "--matrix-learning-rate",
    "0.01",
    "--decay",
    "0.9",
    "--mixed-precision",
    "bf16",
    "--batch-size",
    "16",
    "--autoregressive-weight",
    "5",
    "--distance-weight",
    "0.7",
    "--evaluate-every",
    "0.5",
]
COLLECTED_PROMPTS = 6000
PROBE_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """The changes of a row compared with the first row."""

    label: str
    flags: tuple[str, ...] = ()
    self_generated: bool = False
    """Train on fixed points from the parent instead of the answers."""
    method: str = "jacobi"
    proposer: str = "pad"


ROWS: dict[str, Row] = {
    "packed": Row(label="packed, pad, sliding, answers, weight 5, near first"),
    "control": Row(label="autoregressive only", flags=("--objective", "autoregressive")),
    "global": Row(label="global", flags=("--objective", "global")),
    "local": Row(label="local", flags=("--objective", "local")),
    "prompt-proposer": Row(label="prompt proposer", flags=("--proposer", "prompt"), proposer="prompt"),
    "lookup-proposer": Row(label="prompt lookup proposer", flags=("--proposer", "lookup"), proposer="lookup"),
    "weight-1": Row(label="autoregressive weight 1", flags=("--autoregressive-weight", "1")),
    "weight-20": Row(label="autoregressive weight 20", flags=("--autoregressive-weight", "20")),
    "self-generated": Row(label="self-generated fixed points", self_generated=True),
    "block": Row(label="block loop", flags=("--loop", "block"), method="jacobi-block"),
    "even": Row(label="near and far guesses alike", flags=("--distance-weight", "1")),
}


def command(name: str) -> list[str]:
    """The command line of the tool, in this interpreter."""
    return [sys.executable, "-m", "cllm_export", name]


def collect(args: argparse.Namespace) -> Path:
    """The parent's own fixed points, collected once through its engine."""
    bundle, output = args.output / "parent-bundle", args.output / "trajectories"
    if not bundle.exists():
        subprocess.run([*command("build"), str(args.parent), "--output", str(bundle)], check=True)
    flags = ["--prompts", str(args.prompts), "--output", str(output), "--limit", str(COLLECTED_PROMPTS)]
    subprocess.run([*command("collect"), str(bundle), *flags, "--max-new-tokens", "96"], check=True)
    return output


def tune(name: str, seed: int, steps: int, output: Path, args: argparse.Namespace) -> Path:
    """Train one row, unless it exists already."""
    if output.exists():
        return output
    row = ROWS[name]
    flags = ["--prompts", str(args.prompts), "--held-out", str(args.held_out), "--steps", str(steps)]
    flags += ["--seed", str(seed), "--threads", "1", *COMMON, *row.flags, "--output", str(output), "--force"]
    if row.self_generated:
        flags += ["--trajectories", str(args.output / "trajectories")]
    line = [*command("tune"), str(args.parent), *flags]
    print(" ".join(line), flush=True)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return output


def affordable_steps(name: str, args: argparse.Namespace) -> int:
    """The number of steps of a row that fit into the minutes, from the processor time of a short run."""
    short = tune(name, 0, PROBE_STEPS, args.output / f"{name}-probe", args)
    report = json.loads((short.with_name(f"{short.name}.tuning") / "tuning.json").read_text(encoding="utf-8"))
    return max(1, round(args.minutes * PROBE_STEPS / report["processor_minutes"]))


def evaluate(checkpoint: Path, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Score a checkpoint with the loop and the proposer that it was trained for."""
    report = checkpoint.with_name(f"{checkpoint.name}.evaluation.json")
    if not report.exists():
        flags = ["--task", "prompts", "--data", str(args.held_out), "--limit", str(args.limit), "--threads", "1"]
        flags += ["--block-size", "16", "--method", row.method, "--proposer", row.proposer, "--output", str(report)]
        subprocess.run([*command("evaluate"), str(checkpoint), *flags], check=True, stdout=subprocess.DEVNULL)
    entry: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["models"]["model"]
    return entry


def run(name: str, seed: int, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one cell of the table: a row and a seed."""
    entry = evaluate(tune(name, seed, steps, args.output / f"{name}-{seed}", args), ROWS[name], args)
    return {"row": name, "label": ROWS[name].label, "seed": seed, "steps": steps, **measures(entry)}


def measures(entry: dict[str, Any]) -> dict[str, Any]:
    """The figures of the table."""
    scores = {name: share["share"] for name, share in entry["scores"]["all"].items()}
    return {"tokens_per_forward": entry["decoding"]["tokens_per_forward"], **scores}


def show(parent: dict[str, Any], cells: list[dict[str, Any]], minutes: float) -> None:
    """Print the table: a line for each row, with seeds side by side."""
    names = [name for name in parent if name != "row"]
    table = Table(box=None, title=f"{minutes:g} minutes a row")
    table.add_column("row")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row("parent", *(f"{parent[name]:.3f}" for name in names))
    for row in dict.fromkeys(cell["row"] for cell in cells):
        own = [cell for cell in cells if cell["row"] == row]
        table.add_row(own[0]["label"], *(" / ".join(f"{cell[name]:.3f}" for cell in own) for name in names))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--limit", type=int, default=200, help="held-out questions to score")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if any(ROWS[name].self_generated for name in args.rows):
        collect(args)
    steps = {name: affordable_steps(name, args) for name in args.rows}
    with ThreadPoolExecutor(args.jobs) as executor:
        waiting = [executor.submit(run, name, seed, steps[name], args) for seed in args.seeds for name in args.rows]
        cells = [future.result() for future in waiting]
    parent = measures(evaluate_parent(args))
    report = {"parent": parent, "cells": cells, "minutes": args.minutes}
    (args.output / "ablation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(parent, cells, args.minutes)


def evaluate_parent(args: argparse.Namespace) -> dict[str, Any]:
    """Score the parent with the first row's loop and proposer. Its report is stored beside the rows' reports."""
    copy = args.output / "parent"
    if not copy.exists():
        copy.symlink_to(args.parent.resolve())
    return evaluate(copy, ROWS["packed"], args)


if __name__ == "__main__":
    main()
