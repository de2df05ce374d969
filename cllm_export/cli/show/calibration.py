"""Command line output of the calibration commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from cllm_export.bundle.quantization import UNQUANTISED
from cllm_export.cli.show.console import OUT
from cllm_export.cli.show.decoding import show_bench
from cllm_export.progress import counted

MAX_SHOWN = 10


def show_calibration(report: Mapping[str, Any]) -> None:
    """Print what was observed, and which channels have outlying ranges."""
    rows = report["rows"]
    total = sum(rows.values())
    shares = ", ".join(f"{kind} {count:,} ({count / total:.0%})" for kind, count in rows.items())
    OUT.print(
        f"{counted(report['prompts'], 'prompt')}, {report['skipped']} skipped; {total:,} rows: {shares}", markup=False
    )
    if report["outliers"]:
        OUT.print(_outlier_table(report["outliers"]))
    gram = " and Gram matrices" if report["gram"] else ""
    OUT.print(f"wrote {report['scales']}: ranges{gram} of {report['layers']} layers", markup=False)


def _outlier_table(outliers: list[Mapping[str, Any]]) -> Table:
    table = make_table("outliers in the input of", "channel", "amax", "x median", "99.9 % / amax", "dead channels")
    for entry in outliers[:MAX_SHOWN]:
        note = " (beyond fp16)" if entry["overflows_fp16"] else ""
        table.add_row(
            entry["input"],
            str(entry["channel"]),
            f"{entry['amax']:.4g}{note}",
            f"{entry['ratio']:.1f}",
            f"{entry['high_share']:.4f}",
            str(entry["dead_channels"]),
        )
    if (left := len(outliers) - MAX_SHOWN) > 0:
        table.add_row(f"and {left} more", "", "", "", "", "")
    return table


def show_convergence(report: Mapping[str, Any]) -> None:
    """Print what each bundle lost against the unquantised one, one column per bundle."""
    baseline, candidates = report["baseline"], report["candidates"]
    entries = [baseline, *candidates]
    OUT.print(f"{counted(report['prompts'], 'prompt')}, n = {report['settings']['block_size']}", markup=False)
    table = make_table("", *(entry["path"] for entry in entries))
    for label, cells in _convergence_rows(entries):
        table.add_row(label, *cells)
    OUT.print(table)


def _convergence_rows(entries: list[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Rows of the table. The unquantised bundle comes first and has no comparison."""
    candidates = entries[1:]
    yield "weights, MB", [f"{entry['weight_bytes'] / 1e6:.1f}" for entry in entries]
    yield "tokens per forward", [f"{entry['tokens_per_forward']:.3f}" for entry in entries]
    yield "tokens per forward lost", ["", *(f"{entry['tpf_loss']:.2%}" for entry in candidates)]
    for stage in candidates[0]["flips"]:
        flips = [entry["flips"][stage] for entry in candidates]
        yield f"flips, {stage}", ["", *(f"{each['rate']:.3%} of {each['rows']:,}" for each in flips)]
        yield "  right ones lost / gained", ["", *(f"{each['lost']} / {each['gained']}" for each in flips)]
    exact = [entry["exact_match"] for entry in candidates]
    yield "same text", ["", *(f"{each['equal']} of {each['of']}" for each in exact)]
    divergences = [entry["first_divergence"] for entry in candidates]
    yield "first divergence, median token", ["", *(f"{each['median']:g}" if each else "-" for each in divergences)]
    yield "perplexity", [f"{entry['perplexity']:.4f}" for entry in entries]
    for measure, first in entries[0]["scores"].items():
        if first["share"] is not None:
            yield measure.replace("_", " "), [f"{entry['scores'][measure]['share']:.1%}" for entry in entries]


def show_choice(path: str, report: Mapping[str, Any]) -> None:
    """Print which layers kept their precision and why, what each precision loses, and which one was the fastest."""
    allowed = f"{report['max_tpf_loss']:.2%} of the tokens per forward"
    if report["max_quality_loss"] is not None:
        allowed += f", {report['max_quality_loss']:.2%} of the quality"
    OUT.print(f"budget: {allowed}", markup=False)
    for candidate in report["candidates"]:
        _show_candidate(candidate)
    if report["timings"]:
        show_bench(report["timings"])
    OUT.print(f"wrote {path}: {_in_a_word(report)}", markup=False)


def _show_candidate(report: Mapping[str, Any]) -> None:
    if report["refused"]:
        OUT.print(f"{report['scheme']}: {report['refused']}", markup=False)
        return
    ranking = {entry["layer"]: index + 1 for index, entry in enumerate(report["sensitivity"])}
    if report["kept"]:
        table = make_table(
            "kept in full precision", "rank", "flips alone", "right ones lost / gained", "TPF lost alone"
        )
        for entry in report["kept"]:
            flips = entry["flips"]["all"]
            table.add_row(
                entry["layer"],
                f"{ranking[entry['layer']]} of {len(ranking)}",
                f"{flips['rate']:.3%}",
                f"{flips['lost']} / {flips['gained']}",
                f"{entry['tpf_loss']:.2%}",
            )
        OUT.print(table)
    trials = ", ".join(
        f"{trial['num_kept']} kept: {trial['tpf_loss']:.2%} and {trial['quality_loss']:.2%} ({trial['measured_on']})"
        for trial in report["trials"]
    )
    OUT.print(f"{report['scheme']}, tokens per forward and quality lost: {trials}", markup=False)


def _in_a_word(report: Mapping[str, Any]) -> str:
    """What was chosen and why, in a few words."""
    chosen = next((each for each in report["candidates"] if each["scheme"] == report["chosen"]), None)
    words = [report["chosen"]]
    if chosen:
        words.append(f"{len(chosen['kept'])} layers kept, {chosen['tpf_loss']:.2%} of the tokens per forward lost")
    if report["timings"]:
        settings = report["timings"]["settings"]
        plain = next(entry for entry in settings if entry["name"] == UNQUANTISED)
        gain = settings[0]["tokens_per_second"] / plain["tokens_per_second"]
        words.append(
            f"{gain:.2f}x the unquantised bundle's tokens per second, at n = {settings[0]['block_size']}"
            if chosen
            else "no quantised bundle within the budget is faster here than the unquantised one"
        )
    return ", ".join(words)


def make_table(first: str, *others: str) -> Table:
    """A table without lines: names on the left, numbers on the right."""
    table = Table(box=None)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
