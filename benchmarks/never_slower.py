"""Compare n chosen forward by forward with every fixed n, on a bundle whose drafts pay and on one whose drafts do not.

    taskset -c 1 python benchmarks/never_slower.py CLLM PARENT --prompts PROMPTS [--threads 1] [--limit 60] [--json OUT]

Each round decodes every prompt with each setting, in turn. A pass is one setting, as a service would run it. The
chooser keeps what it has learned between passes. Its first pass, in which it learns, is reported separately. Ratios
compare tokens per second within a round. Their median has a bootstrap interval over rounds.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import median
from typing import Any

from cllm_export.prompts import read_prompts
from cllm_export.runtime.engines.machine import describe_machine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import BlockSize

SIZES = (1, 4, 8, 12, 16, 24)
RESAMPLES = 2000


def run_pass(model: Model, prompts: list[list[int]], block_size: BlockSize, limit: int) -> dict[str, Any]:
    """Decode every prompt once. Return tokens per second of decode, tokens per forward, and the tokens."""
    tokens, forwards, seconds, texts = 0, 0, 0.0, []
    for prompt in prompts:
        room = min(limit, model.facts.max_length - len(prompt))
        generation = model.generate(prompt, method="jacobi", block_size=block_size, max_new_tokens=room)
        tokens += generation.statistics.new_tokens
        forwards += generation.statistics.forwards
        seconds += generation.statistics.decode_seconds
        texts.append(generation.token_ids)
    return {"rate": tokens / seconds, "tokens_per_forward": tokens / forwards, "tokens": texts}


def compare(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure every setting on one bundle. Return rates, and the chooser's ratio to each fixed size."""
    model = load(path, threads=args.threads)
    prompts = [model.encode(prompt.content) for prompt in read_prompts(args.prompts)[: args.limit]]
    settings: list[BlockSize] = [*SIZES, "auto"]
    for size in SIZES:
        run_pass(model, prompts[:3], size, args.max_new_tokens)
    first = run_pass(model, prompts, "auto", args.max_new_tokens)
    rounds: list[dict[BlockSize, dict[str, Any]]] = []
    for number in range(args.rounds):
        order = settings[number % len(settings) :] + settings[: number % len(settings)]
        rounds.append({size: run_pass(model, prompts, size, args.max_new_tokens) for size in order})
    rates = {size: [entry[size]["rate"] for entry in rounds] for size in settings}
    differing = sum(
        auto != alone
        for entry in rounds
        for auto, alone in zip(entry["auto"]["tokens"], entry[1]["tokens"], strict=True)
    )
    return {
        "bundle": path.name,
        "tokens_per_second": {str(size): median(rates[size]) for size in settings},
        "tokens_per_forward": {str(size): rounds[-1][size]["tokens_per_forward"] for size in settings},
        "learning_pass": first["rate"],
        "auto_over": {str(size): interval(rates["auto"], rates[size]) for size in SIZES},
        "best": str(max(SIZES, key=lambda size: median(rates[size]))),
        "differing_sequences": differing,
        "sequences": len(rounds) * len(prompts),
    }


def interval(rates: list[float], others: list[float]) -> dict[str, float]:
    """Median of the pairwise ratios, and its 95 % bootstrap interval."""
    ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
    draws = random.Random(0)  # noqa: S311 - resampling, not a secret
    medians = sorted(median(draws.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return {"median": median(ratios), "low": medians[RESAMPLES // 40], "high": medians[-RESAMPLES // 40]}


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['bundle']}: best fixed n = {report['best']}; first pass {report['learning_pass']:,.0f} tokens/s")
    print(f"{'n':>5} {'tokens/s':>10} {'tokens/forward':>15} {'auto / it':>26}")
    for size, rate in report["tokens_per_second"].items():
        ratio = report["auto_over"].get(size)
        text = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else ""
        print(f"{size:>5} {rate:>10,.0f} {report['tokens_per_forward'][size]:>15.2f} {text:>26}")
    print(f"{report['differing_sequences']} of {report['sequences']} sequences differ from those at n = 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reports = []
    for path in args.bundles:
        reports.append(compare(path, args))
        show(reports[-1])
    if args.json:
        report = {"machine": describe_machine(args.threads), "bundles": reports}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
