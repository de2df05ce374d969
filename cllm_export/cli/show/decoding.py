"""What the command line shows of decoding: statistics, blocks, latencies, comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from cllm_export.cli.show.console import ACCEPTED, ERR, FAST_FORWARDED, OUT, REJECTED, STATIONARY, plain_table
from cllm_export.runtime.decoding.statistics import ForwardRecord, stationary_positions
from cllm_export.runtime.model import Model
from cllm_export.runtime.request_run import Generation


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
    reused = f" ({entry.reused_tokens} of {entry.prompt_tokens} tokens reused)" if entry.reused_tokens else ""
    ERR.print(
        f"[dim]{entry.new_tokens} tokens in {entry.forwards} forwards ({entry.tokens_per_forward:.2f} per forward), "
        f"{entry.tokens_per_second:,.0f} tokens/s, fast-forwarded {entry.fast_forwarded}, stationary "
        f"{entry.stationary}, prefill {entry.prefill_seconds * 1e3:.1f} ms{reused}, {generation.finish_reason}[/dim]"
    )
    if entry.on_device:
        reason = f": {entry.on_device.form_reason}" if entry.on_device.form_reason else ""
        ERR.print(
            f"on the device {entry.on_device.num_forwards} forwards, {entry.on_device.num_syncs} waits of the host "
            f"({entry.syncs_per_token:.3f} per token), {entry.on_device.form}{reason}",
            style="dim",
            markup=False,
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
    if report["auto"]:
        table.add_row(*_loop_cells("jacobi", "auto", report["auto"]))
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


def show_comparison(report: Mapping[str, Any]) -> None:
    """Every bundle at every n, the fastest first."""
    machine = report["machine"]
    OUT.print(
        f"{report['prompts']} prompts, {report['rounds']} rounds, {machine['threads']} thread(s), "
        f"{machine['processor']}, onnxruntime {machine['onnxruntime']}",
        markup=False,
    )
    columns = ("precision", "n", "MB", "TPF(n)", "T(1) ms", "T(n) ms", "TPF x T(1)/T(n)", "TPF/T(n) /s", "tokens/s")
    table = plain_table("bundle", *columns)
    for entry in report["settings"]:
        table.add_row(
            entry["name"],
            entry["precision"],
            str(entry["block_size"]),
            f"{entry['weight_bytes'] / 1e6:.1f}",
            f"{entry['tokens_per_forward']:.2f}",
            f"{entry['first_milliseconds']:.2f}",
            f"{entry['milliseconds']:.2f}",
            f"{entry['speedup']:.2f}",
            f"{entry['expected_tokens_per_second']:,.0f}",
            f"{entry['tokens_per_second']:,.0f}",
        )
    OUT.print(table)
    best = report["settings"][0]
    OUT.print(f"fastest here: {best['name']} ({best['precision']}) with n = {best['block_size']}", markup=False)
