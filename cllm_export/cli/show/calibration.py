"""Command line output of the calibration commands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from cllm_export.bundle.quantization import UNQUANTISED
from cllm_export.calibration.search.measured import QUALITY_MEASURES, is_evidence
from cllm_export.cli.show.console import OUT, words
from cllm_export.cli.show.decoding import show_bench
from cllm_export.progress import counted

MAX_SHOWN = 10
AGREEMENTS = {
    "same token, known texts": "agreement",
    "same token, general text": "general_agreement",
    "same token, texts of the prompts": "prompts_agreement",
}
"""Labels of the share of teacher-forced rows that predict the unquantised bundle's token, and their keys."""
LIMITS = {
    "max_tpf_loss": "tokens per forward lost within",
    "min_agreement": "agreement at least",
    "max_perplexity_rise": "perplexity risen within",
    "min_same_text": "equal texts at least",
    "max_quality_loss": "quality lost within",
}
"""Limits of a budget, in words."""


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
    yield "  change", ["", *(change(-entry["tpf_loss"]) for entry in candidates)]
    for label, key in AGREEMENTS.items():
        yield label, ["", *(f"{entry[key]['share']:.1%} of {entry[key]['of']:,}" for entry in candidates)]
    yield "perplexity, general text", [f"{entry['general_perplexity']:.4g}" for entry in entries]
    rises = (entry["general_perplexity"] / entries[0]["general_perplexity"] - 1 for entry in candidates)
    yield "  change", ["", *map(change, rises)]
    yield "perplexity, texts of the prompts", [f"{entry['perplexity']:.4g}" for entry in entries]
    for stage in candidates[0]["flips"]:
        flips = [entry["flips"][stage] for entry in candidates]
        yield f"flips, {stage}", ["", *(f"{each['rate']:.3%} of {each['rows']:,}" for each in flips)]
        yield "  right ones lost / gained", ["", *(f"{each['lost']} / {each['gained']}" for each in flips)]
    exact = [entry["exact_match"] for entry in candidates]
    yield "same text", ["", *(f"{each['equal']} of {each['of']}" for each in exact)]
    divergences = [entry["first_divergence"] for entry in candidates]
    yield "first divergence, median token", ["", *(f"{each['median']:g}" if each else "-" for each in divergences)]
    for measure, first in entries[0]["scores"].items():
        if first["share"] is not None:
            shares = [entry["scores"][measure]["share"] for entry in entries]
            doubt = "" if measure not in QUALITY_MEASURES or is_evidence(*shares) else " (no evidence: none is right)"
            yield words(measure) + doubt, [f"{share:.1%}" for share in shares]


def change(share: float) -> str:
    """A change with its sign, so that a gain reads as a gain."""
    return f"{share:+.2%}" if round(share, 4) else "none"


def show_choice(path: str, report: Mapping[str, Any]) -> None:
    """Print which layers kept their precision and why, what each precision loses, and which one was the fastest."""
    allowed = [f"{text} {report[name]:.1%}" for name, text in LIMITS.items() if report[name] is not None]
    OUT.print(f"budget: {', '.join(allowed)}", markup=False)
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
    table = make_table(report["scheme"], "tokens per forward", "agreement", "perplexity", "equal texts", "quality")
    for trial in report["trials"]:
        table.add_row(
            f"{trial['num_kept']} kept, {trial['measured_on']}",
            change(-trial["tpf_loss"]),
            f"{trial['agreement']:.1%}",
            change(trial["perplexity_rise"]),
            f"{trial['same_text']:.1%}",
            _quality_text(trial),
        )
    OUT.print(table)


def _quality_text(losses: Mapping[str, Any]) -> str:
    """The change of the score. A score is no evidence if neither bundle has a right answer."""
    if losses["quality_measure"] == "same_text":
        return "no evidence: no right answers"
    return f"{change(-losses['quality_loss'])} ({words(losses['quality_measure'])})"


def _in_a_word(report: Mapping[str, Any]) -> str:
    """What was chosen and why, in a few words."""
    chosen = next((each for each in report["candidates"] if each["scheme"] == report["chosen"]), None)
    said = [report["chosen"]]
    if chosen:
        said += [
            f"{len(chosen['kept'])} layers kept",
            f"agreement {chosen['agreement']:.1%}",
            f"change of tokens per forward {change(-chosen['tpf_loss'])}",
            f"of perplexity {change(chosen['perplexity_rise'])}",
            f"equal texts {chosen['same_text']:.1%}",
        ]
    if report["timings"]:
        settings = report["timings"]["settings"]
        plain = next(entry for entry in settings if entry["name"] == UNQUANTISED)
        gain = settings[0]["tokens_per_second"] / plain["tokens_per_second"]
        said.append(
            f"{gain:.2f}x the unquantised bundle's tokens per second, at n = {settings[0]['block_size']}"
            if chosen
            else "no quantised bundle within the budget is faster here than the unquantised one"
        )
    return ", ".join(said)


def make_table(first: str, *others: str) -> Table:
    """A table without lines: names on the left, numbers on the right."""
    table = Table(box=None)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
