"""Time forwards of one and of n tokens: our bundles, llama.cpp and ONNX Runtime GenAI, in turn, in one run.

    python benchmarks/peer_forwards.py --bundle fp32=BUNDLE --bundle int8=INT8_BUNDLE \
        --llama-python LLAMA_ENV/bin/python --llama Q8_0=FILE.gguf --genai-python ENV/bin/python --genai int4=MODEL \
        [--threads 1 --threads 2] [--reference "llama.cpp Q8_0"] [--tokens-per-forward 6.1] [--json OUT]

``benchmarks/peers/README.md`` explains how to make the environments and models. ``peers/*_forwards.py`` define what a
forward is. Each tool, precision and number of threads has its own process for the whole run, pinned to as many cores as
it has threads. A round runs all of them in turn, and each round starts with another one. A value is the median of the
forwards of one round, after untimed ones. The table shows the median over rounds, with quartiles. Ratios are computed
within a round. The table also counts the predictions that equal the first model's: of one block, to check that all
compute the same model, or with ``--text`` of every token of a text, with its perplexity. With random weights, rounding
changes some predictions. The peak is the largest resident memory of the process, mapped files included.

Tokens per second are derived, not measured: 1 / T(1), and for our bundles also tokens per forward / T(n), with the
given tokens per forward. They leave out loop, sampling and prefill, for our bundles and for the others.

Several threads need as many idle cores. llama.cpp's threads wait for each other by spinning. If another process used
one of the cores, its forwards were seen to take many times as long. Do not set OMP_WAIT_POLICY=passive against that: on
an idle machine it makes llama.cpp two to three times slower. The load average before the run is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import sleep
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from cllm_export.bundle.manifest import open_bundle
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.machine import describe_machine
from cllm_export.runtime.general_text import general_passages
from cllm_export.runtime.teacher_forced import general_texts

PEERS = Path(__file__).resolve().parent / "peers"
OURS, GENAI, LLAMA = "cllm-export", "GenAI", "llama.cpp"
SCRIPTS = {OURS: "cllm_forwards.py", GENAI: "genai_forwards.py", LLAMA: "llama_cpp_forwards.py"}
GENERAL = Path("general")
TEXT_LENGTH = 256
"""Tokens of a text that are read as one: reading the past again for every block keeps texts short."""
PAUSE = 0.3
"""Seconds before a row is timed: threads of the one before spin for a while after their last forward."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tool with one model and one number of threads: a line of the table."""

    tool: str
    precision: str
    model: Path
    python: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.tool} {self.precision}"

    @property
    def bytes(self) -> int:
        """Bytes of the weights. A bundle may link them from elsewhere; other models are as large as their files."""
        if self.tool == OURS:
            return open_bundle(self.model).weight_bytes
        files = self.model.rglob("*") if self.model.is_dir() else [self.model]
        return sum(path.stat().st_size for path in files if path.is_file())


class Worker:
    """The process of a row. ``peers/forward_worker.py`` defines what it reads and writes."""

    def __init__(self, row: Row, process: subprocess.Popen[str]) -> None:
        self._row = row
        self._requests, self._answers = _pipes(process)
        self.facts: dict[str, str] = self._read()

    def time(self, block_size: int, past: int, warm_up: int, timed: int) -> list[float]:
        """Milliseconds of each of the timed forwards."""
        times: list[float] = self._ask(f"time {block_size} {past} {warm_up} {timed}")
        return times

    def predict(self, block_size: int, past: int) -> list[int]:
        """The greedy token after each token of a block."""
        predictions: list[int] = self._ask(f"predict {block_size} {past}")
        return predictions

    def read_text(self, tokens: tuple[int, ...]) -> tuple[list[int], float]:
        """The greedy token after each inner token of a text, and the log-probability of the tokens after them."""
        predicted, total = self._ask(" ".join(map(str, ("text", *tokens))))
        return predicted, total

    def memory(self) -> int:
        """Bytes of the largest resident memory so far."""
        largest: int = self._ask("memory")
        return largest

    def _ask(self, request: str) -> Any:
        self._requests.write(request + "\n")
        self._requests.flush()
        return self._read()

    def _read(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"{self._row.name} on {self._row.threads} thread(s) ended; its own words stand above")
        return json.loads(line)


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


@contextmanager
def start(row: Row, cores: list[int], context_length: int) -> Iterator[Worker]:
    """The worker of a row, with its model loaded. It ends when the block ends."""
    pinned = ",".join(map(str, cores[: row.threads]))
    command = ["taskset", "-c", pinned, row.python, str(PEERS / SCRIPTS[row.tool]), str(row.model)]
    command += ["--threads", str(row.threads), "--context-length", str(context_length)]
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(row.threads))}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, encoding="utf-8"
    )
    try:
        yield Worker(row, process)
    finally:
        process.kill()  # it holds no resource except memory
        process.communicate()


