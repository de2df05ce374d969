"""What the command line shows: tables, progress bars, coloured blocks. Quiet, plain and bar-free in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cllm_export.bundle import Progress as ProgressCallback
from cllm_export.runtime.generate import Generation, Model
from cllm_export.runtime.statistics import ForwardRecord, stationary_positions
from cllm_export.verify import Parity

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)

FAST_FORWARDED, ACCEPTED, STATIONARY, REJECTED = "green", "bold white on green", "yellow", "dim"
MARKS = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("skip", "yellow")}


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A progress callback that draws on standard error, and only if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


def bytes_text(size: float) -> str:
    """A size in bytes as people write it: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def show_description(description: Mapping[str, Any]) -> None:
    """What ``inspect`` found, a line for each thing."""
    OUT.print(Text(description["path"], "bold"))
    for name, value in _description_lines(description):
        OUT.print(Text.assemble((f"{name:<28} ", "dim"), value))


def _description_lines(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shown = ("family", "precision", "block_size", "max_length", "batch_size", "eos_token_ids", "trained_with")
    for key in shown:
        value = description[key]
        yield key.replace("_", " "), _pairs(value) if isinstance(value, dict) else str(value or "-").strip("[]")
    for name, graph in description["graphs"].items():
        pinned = graph["fixed_shapes"]
        yield f"graph {name}", f"{graph['file']}: {_pairs(pinned) if pinned else 'symbolic B, n, S, h'}"
    for name, size in description["files"].items():
        yield f"file {name}", bytes_text(size)
    for name, size in description["memory"].items():
        yield f"memory {name.replace('_', ' ')}", bytes_text(size)
    yield "fingerprint", description["fingerprint"]
    yield "parity", description["parity"]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def show_parity(parity: Parity) -> None:
    """Each check with its mark."""
    for check in parity.checks:
        mark, style = MARKS[check.passed]
        OUT.print(Text.assemble((mark, style), "  ", (check.name, "bold"), "  ", check.detail))
    OUT.print(Text("verified", "bold green") if parity.passed else Text("not verified", "bold red"))


def show_bench(report: Mapping[str, Any]) -> None:
    """The loops, the sweep and the latencies of a bench report."""
    machine = report["machine"]
    OUT.print(
        f"{report['prompts']} prompts, {report['repeats']} repeats, {machine['threads']} thread(s), "
        f"{machine['processor']}, onnxruntime {machine['onnxruntime']}"
    )
    OUT.print(_loops_table(report))
    if latency := report.get("latency"):
        OUT.print(_latency_table(latency))
    if other := report.get("transformers"):
        OUT.print(f"transformers generate: {other['tokens_per_second_with_prefill']:,.0f} tokens/s, prefill included")


def show_statistics(generation: Generation) -> None:
    """One line of statistics, on standard error: the text on standard output stays clean."""
    entry = generation.statistics
    ERR.print(
        f"[dim]{entry.new_tokens} tokens in {entry.forwards} forwards ({entry.tokens_per_forward:.2f} per forward), "
        f"{entry.tokens_per_second:,.0f} tokens/s, fast-forwarded {entry.fast_forwarded}, stationary "
        f"{entry.stationary}, prefill {entry.prefill_seconds * 1e3:.1f} ms, {generation.finish_reason}[/dim]"
    )


def show_blocks(model: Model, generation: Generation) -> None:
    """A line for each forward: the block it verified, coloured by what became of each token.

    Fast-forwarded are the draft tokens found right; accepted is the one token that every forward gives, the model's own
    after them; stationary are right already and wait for one before them; the rest was wrong.
    """
    legend = (
        ("fast-forwarded", FAST_FORWARDED),
        ("accepted", ACCEPTED),
        ("stationary", STATIONARY),
        ("rejected", REJECTED),
    )
    OUT.print(Text.assemble("block: ", *((f" {name} ", style) for name, style in legend)))
    records = generation.forwards
    end = records[0].write_index + len(generation.token_ids) if records else 0
    for index, record in enumerate(records):
        following = records[index + 1] if index + 1 < len(records) else None
        OUT.print(_block_line(model, index + 1, record, following, end))


def _block_line(model: Model, number: int, record: ForwardRecord, following: ForwardRecord | None, end: int) -> Text:
    still_right = set(stationary_positions(record, following)) if following else set()
    line = Text.assemble((f"{number:>3} ", "dim"))
    if record.num_accepted == 1:
        line.append(_token_text(model, record.next_ids[0]), ACCEPTED)
    for row in range(1, len(record.block)):
        position = record.write_index + row
        if position > end:
            break
        rejected = STATIONARY if position in still_right else REJECTED
        line.append(_token_text(model, record.block[row]), FAST_FORWARDED if row < record.num_accepted else rejected)
        if row + 1 == record.num_accepted and position < end:
            line.append(_token_text(model, record.next_ids[row]), ACCEPTED)
    return line


def _token_text(model: Model, token: int) -> str:
    text = model.codec.tokenizer.decode([token], skip_special_tokens=False)
    return text.replace("\n", "\\n") or "·"


def _loops_table(report: Mapping[str, Any]) -> Table:
    table = Table(box=None)
    for name in ("loop", "n", "tokens/s", "tokens/forward", "speedup", "with prefill", "overhead"):
        table.add_column(name, justify="left" if name == "loop" else "right")
    for name, entry in report["loops"].items():
        table.add_row(
            *_loop_cells(
                name, str(report["autoregressive_block_size" if name == "autoregressive" else "block_size"]), entry
            )
        )
    for size, entry in report["sweep"].items():
        table.add_row(*_loop_cells("jacobi", size, entry))
    return table


def _loop_cells(name: str, block_size: str, entry: Mapping[str, Any]) -> Sequence[str]:
    ratios = [f"{entry[key]:.2f}x" if entry[key] else "-" for key in ("speedup", "speedup_with_prefill")]
    return (
        name,
        block_size,
        f"{entry['tokens_per_second']:,.0f}",
        f"{entry['tokens_per_forward']:.2f}",
        *ratios,
        f"{entry['overhead']:.3f}",
    )


def _latency_table(latency: Sequence[Mapping[str, float]]) -> Table:
    table = Table(box=None)
    for name in ("n", "T(n) ms", "T(n)/T(1)"):
        table.add_column(name, justify="right")
    for entry in latency:
        table.add_row(str(int(entry["block_size"])), f"{entry['milliseconds']:.2f}", f"{entry['ratio']:.2f}")
    return table
