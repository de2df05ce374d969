"""Measure whether calibrating on Jacobi states pays: one quantiser, equal rows, from clean text or block states.

python benchmarks/calibration.py CHECKPOINT --prompts CALIBRATION --held-out HELD_OUT --output DIR
                                 [--precision int8] [--mix 0 0.5 1] [--rows 16384] [--seeds 0 1 2] [--limit 200]

Each row of the table is one `cllm-export calibrate` and one `cllm-export build`, which are printed. One `cllm-export
convergence` compares all rows with the unquantised bundle on held-out prompts: tokens per forward, flips on block
states by stage, texts, task accuracy, perplexity. Differences between seeds of one mix are due to chance. A difference
between mixes is meaningful only if it is larger. Existing results are not made again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def run(*arguments: str) -> None:
    """Print and run one command of the project."""
    print("$", shlex.join(["cllm-export", *arguments]), flush=True)
    subprocess.run([sys.executable, "-m", "cllm_export", *arguments], check=True)


def make_bundle(options: argparse.Namespace, baseline: Path, mix: float, seed: int) -> Path:
    """Make the scales of one mix and seed, and the bundle built with them."""
    name = f"{options.precision}-mix{mix:g}-seed{seed}"
    scales, bundle = options.output / f"{name}.safetensors", options.output / name
    common = ["--mix", f"{mix:g}", "--rows", str(options.rows), "--seed", str(seed), "--threads", "1"]
    gram = ["--gram"] if options.gram else []
    if not scales.exists():
        run("calibrate", str(baseline), "--prompts", str(options.prompts), "-o", str(scales), *common, *gram)
    if not bundle.exists():
        chosen = ["--precision", options.precision, "--scales", str(scales)]
        run("build", str(options.checkpoint), "-o", str(bundle), *chosen, *options.build)
    return bundle


def show(report: dict[str, Any]) -> None:
    """Print the table: one line per bundle, the unquantised one first."""
    accuracy = next((name for name in ("execution_match", "exact_match") if name in report["baseline"]["scores"]), None)
    columns = ("TPF", "TPF lost", "flips", "guess", "partial", "fixed", "right lost/gained", "same text", "perplexity")
    table = Table("bundle", *columns, accuracy or "accuracy", box=None)
    for entry in (report["baseline"], *report["candidates"]):
        flips = entry.get("flips")
        rates = [f"{flips[stage]['rate']:.3%}" for stage in ("all", "guess", "partial", "fixed")] if flips else [""] * 4
        score = entry["scores"].get(accuracy, {}).get("share") if accuracy else None
        table.add_row(
            entry["path"],
            f"{entry['tokens_per_forward']:.3f}",
            f"{entry['tpf_loss']:.2%}" if flips else "",
            *rates,
            f"{flips['all']['lost']}/{flips['all']['gained']}" if flips else "",
            f"{entry['exact_match']['share']:.1%}" if flips else "",
            f"{entry['perplexity']:.4f}",
            "-" if score is None else f"{score:.1%}",
        )
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--mix", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--limit", type=int, default=200, help="held-out prompts")
    parser.add_argument("--gram", action="store_true", help="for methods that need Gram matrices")
    parser.add_argument("--build", nargs="*", default=[], help="further options of `build`, the method among them")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    baseline = options.output / "fp32"
    if not baseline.exists():
        run("build", str(options.checkpoint), "-o", str(baseline))
    bundles = [make_bundle(options, baseline, mix, seed) for mix in options.mix for seed in options.seeds]
    report = options.output / "convergence.json"
    judged = ["--prompts", str(options.held_out), "--limit", str(options.limit), "--threads", "1"]
    run("convergence", *map(str, bundles), "--against", str(baseline), *judged, "--output", str(report), "--force")
    show(json.loads(report.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
