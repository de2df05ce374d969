"""Measure a service under load: throughput and latency by number of concurrent requests, Jacobi and autoregressive.

    taskset -c 0,1 python benchmarks/load.py BUNDLE --prompts PROMPTS [--threads 1] [--concurrency 1,2,4,8,16]
        [--requests 64] [--rounds 3] [--json OUT]

There are as many clients as slots. Each client sends one request after another (a closed loop) and reads its text as it
arrives. Both services run the same bundle and prompts, in turn, round after round. The table gives medians over rounds;
a ratio is computed within each round. Latency is the time of a whole request; first token is the time to its first
text. ``overhead`` is what scheduler and loop add to a forward: the median of (step - engine) / engine.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from cllm_export import Service, load
from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.request import Method
from cllm_export.runtime.decoding.scheduler import StepReport

METHODS: tuple[Method, ...] = ("jacobi", "autoregressive")


@dataclass(frozen=True, kw_only=True)
class Round:
    """One service, once through all requests."""

    tokens_per_second: float
    latency_p50: float
    latency_p95: float
    first_token_p50: float
    first_token_p95: float
    tokens_per_forward: float
    overhead: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concurrency", default="1,2,4,8,16")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = [str(prompt.content) for prompt in read_prompts(args.prompts, limit=args.requests)]
    report = []
    print("clients  method          tokens/s   ratio   p50 ms   p95 ms   first p50   first p95     TPF   overhead")
    for clients in map(int, args.concurrency.split(",")):
        report += measure(args.bundle, texts, clients, args.threads, args.rounds, args.max_new_tokens)
        for row in report[-len(METHODS) :]:
            print(
                f"{clients:7}  {row['method']:14} {row['tokens_per_second']:9,.0f} {row['ratio']:7.2f} "
                f"{row['latency_p50']:8.1f} {row['latency_p95']:8.1f} {row['first_token_p50']:11.1f} "
                f"{row['first_token_p95']:11.1f} {row['tokens_per_forward']:7.2f} {row['overhead']:10.1%}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    bundle: Path, texts: Sequence[str], clients: int, threads: int, rounds: int, max_new_tokens: int
) -> list[dict[str, float | str]]:
    """Rows of the table for one number of clients, one row per method."""
    found: dict[Method, list[Round]] = {method: [] for method in METHODS}
    for number in range(rounds + 1):
        for method in METHODS:
            done = run(bundle, texts, clients, threads, method, max_new_tokens)
            if number:  # the first round is a warm-up
                found[method].append(done)
    pairs = zip(found["jacobi"], found["autoregressive"], strict=True)
    ratio = median(fast.tokens_per_second / plain.tokens_per_second for fast, plain in pairs)
    return [
        {"clients": clients, "method": method, "ratio": ratio if method == "jacobi" else 1.0}
        | {name: median(getattr(entry, name) for entry in entries) for name in Round.__dataclass_fields__}
        for method, entries in found.items()
    ]


def run(bundle: Path, texts: Sequence[str], clients: int, threads: int, method: Method, max_new_tokens: int) -> Round:
    """Send every text through a service of as many slots as there are clients."""
    reports: list[StepReport] = []
    model = load(bundle, threads=threads, num_slots=clients, prefix_cache_bytes=0)
    block_size = 1 if method == "autoregressive" else model.facts.block_size
    waiting, lock = list(enumerate(texts)), threading.Lock()
    first, whole = [0.0] * len(texts), [0.0] * len(texts)
    tokens, forwards = [0] * len(texts), [0] * len(texts)
    with Service(model, block_size=block_size, watch=reports.append) as service:

        def client() -> None:
            while True:
                with lock:
                    if not waiting:
                        return
                    index, text = waiting.pop()
                started = perf_counter()
                handle = service.submit(text, method=method, max_new_tokens=max_new_tokens)
                for _ in handle:
                    first[index] = first[index] or perf_counter() - started
                whole[index] = perf_counter() - started
                statistics = handle.result().statistics
                tokens[index], forwards[index] = statistics.new_tokens, statistics.forwards

        service.warm_up()
        reports.clear()
        started = perf_counter()
        threads_ = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads_:
            thread.start()
        for thread in threads_:
            thread.join()
        seconds = perf_counter() - started
    return Round(
        tokens_per_second=sum(tokens) / seconds,
        latency_p50=1e3 * float(np.percentile(whole, 50)),
        latency_p95=1e3 * float(np.percentile(whole, 95)),
        first_token_p50=1e3 * float(np.percentile(first, 50)),
        first_token_p95=1e3 * float(np.percentile(first, 95)),
        tokens_per_forward=sum(tokens) / sum(forwards),
        overhead=median(step.seconds / step.engine_seconds - 1 for step in reports),
    )


if __name__ == "__main__":
    main()
