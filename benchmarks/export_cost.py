"""Measure seconds and peak memory of an export by running ``cllm-export build`` and reading the system's records.

    python benchmarks/export_cost.py CHECKPOINT [--repeats 3] [--json OUT]

Peak resident memory counts mapped files, such as the checkpoint itself, that the system may drop at any time; peak
anonymous memory (sampled every 10 ms) is what the build really needs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def measure(checkpoint: Path, output: Path) -> dict[str, float]:
    """Run one build. Return its seconds, and its memory peaks in GB."""
    command = [sys.executable, "-m", "cllm_export", "build", str(checkpoint), "--output", str(output), "--force"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    resident = anonymous = 0
    while process.poll() is None:
        status = memory_of(process.pid)
        resident = max(resident, status.get("VmHWM", 0))
        anonymous = max(anonymous, status.get("RssAnon", 0))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"the build failed with exit code {process.returncode}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_resident_gb": resident / 1e6, "peak_anonymous_gb": anonymous / 1e6}


def memory_of(pid: int) -> dict[str, int]:
    """Memory of a process in kB, by name, from the system's status file. Empty if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("VmHWM", "RssAnon")))
    return {name: int(value.split()[0]) for name, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.checkpoint.parent) as directory:
        runs = [measure(args.checkpoint, Path(directory) / "bundle") for _ in range(args.repeats)]
    result = {name: median(run[name] for run in runs) for name in runs[0]}
    print("  ".join(f"{name} {value:.2f}" for name, value in result.items()))
    if args.json:
        args.json.write_text(json.dumps({"runs": runs, "median": result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