def make_rows(args: argparse.Namespace) -> list[Row]:
    """The requested rows, ordered by threads, our bundles first."""
    rows = []
    for threads in args.threads:
        for tool, python, models in (
            (OURS, sys.executable, args.bundle),
            (LLAMA, args.llama_python, args.llama),
            (GENAI, args.genai_python, args.genai),
        ):
            if models and python is None:
                raise SystemExit(f"models of {tool} need the Python of its environment: see benchmarks/peers/README.md")
            for precision, model in models:
                rows.append(Row(tool=tool, precision=precision, model=model, python=str(python), threads=threads))
    names = [(row.name, row.threads) for row in rows]
    if not rows or len(set(names)) != len(names):
        raise SystemExit("give at least one model, each a NAME of its own, and each number of threads once")
    if args.reference is not None and args.reference not in {row.name for row in rows}:
        raise SystemExit(f"--reference must be one of {sorted({row.name for row in rows})}, got {args.reference!r}")
    return rows


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The answers of a row's worker."""

    facts: dict[str, str]
    predictions: list[int]
    milliseconds: dict[int, list[float]]
    """Block size -> one value per round."""
    perplexity: float | None
    """Of the text; None if there is none."""
    memory: int
    """Bytes of the largest resident memory of the process before the text was read."""


def measure(rows: list[Row], args: argparse.Namespace) -> dict[Row, Measured]:
    """Time every forward of every row, in turn. What a row predicts comes after that."""
    sizes = (1, *args.block_sizes)
    texts = read_texts(args.text, rows) if args.text else []
    with ExitStack() as stack:
        workers = {row: stack.enter_context(start(row, args.cores, args.context_length)) for row in rows}
        milliseconds: dict[Row, dict[int, list[float]]] = {row: {n: [] for n in sizes} for row in rows}
        for number in range(args.rounds + 1):
            first = number % len(rows)
            for row in rows[first:] + rows[:first]:
                sleep(PAUSE)
                for n, values in milliseconds[row].items():
                    value = median(workers[row].time(n, args.past, args.warm_up, args.timed))
                    if number > 0:  # the first round is a warm-up
                        values.append(value)
        return {row: judged(worker, milliseconds[row], texts, args) for row, worker in workers.items()}


def judged(
    worker: Worker, milliseconds: dict[int, list[float]], texts: list[tuple[int, ...]], args: argparse.Namespace
) -> Measured:
    """What a row predicts: of the texts, or of one block if there are none."""
    memory, perplexity = worker.memory(), None
    if texts:
        readings = [worker.read_text(text) for text in texts]
        predictions = [token for predicted, _ in readings for token in predicted]
        perplexity = math.exp(-sum(total for _, total in readings) / len(predictions))
    else:
        predictions = worker.predict(max(args.block_sizes), args.past)
    return Measured(
        facts=worker.facts, predictions=predictions, milliseconds=milliseconds, perplexity=perplexity, memory=memory
    )


