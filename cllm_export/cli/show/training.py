"""Command line output about evaluations, collections and tuning runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from cllm_export.cli.show.bundle import _pairs
from cllm_export.cli.show.console import OUT, plain_table, words
from cllm_export.evaluation.tasks.score_prompts import EMPTY
from cllm_export.progress import counted


def show_evaluation(report: Mapping[str, Any]) -> None:
    """Print scores and decoding measures of a model, with those of its parent in the next column."""
    settings, models = report["settings"], report["models"]
    OUT.print(f"task {report['task']}, {_pairs(settings)}", markup=False)
    table = plain_table("", *(f"{name}: {entry['path']}" for name, entry in models.items()))
    for label, cells in _evaluation_rows(list(models.values()), settings):
        table.add_row(label, *cells)
    OUT.print(table)
    if report["compared"]:
        OUT.print(_compared_text(report["compared"]), markup=False)
    for note in dict.fromkeys(note for entry in models.values() for note in entry["scores"]["notes"]):
        OUT.print(f"note: {note}", style="dim", markup=False)


def _evaluation_rows(
    models: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    yield "prompts decoded", [f"{entry['decoded']} of {entry['prompts']}" for entry in models]
    yield "skipped", [_pairs(entry["skipped"]) or "none" for entry in models]
    for measure in models[0]["scores"]["all"]:
        shares = [entry["scores"]["all"].get(measure) for entry in models]
        doubt = " (no evidence: none is right)" if _is_no_evidence(measure, shares) else ""
        yield words(measure) + doubt, [_share_text(share) for share in shares]
    for group, shares in models[0]["scores"]["groups"].items():
        shown = list(shares)[:2]
        cells = [
            _group_text([entry["scores"]["groups"].get(group, {}).get(name) for name in shown]) for entry in models
        ]
        yield f"  {group}: {' / '.join(words(name).removesuffix(' match') for name in shown)}", cells
    yield "perplexity, general text", [f"{entry['general_perplexity']:.4g}" for entry in models]
    decoding = [entry["decoding"] for entry in models]
    yield "tokens per forward", [f"{entry['tokens_per_forward']:.2f}" for entry in decoding]
    yield "iterations per block", [f"{entry['iterations_per_block']:.2f}" for entry in decoding]
    for measure in ("fast_forwarded", "stationary"):
        label = f"{words(measure)}, each {settings['block_size']} tokens"
        yield label, [f"{entry[f'{measure}_per_block']:.2f}" for entry in decoding]
    exact = [entry["exact"] for entry in decoding]
    yield "exact: equal to autoregressive", [f"{entry['equal']} of {entry['of']}" for entry in exact]
    yield "ended by", [_pairs(entry["finish_reasons"]) for entry in decoding]
    for matched in sorted({int(m) for entry in decoding for m in entry["acceptance_histogram"]}):
        counts = [entry["acceptance_histogram"].get(str(matched), 0) for entry in decoding]
        cells = [f"{count} ({count / entry['forwards']:.1%})" for count, entry in zip(counts, decoding, strict=True)]
        yield f"  forwards with {matched} draft tokens right", cells


def _is_no_evidence(measure: str, shares: Sequence[Mapping[str, Any] | None]) -> bool:
    """Whether models are compared by a score that none of them has any of."""
    found = [share["share"] for share in shares if share and share["share"] is not None]
    return measure != EMPTY and len(found) > 1 and not any(found)


def _compared_text(compared: Mapping[str, Any]) -> str:
    """How far the model and its parent agree, in a sentence."""
    texts, agreed = compared["same_text"], compared["general_agreement"]
    tokens = f"{agreed['share']:.1%} of {agreed['of']:,} tokens" if agreed else "unknown, since the tokenizers differ"
    return f"same text: {texts['equal']} of {texts['of']}; same token predicted on general text: {tokens}"


def _share_text(share: Mapping[str, Any] | None) -> str:
    if not share or share["share"] is None:
        return "-"
    return f"{share['share']:.1%} ({share['right']} of {share['of']})"


def _group_text(shares: Sequence[Mapping[str, Any] | None]) -> str:
    texts = [f"{share['share']:.1%}" if share and share["share"] is not None else "-" for share in shares]
    return f"{' / '.join(texts)} of {max((share['of'] for share in shares if share), default=0)}"


def show_probe(report: Mapping[str, Any]) -> None:
    """Print what the readiness probe measured and what it advises."""
    machine, best, verdict = report["machine"], report["best_form"], report["verdict"]
    OUT.print(
        f"{counted(report['prompts'], 'prompt')}, {counted(machine['threads'], 'thread')}, {machine['processor']}, "
        f"onnxruntime {machine['onnxruntime']}, skipped: {_pairs(report['skipped']) or 'none'}",
        markup=False,
    )
    forms = plain_table("loop", "proposer", f"tokens/forward, n = {report['form_block_size']}")
    for form in report["forms"]:
        forms.add_row(form["method"], form["proposer"], f"{form['tokens_per_forward']:.2f}")
    OUT.print(forms)
    OUT.print(f"with {best['method']} and proposer {best['proposer']}:", markup=False)
    OUT.print(_probe_table(report["sizes"]))
    OUT.print(Text.assemble((verdict["readiness"], "bold"), ": ", verdict["advice"]))
    OUT.print(verdict["meaning"], style="dim", markup=False)


def _probe_table(sizes: Sequence[Mapping[str, float]]) -> Table:
    table = plain_table("n", "TPF", "T(n) ms", "T(n)/T(1)", "spread", "expected", "1x at TPF", "2x at TPF", "at most")
    for size in sizes:
        table.add_row(
            str(int(size["block_size"])),
            f"{size['tokens_per_forward']:.2f}",
            f"{size['milliseconds']:.2f}",
            f"{size['relative_time']:.2f}",
            f"{size['relative_spread']:.0%}",
            f"{size['expected_speedup']:.2f}x",
            f"{size['break_even_tokens_per_forward']:.2f}",
            f"{size['twice_tokens_per_forward']:.2f}",
            f"{size['highest_speedup']:.2f}x",
        )
    return table


def show_collection(path: str, summary: Mapping[str, Any]) -> None:
    """Print what a collection holds. For what was left out, print how much, why, and the first case."""
    OUT.print(Text(path, "bold"))
    for name, value in _collection_lines(summary):
        OUT.print(Text.assemble((f"{name:<28} ", "dim"), value))
    for reason, entry in summary["dropped"].items():
        OUT.print(Text.assemble((f"{f'dropped: {reason}':<28} ", "dim"), f"{entry['count']:,} ({entry['detail']})"))


def _collection_lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "samples", f"{summary['samples']:,} of {summary['prompts']:,} prompts"
    yield "new tokens", f"{summary['new_tokens']:,} in {counted(summary['forwards'], 'forward')}"
    for name in ("tokens_per_forward", "iterations_per_block"):
        yield words(name), "-" if summary[name] is None else f"{summary[name]:.2f}"
    for name in ("prompt_length", "answer_length"):
        spread = summary[name]
        yield words(name), f"median {spread['median']:g}, p90 {spread['p90']:g} tokens" if spread else "-"


def show_tuning(path: str, report: Mapping[str, Any]) -> None:
    """Print the result of tuning: quality and tokens per forward from the parent to the end."""
    dropped = _pairs(report["dropped"]) or "none"
    OUT.print(
        f"{counted(report['samples'], 'sample')} (dropped: {dropped}), {counted(report['steps'], 'step')}, "
        f"{report['minutes']:.1f} minutes of training",
        markup=False,
    )
    table = plain_table("minutes", "step", "loss", "tokens/forward", "exact match", "perplexity", "repetitive")
    for entry in report["curve"]:
        loss = f"{entry['loss']:.3f}" if "loss" in entry else "-"
        rates = [
            f"{entry['tokens_per_forward']:.2f}",
            f"{entry['exact_match']:.1%}",
            f"{entry['perplexity']:.3g}",
            f"{entry['repetitive']:.1%}",
        ]
        table.add_row(f"{entry['minutes']:.1f}", str(entry["step"]), loss, *rates)
    OUT.print(table)
    reasons = {
        "done": f"wrote {path}",
        "patience": f"no further progress; wrote {path}",
        "collapse": f"collapsed into repetition; {path} holds the last good checkpoint: raise --autoregressive-weight "
        "or lower the learning rate",
    }
    OUT.print(reasons[report["stopped"]], markup=False)
    OUT.print(report["outcome"]["sentence"], markup=False)
