"""What the command line shows: tables, progress bars, coloured blocks. Quiet, plain and bar-free in a pipe."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cllm_export.bundle import Progress as ProgressCallback
from cllm_export.device_memory import Figure
from cllm_export.doctor import Finding
from cllm_export.runtime.generate import Generation, Model
from cllm_export.runtime.statistics import ForwardRecord, stationary_positions
from cllm_export.verify import Parity

PIPE_WIDTH = 200
"""Columns where there is no terminal to ask: no table of ours needs more, and a wrapped one is hard to read."""


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


OUT, ERR = _console(stderr=False), _console(stderr=True)

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


def say(line: str) -> None:
    """A line about the work itself, on standard error."""
    ERR.print(line, markup=False, style="dim")


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


def show_memory(figures: Sequence[Figure]) -> None:
    """Each figure and, below it, how it is computed."""
    for figure in figures:
        OUT.print(Text.assemble((f"{figure.name:<16} ", "bold"), f"{bytes_text(figure.bytes):>10}"))
        OUT.print(Text(f"    {figure.how}", "dim"))


def show_findings(findings: Sequence[Finding], report: Mapping[str, Any]) -> None:
    """What ``doctor`` found, and below each finding what mends it."""
    OUT.print(Text(report["system"], "bold"))
    for finding in findings:
        style = {"ok": "green", "not needed": "dim"}.get(finding.state, "bold red")
        OUT.print(Text.assemble(f"{finding.name:<13} ", (f"{finding.state:<11} ", style), finding.detail))
        if finding.fix:
            OUT.print(Text(f"    fix: {finding.fix}", "yellow"))
    usable = [name for name, works in report["engines"].items() if works]
    OUT.print(f"engines that can be used here: {', '.join(usable) or 'none'}")


def _description_lines(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shown = ("family", "precision", "block_size", "max_length", "batch_size", "eos_token_ids", "trained_with")
    for key in shown:
        value = description[key]
        yield key.replace("_", " "), _pairs(value) if isinstance(value, dict) else str(value or "-").strip("[]")
    if description["quantization"]:
        yield "quantization", _quantization_text(description["quantization"])
    for name, graph in description["graphs"].items():
        pinned = graph["fixed_shapes"]
        yield f"graph {name}", f"{graph['file']}: {_pairs(pinned) if pinned else 'symbolic B, n, S, h'}"
    for name, size in description["files"].items():
        yield f"file {name}", bytes_text(size)
    for path, size in description["linked_files"].items():
        yield "linked to", f"{path}: {bytes_text(size)}"
    for name, size in description["memory"].items():
        yield f"memory {name.replace('_', ' ')}", bytes_text(size)
    yield "fingerprint", description["fingerprint"]
    yield "parity", description["parity"]


def _quantization_text(quantization: Mapping[str, Any]) -> str:
    """What was quantised and, by reason, how many weights were not."""
    blocks = f", blocks of {quantization['block_size']}" if quantization["block_size"] else ""
    reasons = Counter(quantization["kept"].values())
    kept = "; ".join(f"{count} kept ({reason})" for reason, count in sorted(reasons.items()))
    scheme, engines = quantization["scheme"], ", ".join(quantization["engines"])
    return f"{scheme}, {quantization['method']}{blocks}, for {engines}: {len(quantization['weights'])} weights" + (
        f"; {kept}" if kept else ""
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def show_parity(parity: Parity) -> None:
    """Each check with its mark."""
    for check in parity.checks:
        mark, style = MARKS[check.passed]
        OUT.print(Text.assemble((mark, style), "  ", (check.name, "bold"), "  ", check.detail))
        if parts := check.data.get("parts"):
            OUT.print(_parts_table(parts))
    OUT.print(Text("verified", "bold green") if parity.passed else Text("not verified", "bold red"))


def _parts_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    """The error of each part of a graph."""
    table = _table("part", "largest error")
    for part in parts:
        table.add_row(part["part"], f"{part['error']:.1e}")
    return table


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


def show_evaluation(report: Mapping[str, Any]) -> None:
    """Scores and decoding measures of a model, and of its parent in the column beside it."""
    settings, models = report["settings"], report["models"]
    OUT.print(f"task {report['task']}, {_pairs(settings)}", markup=False)
    table = _table("", *(f"{name}: {entry['path']}" for name, entry in models.items()))
    for label, cells in _evaluation_rows(list(models.values()), settings):
        table.add_row(label, *cells)
    OUT.print(table)
    for note in dict.fromkeys(note for entry in models.values() for note in entry["scores"]["notes"]):
        OUT.print(f"note: {note}", style="dim", markup=False)


def _evaluation_rows(
    models: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    yield "prompts decoded", [f"{entry['decoded']} of {entry['prompts']}" for entry in models]
    yield "skipped", [_pairs(entry["skipped"]) or "none" for entry in models]
    for measure in models[0]["scores"]["all"]:
        yield _words(measure), [_share_text(entry["scores"]["all"].get(measure)) for entry in models]
    for group, shares in models[0]["scores"]["groups"].items():
        shown = list(shares)[:2]
        cells = [
            _group_text([entry["scores"]["groups"].get(group, {}).get(name) for name in shown]) for entry in models
        ]
        yield f"  {group}: {' / '.join(_words(name).removesuffix(' match') for name in shown)}", cells
    decoding = [entry["decoding"] for entry in models]
    yield "tokens per forward", [f"{entry['tokens_per_forward']:.2f}" for entry in decoding]
    yield "iterations per block", [f"{entry['iterations_per_block']:.2f}" for entry in decoding]
    for measure in ("fast_forwarded", "stationary"):
        label = f"{_words(measure)}, each {settings['block_size']} tokens"
        yield label, [f"{entry[f'{measure}_per_block']:.2f}" for entry in decoding]
    exact = [entry["exact"] for entry in decoding]
    yield "exact: equal to autoregressive", [f"{entry['equal']} of {entry['of']}" for entry in exact]
    yield "ended by", [_pairs(entry["finish_reasons"]) for entry in decoding]
    for matched in sorted({int(m) for entry in decoding for m in entry["acceptance_histogram"]}):
        counts = [entry["acceptance_histogram"].get(str(matched), 0) for entry in decoding]
        cells = [f"{count} ({count / entry['forwards']:.1%})" for count, entry in zip(counts, decoding, strict=True)]
        yield f"  forwards with {matched} draft tokens right", cells


def _share_text(share: Mapping[str, Any] | None) -> str:
    if not share or share["share"] is None:
        return "-"
    return f"{share['share']:.1%} ({share['right']} of {share['of']})"


def _group_text(shares: Sequence[Mapping[str, Any] | None]) -> str:
    texts = [f"{share['share']:.1%}" if share and share["share"] is not None else "-" for share in shares]
    return f"{' / '.join(texts)} of {max((share['of'] for share in shares if share), default=0)}"


def show_probe(report: Mapping[str, Any]) -> None:
    """What the readiness probe measured, and what it advises."""
    machine, best, verdict = report["machine"], report["best_form"], report["verdict"]
    OUT.print(
        f"{report['prompts']} prompts, {machine['threads']} thread(s), {machine['processor']}, "
        f"onnxruntime {machine['onnxruntime']}, skipped: {_pairs(report['skipped']) or 'none'}",
        markup=False,
    )
    forms = _table("loop", "fill", f"tokens/forward, n = {report['form_block_size']}")
    for form in report["forms"]:
        forms.add_row(form["method"], form["fill"], f"{form['tokens_per_forward']:.2f}")
    OUT.print(forms)
    OUT.print(f"with {best['method']} and fill {best['fill']}:", markup=False)
    OUT.print(_probe_table(report["sizes"]))
    OUT.print(Text.assemble((verdict["readiness"], "bold"), ": ", verdict["advice"]))
    OUT.print(verdict["meaning"], style="dim", markup=False)


def _probe_table(sizes: Sequence[Mapping[str, float]]) -> Table:
    table = _table("n", "TPF", "T(n) ms", "T(n)/T(1)", "expected", "even at TPF", "2x at TPF", "at most")
    for size in sizes:
        table.add_row(
            str(int(size["block_size"])),
            f"{size['tokens_per_forward']:.2f}",
            f"{size['milliseconds']:.2f}",
            f"{size['relative_time']:.2f}",
            f"{size['expected_speedup']:.2f}x",
            f"{size['break_even_tokens_per_forward']:.2f}",
            f"{size['twice_tokens_per_forward']:.2f}",
            f"{size['highest_speedup']:.2f}x",
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def show_collection(path: str, summary: Mapping[str, Any]) -> None:
    """What a collection holds, and of what was left out how much, why, and the first of it."""
    OUT.print(Text(path, "bold"))
    for name, value in _collection_lines(summary):
        OUT.print(Text.assemble((f"{name:<28} ", "dim"), value))
    for reason, entry in summary["dropped"].items():
        OUT.print(Text.assemble((f"{f'dropped: {reason}':<28} ", "dim"), f"{entry['count']:,} ({entry['detail']})"))


def _collection_lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "samples", f"{summary['samples']:,} of {summary['prompts']:,} prompts"
    yield "new tokens", f"{summary['new_tokens']:,} in {summary['forwards']:,} forwards"
    for name in ("tokens_per_forward", "iterations_per_block"):
        yield _words(name), "-" if summary[name] is None else f"{summary[name]:.2f}"
    for name in ("prompt_length", "answer_length"):
        spread = summary[name]
        yield _words(name), f"median {spread['median']:g}, p90 {spread['p90']:g} tokens" if spread else "-"


def show_tuning(path: str, report: Mapping[str, Any]) -> None:
    """What tuning did: quality and tokens per forward from the parent to the end."""
    dropped = _pairs(report["dropped"]) or "none"
    OUT.print(
        f"{report['samples']:,} samples (dropped: {dropped}), {report['steps']:,} steps, "
        f"{report['minutes']:.1f} minutes of training",
        markup=False,
    )
    table = _table("minutes", "step", "loss", "tokens/forward", "exact match", "repetitive")
    for entry in report["curve"]:
        loss = f"{entry['loss']:.3f}" if "loss" in entry else "-"
        rates = [f"{entry['tokens_per_forward']:.2f}", f"{entry['exact_match']:.1%}", f"{entry['repetitive']:.1%}"]
        table.add_row(f"{entry['minutes']:.1f}", str(entry["step"]), loss, *rates)
    OUT.print(table)
    reasons = {
        "done": f"wrote {path}",
        "patience": f"no further progress; wrote {path}",
        "collapse": f"collapsed into repetition; {path} holds the last good checkpoint: raise --autoregressive-weight "
        "or lower the learning rate",
    }
    OUT.print(reasons[report["stopped"]], markup=False)


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
    table = _table("bundle", *columns)
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
