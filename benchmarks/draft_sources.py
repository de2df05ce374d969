"""Measure each draft source and method on each bundle: tokens per forward, and tokens per second.

python benchmarks/draft_sources.py BUNDLE [BUNDLE ...] --prompts PROMPTS [--block-size N] [--repeats 3] [--json OUT]

The second bundle is the draft model of the first, and the first is the draft model of all others. The settings of a
bundle run in turn, pass after pass; one pass decodes every prompt with one setting. The table gives medians of the
passes. The pool is emptied before each pass, so it learns only from earlier prompts and never from the same prompt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.engines.machine import describe_machine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.request_run import Generation

STATELESS_PROPOSERS = ("pad", "repeat", "prompt", "lookup", "pool", "pool+lookup", "lookup+pool")
MODEL_PROPOSERS = ("model", "lookup+model", "pool+lookup+model")
METHODS: tuple[Method, ...] = ("jacobi", "jacobi-block", "speculative")
NEVER_RIGHT = ("pad", "repeat", "prompt")
"""Proposers that make speculative decoding autoregressive."""


class Setting(NamedTuple):
    """One row of the table."""

    method: Method
    proposer: str | None


class Pass(NamedTuple):
    """All prompts, decoded once in one setting."""

    new_tokens: int
    forwards: int
    seconds: float


def settings_of(model: Model) -> list[Setting]:
    proposers = STATELESS_PROPOSERS + (MODEL_PROPOSERS if model.draft_model else ())
    rows = [Setting(method, proposer) for method in METHODS for proposer in proposers]
    useful = [row for row in rows if row.method != "speculative" or row.proposer not in NEVER_RIGHT]
    return [Setting("autoregressive", None), *useful]


def run_pass(model: Model, prompts: list[list[int]], setting: Setting, block_size: int, limit: int) -> Pass:
    model.pool.clear()
    size = None if setting.method == "autoregressive" else block_size
    done: list[Generation] = [
        model.generate(
            prompt,
            method=setting.method,
            proposer=setting.proposer,
            block_size=size,
            max_new_tokens=min(limit, model.facts.max_length - len(prompt)),
        )
        for prompt in prompts
    ]
    statistics = [generation.statistics for generation in done]
    return Pass(
        sum(entry.new_tokens for entry in statistics),
        sum(entry.forwards for entry in statistics),
        sum(entry.decode_seconds for entry in statistics),
    )


def measure(model: Model, prompts: list[list[int]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a row for each setting. The first pass is a warm-up."""
    settings = settings_of(model)
    passes: dict[Setting, list[Pass]] = {setting: [] for setting in settings}
    for repeat in range(args.repeats + 1):
        for setting in settings:
            size = args.block_size or model.facts.block_size
            done = run_pass(model, prompts, setting, size, args.max_new_tokens)
            if repeat:
                passes[setting].append(done)
    return [describe(setting, passes[setting], passes[settings[0]]) for setting in settings]


def describe(setting: Setting, passes: list[Pass], baseline: list[Pass]) -> dict[str, Any]:
    return {
        "method": setting.method,
        "proposer": setting.proposer,
        "tokens_per_forward": passes[0].new_tokens / passes[0].forwards,
        "tokens_per_second": median(entry.new_tokens / entry.seconds for entry in passes),
        "speedup": median(base.seconds / own.seconds for base, own in zip(baseline, passes, strict=True)),
    }


def show(name: str, draft: str | None, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}" + (f", draft model {draft}" if draft else ""))
    print(f"{'method':16}{'proposer':20}{'tokens/forward':>15}{'tokens/s':>12}{'speedup':>10}")
    for row in rows:
        figures = f"{row['tokens_per_forward']:>15.2f}{row['tokens_per_second']:>12,.0f}{row['speedup']:>9.2f}x"
        print(f"{row['method']:16}{row['proposer'] or '-':20}{figures}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--block-size", type=int, help="n of every loop; by default each bundle's own")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "machine": describe_machine(args.threads),
        "prompts": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "bundles": {},
    }
    first, *others = args.bundles
    drafts = dict.fromkeys(others, first) | ({first: others[0]} if others else {})
    for path in args.bundles:
        draft = drafts.get(path)
        model = load(path, threads=args.threads, draft_model=draft, prefix_cache_bytes=0)
        prompts = [model.encode(prompt.content) for prompt in read_prompts(args.prompts, limit=args.limit)]
        rows = measure(model, prompts, args)
        show(path.name, draft.name if draft else None, rows)
        report["bundles"][path.name] = {
            "block_size": args.block_size or model.facts.block_size,
            "draft_model": draft.name if draft else None,
            "rows": rows,
        }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
