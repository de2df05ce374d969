"""Measure the value of prefix reuse: time to first token of prompts that share a prefix, with and without the cache.

    python benchmarks/prefix_reuse.py BUNDLE [--prefix 400] [--rest 16] [--rounds 20] [--threads 1] [--json OUT]

A round sends a new question (``--rest`` random tokens) after the same prefix of random tokens to three models. One
prefills the whole prompt, one reuses its cached prefix, and one starts from a snapshot on disk, including its loading.
The answers must be equal. A time is that of a whole request for one token. The report gives medians and, for each pair,
the ratio: machines are shared and noisy.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from cllm_export import Model, load
from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError
from cllm_export.runtime.engines.machine import describe_machine

NEW_TOKENS = 16
"""Tokens decoded to compare the answers. This decode is not timed."""

Ask = Callable[[list[int]], tuple[float, tuple[int, ...], int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prefix", type=int, default=400)
    parser.add_argument("--rest", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in ("prefix", "rest", "rounds", "threads"):
        require_at_least(f"--{name}", getattr(args, name), 1)
    report = measure(args.bundle, prefix=args.prefix, rest=args.rest, rounds=args.rounds, threads=args.threads)
    print(f"time to first token, {args.prefix} tokens of prefix and {args.rest} of question, {args.rounds} rounds")
    for name, entry in report["ways"].items():
        print(
            f"{name:<12} {entry['milliseconds']:8.2f} ms  {entry['speedup']:6.2f}x  "
            f"{entry['reused_tokens']} tokens reused"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(bundle: Path, *, prefix: int, rest: int, rounds: int, threads: int) -> dict[str, Any]:
    """Run every way in turn, round after round, after a warm-up round."""
    computed, kept = load(bundle, threads=threads, prefix_cache_bytes=0), load(bundle, threads=threads)
    if (needed := prefix + rest + NEW_TOKENS) > computed.facts.max_length:
        raise OptionError(f"{needed} tokens do not fit into this bundle, which holds {computed.facts.max_length}")
    draw = random.Random(0)  # noqa: S311
    vocabulary = range(computed.engine.geometry.vocab_size)
    common = draw.choices(vocabulary, k=prefix)
    with tempfile.TemporaryDirectory() as directory:
        snapshot = Path(directory) / "prefix"
        kept.save_prefix(snapshot, common)
        restored = load(bundle, threads=threads)
        ways: dict[str, Ask] = {
            "computed": lambda prompt: ask(computed, prompt),
            "reused": lambda prompt: ask(kept, prompt),
            "snapshot": lambda prompt: ask_from(restored, snapshot, prompt),
        }
        for ask_warm in ways.values():
            ask_warm(common + draw.choices(vocabulary, k=rest))
        times: dict[str, list[float]] = {name: [] for name in ways}
        reused: dict[str, int] = {}
        for _ in range(rounds):
            prompt = common + draw.choices(vocabulary, k=rest)
            answers = set()
            for name, way in ways.items():
                seconds, answer, reused[name] = way(prompt)
                times[name].append(seconds)
                answers.add(answer)
            if len(answers) > 1:
                raise SystemExit(f"the answers differ: {answers}")
        size = snapshot.stat().st_size
    return {
        "machine": describe_machine(threads),
        "bundle": bundle.name,
        "prefix": prefix,
        "rest": rest,
        "rounds": rounds,
        "snapshot_bytes": size,
        "ways": {
            name: {
                "milliseconds": median(times[name]) * 1e3,
                "speedup": median(base / own for base, own in zip(times["computed"], times[name], strict=True)),
                "reused_tokens": reused[name],
            }
            for name in ways
        },
    }


def ask(model: Model, prompt: list[int]) -> tuple[float, tuple[int, ...], int]:
    """Seconds of a request for one token, the number of reused tokens, and the answer (from another request)."""
    started = perf_counter()
    first = model.generate(prompt, max_new_tokens=1)
    seconds = perf_counter() - started
    answer = model.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return seconds, answer.token_ids, first.statistics.reused_tokens


def ask_from(model: Model, snapshot: Path, prompt: list[int]) -> tuple[float, tuple[int, ...], int]:
    """Like ``ask``, with a cache that holds only the loaded snapshot."""
    cache = model.prefix_cache
    assert cache is not None
    cache.clear()
    started = perf_counter()
    model.load_prefix(snapshot)
    loading = perf_counter() - started
    seconds, answer, reused = ask(model, prompt)
    return loading + seconds, answer, reused


if __name__ == "__main__":
    main()
