"""Measure what a plan costs: device memory of its weights, bytes, peak host memory and seconds of the build.

    python benchmarks/plan_size.py DIRECTORY [--size 1.1b] [--target sm89] [--weights link|copy]
        [--single-row-kernels] [--json OUT]

A random Llama in bf16 is exported, and TensorRT for RTX builds its plan for n = 1, 8 and 16. The
build runs in its own process. It needs no GPU, and host memory of five times the weights. Anonymous memory is what the
build needs. Resident memory also counts pages of the checkpoint, which the system may drop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from export_size import SIZES, make_checkpoint, measured

from cllm_export.bundle.manifest import open_bundle
from cllm_export.bundle.memory import Load, running_figures
from cllm_export.tensorrt.plan_files import PlanManifest, open_plan, plans_of

BLOCK_SIZES = (1, 8, 16)
COMMAND = [sys.executable, "-m", "cllm_export"]


def build_bundle(work: Path, size: str, weights: str) -> Path:
    """Export a random Llama in bf16."""
    checkpoint, bundle = work / "checkpoint", work / "bundle"
    make_checkpoint(checkpoint, size, torch.bfloat16)
    build = [*COMMAND, "build", str(checkpoint), "--output", str(bundle), "--weights", weights, "--precision", "bf16"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return bundle


def measure_plan(bundle: Path, target: str, options: list[str]) -> dict[str, Any]:
    """Build a plan in its own process. Sizes are bytes, factors are of the bytes of the bundle's weights."""
    sizes = [word for size in BLOCK_SIZES for word in ("--block-size", str(size))]
    command = [*COMMAND, "plan", str(bundle), "--engine", "tensorrt-rtx", "--for", target, *sizes, *options]
    cost = measured(command)
    opened = open_bundle(bundle)
    weights = running_figures(opened, Load.of(opened))[0].bytes
    [directory] = plans_of(opened).iterdir()
    manifest: PlanManifest = open_plan(directory).manifest
    if manifest.contents is None:
        raise SystemExit("the builder's log no longer says what is in a plan")
    return {
        "weights": weights,
        "weights_on_device": manifest.contents.weight_bytes,
        "weights_factor": round(manifest.contents.weight_bytes / weights, 4),
        "plan": manifest.size,
        "device_memory": [profile.device_bytes for profile in manifest.contents.profiles],
        "host_factor": round(1e6 * cost["peak_anonymous_mb"] / weights, 2),
        "resident_factor": round(1e6 * cost["peak_resident_mb"] / weights, 2),
        **cost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--weights", choices=["link", "copy"], default="link")
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--single-row-kernels", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = args.directory / "plan-size"
    work.mkdir(parents=True)
    try:
        options = ["--single-row-kernels"] if args.single_row_kernels else []
        result = measure_plan(build_bundle(work, args.size, args.weights), args.target, options)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
