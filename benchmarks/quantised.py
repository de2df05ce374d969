"""Compare bundles of several precisions: size, forwards, tokens per forward, tokens per second, equal texts.

python benchmarks/quantised.py REFERENCE BUNDLE ... [--prompts FILE] [--limit 40] [--rounds 9] [--json OUT]

The others are compared with the first bundle. Without prompts only forwards are timed. That suits random weights, which
random_llama.py makes. Everything is timed in turn within a round; medians are shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

from cllm_export.bundle.manifest import Bundle, open_bundle
from cllm_export.prompts import Prompt, read_prompts
from cllm_export.runtime.decoding.block_size.time_forwards import time_in_turn
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model

BLOCK_SIZES = (1, 16)
MAX_NEW_TOKENS = 128


@dataclass
class Row:
    """The measurements of one bundle."""

    precision: str
    bytes: int
    milliseconds: dict[int, float] = field(default_factory=dict)
    """Milliseconds of a forward, by block size."""
    tokens_per_forward: float | None = None
    tokens_per_second: float | None = None
    equal: str | None = None
    """Prompts whose tokens equal the first bundle's."""


def precision_of(bundle: Bundle) -> str:
    quantization = bundle.manifest.quantization
    if quantization is None:
        return bundle.manifest.precision
    head = "" if any(reason.count("head") for reason in quantization.kept.values()) else " with head"
    block = f" group {quantization.group_size}" if quantization.group_size else ""
    return f"{quantization.scheme}{block}{head}, {quantization.method}"


def decode(
    models: Mapping[str, Model], prompts: Sequence[Prompt], rounds: int
) -> dict[str, tuple[list[tuple[int, ...]], float, float]]:
    """Tokens of each prompt, tokens per forward and tokens per second, by bundle."""
    tokens: dict[str, list[tuple[int, ...]]] = {}
    forwards: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            started = perf_counter()
            made = [
                model.generate(prompt.content, max_new_tokens=MAX_NEW_TOKENS, deterministic=True) for prompt in prompts
            ]
            seconds[name].append(perf_counter() - started)
            tokens[name] = [tuple(generation.token_ids) for generation in made]
            forwards[name] = sum(generation.statistics.forwards for generation in made)
    counts = {name: sum(map(len, each)) for name, each in tokens.items()}
    return {
        name: (tokens[name], counts[name] / forwards[name], counts[name] / median(seconds[name])) for name in models
    }


def measure(args: argparse.Namespace) -> dict[str, Row]:
    bundles = {str(path): open_bundle(path) for path in args.bundles}
    rows = {name: Row(precision_of(bundle), bundle.weight_bytes) for name, bundle in bundles.items()}
    engines = {name: OrtEngine(bundle, num_slots=1, threads=args.threads) for name, bundle in bundles.items()}
    times = time_in_turn(list(engines.values()), BLOCK_SIZES, past=args.past, rounds=args.rounds)
    for row, found in zip(rows.values(), times, strict=True):
        row.milliseconds = {size: 1e3 * each for size, each in found.seconds.items()}
    del engines
    if args.prompts:
        prompts = read_prompts(args.prompts, limit=args.limit)
        models = {
            name: load(bundle.path, threads=args.threads, prefix_cache_bytes=0) for name, bundle in bundles.items()
        }
        decoded = decode(models, prompts, min(args.rounds, 3))
        expected = next(iter(decoded.values()))[0]
        for name, (tokens, per_forward, per_second) in decoded.items():
            equal = sum(a == b for a, b in zip(tokens, expected, strict=True))
            rows[name].tokens_per_forward, rows[name].tokens_per_second = per_forward, per_second
            rows[name].equal = f"{equal}/{len(expected)}"
    return rows


def table(rows: Mapping[str, Row]) -> str:
    sizes = " | ".join(f"T({n}) ms" for n in BLOCK_SIZES)
    lines = [f"| precision | MB | {sizes} | tokens/forward | tokens/s | equal |", "|---" * (5 + len(BLOCK_SIZES)) + "|"]
    for row in rows.values():
        times = " | ".join(f"{row.milliseconds[n]:.2f}" for n in BLOCK_SIZES)
        decoded = [
            "-" if row.tokens_per_forward is None else f"{row.tokens_per_forward:.3f}",
            "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
            row.equal or "-",
        ]
        lines.append(f"| {row.precision} | {row.bytes / 1e6:.1f} | {times} | {' | '.join(decoded)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--past", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = measure(args)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
