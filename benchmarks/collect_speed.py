"""Time collecting trajectories with the exported engine and with PyTorch, and transformers' `generate` alone.

python benchmarks/collect_speed.py CHECKPOINT --prompts PROMPTS [--limit 100] [--rounds 5] [--threads 1] [--json OUT]

`engine` and `torch` are `cllm-export collect` on a bundle and on its checkpoint. They tokenise prompts, prefill, keep
every Jacobi state, judge answers, and write shards and manifest; loading is not timed. `generate` is transformers
alone: greedy, with prompts sorted by length and padded on the left, including tokenising and prefill. It gives the
fixed points but no states. Each way runs at each batch size once per round, in turn. The report gives medians, and
ratios within a round for the best batch size of each way and for batch size 1. Processor seconds are reported beside
wall-clock seconds: for one thread they are its true cost, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from cllm_export.exporter.checkpoint.read import open_checkpoint
from cllm_export.exporter.pipeline import build
from cllm_export.prompts import read_prompts
from cllm_export.runtime.engines.machine import describe_machine
from cllm_export.training.collection.collect import collect
from cllm_export.training.collection.options import CollectOptions
from cllm_export.training.collection.source import open_source
from cllm_export.training.model.torch_engine import load_weights

BATCH_SIZES: dict[str, tuple[int, ...]] = {
    "engine": (1, 4, 8, 16),
    "torch": (1, 8, 16, 32),
    "generate": (1, 8, 32, 100),
}


class Way(NamedTuple):
    """One way of getting answers, at one batch size. ``run`` returns the number of new tokens."""

    name: str
    batch_size: int
    run: Callable[[], int]


def collecting(path: Path, name: str, batch_size: int, args: argparse.Namespace) -> Way:
    source = open_source(path, batch_size=batch_size, threads=args.threads)
    options = CollectOptions(limit=args.limit, max_new_tokens=args.max_new_tokens)

    def run() -> int:
        with tempfile.TemporaryDirectory() as directory:
            found = collect(source, args.prompts, Path(directory) / "trajectories", options)
            summary: dict[str, Any] = found.manifest.summary or {}
            return int(summary["new_tokens"])

    return Way(name, batch_size, run)


def generating(checkpoint: Path, batch_size: int, args: argparse.Namespace) -> Way:
    model = load_weights(open_checkpoint(checkpoint))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    end = open_checkpoint(checkpoint).eos_token_ids
    texts = sorted((str(prompt.content) for prompt in read_prompts(args.prompts, limit=args.limit)), key=len)

    def run() -> int:
        count = 0
        for start in range(0, len(texts), batch_size):
            encoded = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True)
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            with torch.inference_mode():
                output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=args.max_new_tokens)
            for row in output[:, ids.shape[1] :].tolist():
                ends = [index for index, token in enumerate(row) if token in end]
                count += ends[0] + 1 if ends else len(row)
        return count

    return Way("generate", batch_size, run)


def measure(ways: list[Way], rounds: int) -> list[dict[str, Any]]:
    """Warm up each way, then time rounds of all ways in turn, in wall-clock and processor seconds."""
    rows = [{"way": way.name, "batch_size": way.batch_size, "new_tokens": way.run()} for way in ways]
    for row in rows:
        row |= {"seconds": [], "processor_seconds": []}
    for number in range(rounds):
        for way, row in zip(ways, rows, strict=True):
            started, processor_started = perf_counter(), process_time()
            way.run()
            row["seconds"].append(perf_counter() - started)
            row["processor_seconds"].append(process_time() - processor_started)
        print(f"round {number + 1} of {rounds}", flush=True)
    return rows


def compare(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Speedup of the engine over each other way, all at their best batch size, and with the others at batch size 1."""
    chosen = {}
    for name in BATCH_SIZES:
        own = [row for row in rows if row["way"] == name]
        chosen[name] = min(own, key=lambda row: median(row[key]))
        chosen[f"{name} at batch size 1"] = next(row for row in own if row["batch_size"] == 1)
    engine = chosen["engine"][key]
    return {
        name: median(theirs / ours for theirs, ours in zip(row[key], engine, strict=True))
        for name, row in chosen.items()
        if name != "engine"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        bundle = build(args.checkpoint, Path(directory) / "bundle").path
        ways = [collecting(bundle, "engine", size, args) for size in BATCH_SIZES["engine"]]
        ways += [collecting(args.checkpoint, "torch", size, args) for size in BATCH_SIZES["torch"]]
        ways += [generating(args.checkpoint, size, args) for size in BATCH_SIZES["generate"]]
        rows = measure(ways, args.rounds)
    print(f"{'way':10} {'batch':>5} {'seconds':>8} {'processor':>9} {'tokens/s':>9}")
    for row in rows:
        clock, processor = median(row["seconds"]), median(row["processor_seconds"])
        rate = row["new_tokens"] / clock
        print(f"{row['way']:10} {row['batch_size']:5} {clock:8.2f} {processor:9.2f} {rate:9,.0f}")
    ratios = {key: compare(rows, key) for key in ("seconds", "processor_seconds")}
    for name, ratio in ratios["seconds"].items():
        print(f"engine against {name}: {ratio:.2f}x, in processor seconds {ratios['processor_seconds'][name]:.2f}x")
    if args.json:
        machine = describe_machine(args.threads) | {"torch": torch.__version__}
        report = {"machine": machine, "rows": rows, "ratios": ratios}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
