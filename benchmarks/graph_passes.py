"""Measure the value of each optional graph pass: builds with all passes and with one left out, timed in turn.

python benchmarks/graph_passes.py CHECKPOINT [--threads 1] [--past 150] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from cllm_export.exporter.graph import passes
from cllm_export.exporter.pipeline import build
from cllm_export.runtime.decoding.block_size.time_forwards import run_forward
from cllm_export.runtime.engines.onnxruntime import OrtEngine

OPTIONAL = (passes.pack_qkv, passes.fold_query_groups)
BLOCK_SIZES = (1, 4, 8, 16, 32)
WARM_UP, TIMED = 8, 6


def build_variants(checkpoint: Path, directory: Path, threads: int) -> dict[str, OrtEngine]:
    """An engine for the full graph and for each graph that lacks one optional pass."""
    every = passes.PASSES
    chosen = {"all passes": every}
    chosen |= {f"without {left_out.__name__}": tuple(p for p in every if p is not left_out) for left_out in OPTIONAL}
    engines = {}
    for name, kept in chosen.items():
        passes.PASSES = kept
        engines[name] = OrtEngine(build(checkpoint, directory / name.replace(" ", "-")), num_slots=1, threads=threads)
    passes.PASSES = every
    return engines


def measure(engines: dict[str, OrtEngine], past: int, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of a forward by variant and block size, one entry per round. Variants run in turn within a round."""
    times: dict[str, dict[int, list[float]]] = {name: {n: [] for n in BLOCK_SIZES} for name in engines}
    for _ in range(rounds):
        for n in BLOCK_SIZES:
            for name, engine in engines.items():
                for _ in range(WARM_UP):
                    run_forward(engine, n, past)
                started = engine.run_seconds
                for _ in range(TIMED):
                    run_forward(engine, n, past)
                times[name][n].append((engine.run_seconds - started) / TIMED)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--past", type=int, default=150, help="KV rows before the block")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        times = measure(build_variants(args.checkpoint, Path(directory), args.threads), args.past, args.rounds)
    base = times["all passes"]
    report = {
        name: {
            n: {
                "milliseconds": 1e3 * median(of_n),
                "ratio": median(own / full for own, full in zip(of_n, base[n], strict=True)),
            }
            for n, of_n in by_n.items()
        }
        for name, by_n in times.items()
    }
    print(f"{'':28}" + "".join(f"{'n = ' + str(n):>18}" for n in BLOCK_SIZES))
    for name, by_n in report.items():
        cells = "".join(f"{entry['milliseconds']:>9.3f} ({entry['ratio']:.3f}x)" for entry in by_n.values())
        print(f"{name:28}{cells}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
