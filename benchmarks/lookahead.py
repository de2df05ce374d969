"""Compare Jacobi, lookahead and autoregressive decoding of the same prompts: passes in turn, medians.

    python benchmarks/lookahead.py CLLM_BUNDLE PARENT_BUNDLE --prompts examples/text_to_sql/prompts.jsonl \
        [--shape W,N,G ...] [--block-size n] [--limit 60] [--repeats 5] [--threads 1] [--json OUT]

Each bundle must come from ``cllm-export build CHECKPOINT --lookahead``. A table per bundle gives, for each loop, tokens
per forward, tokens per second of decode, and the speedup over the autoregressive loop of the same pass. It counts the
prompts whose tokens differ from the autoregressive ones: shapes differ, so near ties may round differently.

Figures of the paper for comparison (CLLM, arXiv 2403.00835, LLaMA2-7B on GSM8K, A100): CLLM with Jacobi decoding 3.0x,
CLLM with lookahead decoding 2.9x, parent model with lookahead decoding 1.7x, parent model with Jacobi decoding 1.1x.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.lookahead.layout import LookaheadShape
from cllm_export.runtime.engines.machine import describe_machine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import GenerateOptions
from cllm_export.runtime.request_run import Generation

BASELINE = "autoregressive"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One loop over every prompt."""

    new_tokens: int
    forwards: int
    decode_seconds: float
    token_ids: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, generations: Iterable[Generation]) -> Pass:
        done = list(generations)
        return cls(
            new_tokens=sum(each.statistics.new_tokens for each in done),
            forwards=sum(each.statistics.forwards for each in done),
            decode_seconds=sum(each.statistics.decode_seconds for each in done),
            token_ids=tuple(each.token_ids for each in done),
        )


def measure(model: Model, prompts: list[list[int]], loops: dict[str, GenerateOptions], args: argparse.Namespace) -> Any:
    """Loop -> its figures. The first pass is a warm-up; the others are timed."""
    passes: dict[str, list[Pass]] = {name: [] for name in loops}
    for repeat in range(args.repeats + 1):
        for name, options in loops.items():
            done = Pass.of(decode(model, prompt, options, args.max_new_tokens) for prompt in prompts)
            if repeat:
                passes[name].append(done)
    return {name: summarize(done, passes[BASELINE]) for name, done in passes.items()}


def decode(model: Model, prompt: list[int], options: GenerateOptions, max_new_tokens: int) -> Generation:
    limit = min(max_new_tokens, model.facts.max_length - len(prompt))
    return model.generate(prompt, options, max_new_tokens=limit)


def summarize(passes: list[Pass], baseline: list[Pass]) -> dict[str, float | int]:
    pairs = list(zip(baseline, passes, strict=True))
    first = passes[0]
    differing = sum(a != b for a, b in zip(first.token_ids, baseline[0].token_ids, strict=True))
    return {
        "tokens_per_forward": first.new_tokens / first.forwards,
        "tokens_per_second": median(each.new_tokens / each.decode_seconds for each in passes),
        "speedup": median(base.decode_seconds / each.decode_seconds for base, each in pairs),
        "new_tokens": first.new_tokens,
        "forwards": first.forwards,
        "prompts_that_differ": differing,
    }


def parse_shape(text: str) -> LookaheadShape:
    window, ngram, guesses = (int(part) for part in text.split(","))
    return LookaheadShape(window=window, ngram=ngram, guesses=guesses)


def loops_of(shapes: list[LookaheadShape], block_size: int | None) -> dict[str, GenerateOptions]:
    loops: dict[str, GenerateOptions] = {
        BASELINE: GenerateOptions(method="autoregressive"),
        "jacobi": GenerateOptions(method="jacobi", block_size=block_size),
    }
    for shape in shapes:
        name = f"lookahead {shape.window},{shape.ngram},{shape.guesses} ({shape.num_rows(1)} to {shape.max_rows} rows)"
        loops[name] = GenerateOptions(method="lookahead", window=shape.window, ngram=shape.ngram, guesses=shape.guesses)
    return loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--shape", type=parse_shape, action="append", help="W,N,G; repeatable")
    parser.add_argument("--block-size", type=int, help="n of the Jacobi loop; by default the bundle's own")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loops = loops_of(args.shape or [LookaheadShape()], args.block_size)
    report: dict[str, Any] = {"machine": describe_machine(args.threads), "bundles": {}}
    for path in args.bundles:
        model = load(path, threads=args.threads)
        prompts = [model.encode(prompt.content) for prompt in read_prompts(args.prompts, limit=args.limit)]
        print(f"{path}: {len(prompts)} prompts, medians of {args.repeats} passes in turn")
        figures = report["bundles"][str(path)] = measure(model, prompts, loops, args)
        for name, row in figures.items():
            print(
                f"  {name:<36}{row['tokens_per_forward']:7.2f} tokens/forward{row['tokens_per_second']:9,.0f} tokens/s"
                f"{row['speedup']:7.2f}x{row['prompts_that_differ']:4} differ",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