def read_texts(text: Path, rows: list[Row]) -> list[tuple[int, ...]]:
    """A file of text, or the package's own general text, as tokens of the first bundle's tokenizer."""
    bundle = next((row.model for row in rows if row.tool == OURS), None)
    if bundle is None:
        raise SystemExit("--text needs a bundle, whose tokenizer reads it")
    codec = TextCodec.of_bundle(open_bundle(bundle))
    passages = general_passages(None if text == GENERAL else text)
    return [each.tokens for each in general_texts(codec, passages, max_length=TEXT_LENGTH)]


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def summarize(measured: dict[Row, Measured], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The report of each row. Ratios are relative to the reference with the same number of threads."""
    references = {row.threads: each.milliseconds for row, each in measured.items() if row.name == args.reference}
    expected = next(iter(measured.values())).predictions
    report = []
    for row, each in measured.items():
        one, many = each.milliseconds[1], each.milliseconds[args.block_sizes[-1]]
        entry: dict[str, Any] = {"name": row.name, "threads": row.threads, "bytes": row.bytes, "facts": each.facts}
        entry["memory"] = each.memory
        entry["perplexity"] = each.perplexity
        entry["predictions"] = len(expected)
        entry["predictions_alike"] = sum(a == b for a, b in zip(each.predictions, expected, strict=True))
        entry["milliseconds"] = {str(n): spread(values) for n, values in each.milliseconds.items()}
        entry["of_each_round"] = {str(n): values for n, values in each.milliseconds.items()}
        entry["ratio_of_sizes"] = spread([b / a for a, b in zip(one, many, strict=True)])
        if references:
            entry["to_reference"] = {
                str(n): spread([a / b for a, b in zip(values, references[row.threads][n], strict=True)])
                for n, values in each.milliseconds.items()
            }
        entry["derived_tokens_per_second"] = {"autoregressive": 1e3 / median(one)}
        if row.tool == OURS and args.tokens_per_forward:
            entry["derived_tokens_per_second"]["jacobi"] = 1e3 * args.tokens_per_forward / median(many)
        report.append(entry)
    return report


def show(report: list[dict[str, Any]], args: argparse.Namespace) -> None:
    sizes = [str(n) for n in (1, *args.block_sizes)]
    for threads in args.threads:
        table = Table(
            title=f"{threads} thread(s), after {args.past} tokens: medians (quartiles) of {args.rounds} rounds"
        )
        table.add_column("", no_wrap=True)
        predictions = report[0]["predictions"]
        headers = ["MB", "peak MB", f"alike, of {predictions}", *(["perplexity"] if args.text else [])]
        headers += [*(f"T({n}) ms" for n in sizes), f"T({sizes[-1]}) / T(1)"]
        headers += [f"T({n}) / {args.reference}'s" for n in sizes] if args.reference else []
        headers += ["autoregressive, derived tokens/s", f"Jacobi n = {sizes[-1]}, derived tokens/s"]
        for header in headers:
            table.add_column(header, justify="right")
        for entry in report:
            if entry["threads"] == threads:
                table.add_row(*cells(entry, sizes))
        Console(width=None if sys.stdout.isatty() else 240).print(table)
    print(f"Load average before the run: {args.load_average:.1f}, on {os.cpu_count()} cores.")
    if args.tokens_per_forward:
        print(
            f"Jacobi: {args.tokens_per_forward} tokens a forward, as given. Derived rates leave out loop and prefill."
        )


def cells(entry: dict[str, Any], sizes: list[str]) -> list[str]:
    def text(value: dict[str, float], digits: int) -> str:
        return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}-{value['high']:.{digits}f})"

    made = [
        entry["name"],
        f"{entry['bytes'] / 1e6:.0f}",
        f"{entry['memory'] / 1e6:.0f}",
        alike(entry),
        *([f"{entry['perplexity']:.3f}"] if entry["perplexity"] else []),
        *(text(entry["milliseconds"][n], 1) for n in sizes),
    ]
    made.append(f"{entry['ratio_of_sizes']['median']:.2f}")
    if "to_reference" in entry:
        made += [text(entry["to_reference"][n], 2) for n in sizes]
    derived = entry["derived_tokens_per_second"]
    made.append(f"{derived['autoregressive']:.1f}")
    made.append(f"{derived['jacobi']:.1f}" if "jacobi" in derived else "-")
    return made


def alike(entry: dict[str, Any]) -> str:
    same, total = entry["predictions_alike"], entry["predictions"]
    return f"{same} ({same / total:.1%})" if entry["perplexity"] else str(same)


def named_model(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and Path(path).exists()):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH of a model that exists, got {text!r}")
    return name, Path(path)


def at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def parse() -> argparse.Namespace:
    def positive(text: str) -> int:
        return at_least(1, text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, what in (("--bundle", "a bundle"), ("--llama", "a GGUF file"), ("--genai", "a directory of its builder")):
        parser.add_argument(flag, type=named_model, action="append", default=[], metavar="NAME=PATH", help=what)
    parser.add_argument("--llama-python", type=Path, help="Python with llama-cpp-python")
    parser.add_argument("--genai-python", type=Path, help="Python with onnxruntime-genai")
    parser.add_argument("--threads", type=positive, action="append", help="repeatable (1)")
    parser.add_argument(
        "--block-size",
        type=lambda text: at_least(2, text),
        action="append",
        dest="block_sizes",
        help="n; repeatable (16)",
    )
    parser.add_argument(
        "--text", type=Path, help=f"compare predictions on a file of text, or on the package's own ({GENERAL})"
    )
    parser.add_argument("--past", type=positive, default=64, help="tokens before the block (64)")
    parser.add_argument("--context-length", type=positive, default=512, help="of every peer's cache (512)")
    parser.add_argument("--rounds", type=lambda text: at_least(2, text), default=15)
    parser.add_argument("--warm-up", type=positive, default=2, help="untimed forwards before each value (2)")
    parser.add_argument("--timed", type=positive, default=3, help="forwards behind each value (3)")
    parser.add_argument("--reference", help="row that the others are divided by, as 'llama.cpp Q8_0'")
    parser.add_argument("--tokens-per-forward", type=float, help="of Jacobi decoding at n, to derive tokens per second")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.threads = args.threads or [1]
    args.block_sizes = sorted(set(args.block_sizes or [16]))
    args.load_average = os.getloadavg()[0]
    args.cores = sorted(os.sched_getaffinity(0), reverse=True)
    if max(args.threads) > len(args.cores):
        parser.error(f"--threads {max(args.threads)} needs as many cores, and this process may use {args.cores}")
    return args


def main() -> None:
    args = parse()
    rows = make_rows(args)
    report = summarize(measure(rows, args), args)
    show(report, args)
    if args.json:
        names = (
            "load_average",
            "past",
            "block_sizes",
            "context_length",
            "rounds",
            "warm_up",
            "timed",
            "cores",
            "reference",
        )
        settings = {name: getattr(args, name) for name in (*names, "tokens_per_forward")}
        settings["text"] = str(args.text) if args.text else None
        processor = describe_machine(None)["processor"]
        written = {"processor": processor, "settings": settings, "rows": report}
        args.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
