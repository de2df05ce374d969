"""Compare our loops with ONNX Runtime GenAI on the same checkpoint, prompts and core, in turn, with ratios per round.

    python benchmarks/side_by_side.py BUNDLE --genai-python ENV/bin/python --genai-model MODEL \
        --checkpoint CHECKPOINT --prompts PROMPTS [--core 1] [--rounds 5] [--json OUT]

``benchmarks/peers/README.md`` explains how to make ENV and MODEL. Both tools count decode forwards in the same way. The
comparison is milliseconds per autoregressive forward, including the loop, and tokens per second of our Jacobi loop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent


def run_json(command: list[str], threads: int, core: int) -> dict[str, Any]:
    """Run a command with ``--json FILE``, pinned to as many cores as it has threads. Return what it wrote to FILE."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "report.json"
        cores = ",".join(str((core + index) % threads if threads > 1 else core) for index in range(threads))
        subprocess.run(["taskset", "-c", cores, *command, "--json", str(output)], check=True, stdout=subprocess.DEVNULL)
        report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--genai-python", type=Path, required=True)
    parser.add_argument("--genai-model", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--block-size", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common = ["--prompts", str(args.prompts), "--limit", str(args.limit), "--max-new-tokens", "128"]
    common += ["--threads", str(args.threads), "--repeats", "3"]
    genai = [str(args.genai_python), str(HERE / "peers" / "genai.py"), "--model", str(args.genai_model)]
    genai += ["--checkpoint", str(args.checkpoint), *common]
    bench = [sys.executable, "-m", "cllm_export", "bench", str(args.bundle), *common]
    rounds = []
    for number in range(args.rounds):
        peer = run_json(genai, args.threads, args.core)
        plain = run_json([*bench, "--method", "autoregressive"], args.threads, args.core)
        jacobi = run_json([*bench, "--method", "jacobi", "--block-size", str(args.block_size)], args.threads, args.core)
        rounds.append(summarize(peer, plain, jacobi))
        print(number + 1, "  ".join(f"{key} {value:,.3f}" for key, value in rounds[-1].items()), flush=True)
    medians = {key: median(entry[key] for entry in rounds) for key in rounds[0]}
    print("median", "  ".join(f"{key} {value:,.3f}" for key, value in medians.items()))
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "median": medians}, indent=2) + "\n", encoding="utf-8")


def summarize(peer: dict[str, Any], plain: dict[str, Any], jacobi: dict[str, Any]) -> dict[str, float]:
    """One round: each tool's milliseconds per autoregressive forward, our Jacobi rate, and the ratios."""
    ours = 1e3 / rate_of(plain, "autoregressive")
    rate = rate_of(jacobi, "jacobi")
    theirs = peer["milliseconds_per_decode_forward"]
    return {
        "genai_ms_per_forward": theirs,
        "our_autoregressive_ms_per_forward": ours,
        "autoregressive_speed_ratio": theirs / ours,
        "our_jacobi_tokens_per_second": rate,
        "jacobi_speed_ratio_to_genai": rate * theirs / 1e3,
    }


def rate_of(report: dict[str, Any], method: str) -> float:
    """Tokens per second of a method at the requested n, not at an n chosen forward by forward."""
    rates = [
        entry["tokens_per_second"]
        for entry in report["settings"]
        if entry["method"] == method and entry["block_size"] != "auto"
    ]
    [rate] = rates
    return float(rate)


if __name__ == "__main__":
    main()
