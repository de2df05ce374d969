"""Command line output about decoding: statistics, blocks, latencies and comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from cllm_export.bundle.inspect import LIBRARIES
from cllm_export.cli.show.console import ACCEPTED, ERR, FAST_FORWARDED, OUT, REJECTED, STATIONARY, say
from cllm_export.progress import counted
from cllm_export.runtime.decoding.statistics import ForwardRecord, stationary_positions
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import GenerateOptions
from cllm_export.runtime.request_run import Generation


def show_bench(report: Mapping[str, Any]) -> None:
    """Print every bundle, method and n of a bench report, the fastest first, and T(n) of a single bundle."""
    machine, bundles = report["machine"], report["bundles"]
    OUT.print(
        f"{counted(report['prompts'], 'prompt')}, {counted(report['repeats'], 'repeat')}, "
        f"{counted(machine['threads'], 'thread')}, "
        f"{machine.get('device') or machine['processor']}, "
        + ", ".join(f"{title} {machine[name]}" for name, title in LIBRARIES.items() if name in machine),
        markup=False,
    )
    OUT.print(_settings_table(report))
    best = report["settings"][0]
    doubt = (
        ""
        if best["fastest_in"] == report["repeats"]
        else f", but only in {best['fastest_in']} of {report['repeats']} passes: too close or too noisy to tell"
    )
    OUT.print(
        f"fastest here: {best['name']} ({best['precision']}), {best['method']} with n = {best['block_size']}{doubt}",
        markup=False,
    )
    for bundle in bundles:
        if bundle["why_busy"] and len(bundles) > 1:  # of a single bundle, a warning has said so
            OUT.print(f"times of forwards of {bundle['name']}: unknown, {bundle['why_busy']}", markup=False)
    if len(bundles) == 1 and bundles[0]["latency"]:
        OUT.print(_latency_table(bundles[0]["latency"]))
    if other := report["transformers"]:
        OUT.print(f"transformers generate: {other['tokens_per_second_with_prefill']:,.0f} tokens/s, prefill included")


def show_statistics(generation: Generation) -> None:
    """Print one line of statistics on standard error, so that standard output holds only the text."""
    entry = generation.statistics
    reused = f" ({entry.reused_tokens} of {entry.prompt_tokens} tokens reused)" if entry.reused_tokens else ""
    ERR.print(
        f"[dim]{counted(entry.new_tokens, 'token')} in {counted(entry.forwards, 'forward')} "
        f"({entry.tokens_per_forward:.2f} per forward), "
        f"{entry.tokens_per_second:,.0f} tokens/s, fast-forwarded {entry.fast_forwarded}, stationary "
        f"{entry.stationary}, prefill {entry.prefill_seconds * 1e3:.1f} ms{reused}, {generation.finish_reason}[/dim]"
    )
    if entry.on_device:
        reason = f": {entry.on_device.form_reason}" if entry.on_device.form_reason else ""
        ERR.print(
            f"on the device {counted(entry.on_device.num_forwards, 'forward')}, "
            f"{counted(entry.on_device.num_syncs, 'wait')} of the host "
            f"({entry.syncs_per_token:.3f} per token), {entry.on_device.form}{reason}",
            style="dim",
            markup=False,
        )


def show_legend() -> None:
    """Print what the marks and colours of ``show_blocks`` mean.

    Fast-forwarded tokens are draft tokens found right. The accepted token is the model's own token after them, which
    every forward gives. Stationary tokens are already right but wait for an earlier token. All other tokens were wrong.
    """
    legend = Text("block: [")
    legend.append("fast-forwarded", FAST_FORWARDED)
    legend.append("|")
    legend.append("+accepted", ACCEPTED)
    legend.append("] ")
    legend.append("~stationary", STATIONARY)
    legend.append(" ")
    legend.append("-rejected", REJECTED)
    legend.append("; the forward gave the tokens in brackets")
    OUT.print(legend)


def show_if_empty(generation: Generation, name: str = "") -> None:
    """Say on standard error that a text is empty because the model ended at once.

    Args:
        name: stands before the sentence and names the prompt, if there are several.
    """
    if not generation.text and generation.finish_reason == "eos":
        say(f"{name}the text is empty, since the model ended it at once: give a prompt as the model was trained on")


def show_if_cut(generation: Generation, options: GenerateOptions, name: str = "") -> None:
    """Say on standard error that a limit cut a text before its grammar had ended it.

    Args:
        name: stands before the sentence and names the prompt, if there are several.
    """
    if options.given_grammar is None or generation.finish_reason != "length":
        return
    kind, _ = options.given_grammar
    if kind == "json_schema" and _is_whole_json(generation.text):
        return
    what = "no whole JSON" if kind == "json_schema" else "perhaps no match"
    say(
        f"{name}warning: the limit of new tokens cut the text before its grammar let it end, so it is {what}: allow "
        "more with max_new_tokens, or bound lengths in the grammar"
    )


def _is_whole_json(text: str) -> bool:
    """Whether a text is JSON to which nothing can be added. A number might have more digits."""
    try:
        return not isinstance(json.loads(text), int | float)
    except ValueError:
        return False


def show_blocks(model: Model, generation: Generation) -> None:
    """Print a line for each forward: the block that it verified, marked and coloured by the fate of each token."""
    records = generation.forwards
    end = records[0].write_index + len(generation.token_ids) if records else 0
    for index, record in enumerate(records):
        following = records[index + 1] if index + 1 < len(records) else None
        OUT.print(_block_line(model, index + 1, record, following, end))


def _block_line(model: Model, number: int, record: ForwardRecord, following: ForwardRecord | None, end: int) -> Text:
    """The tokens that a forward gave in brackets, then the other tokens of its block, none after position ``end``."""
    last = record.num_accepted - 1
    rows = [row for row in range(1, len(record.block)) if record.write_index + row <= end]
    given = [(_token_text(model, record.block[row]), FAST_FORWARDED) for row in rows if row <= last]
    if not last or record.write_index + last < end:
        given.append((f"+{_token_text(model, record.next_ids[last])}", ACCEPTED))
    line = Text.assemble((f"{number:>3} ", "dim"), "[", Text("|").join(Text(*token) for token in given), "]")
    still_right = set(stationary_positions(record, following)) if following else set()
    for row in rows[last:]:
        mark, style = ("~", STATIONARY) if record.write_index + row in still_right else ("-", REJECTED)
        line.append(" ").append(f"{mark}{_token_text(model, record.block[row])}", style)
    return line


def _token_text(model: Model, token: int) -> str:
    text = model.codec.tokenizer.decode([token], skip_special_tokens=False)
    return text.replace("\n", "\\n") or "·"


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("precision", "precision", ""),
    ("MB", "weight_bytes", ".1f"),
    ("n", "block_size", ""),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("TPF", "tokens_per_forward", ".2f"),
    ("speedup", "speedup", ".2f"),
    ("with prefill", "speedup_with_prefill", ".2f"),
    ("overhead", "overhead", ".3f"),
    ("T(n) ms", "milliseconds", ".2f"),
    ("equal", "equal", ""),
)
"""Headings, the value of a setting that each shows, and its format. TPF is tokens per forward.

The JSON report has more values."""
_OF_BUNDLES = ("precision", "weight_bytes", "milliseconds")
"""Columns of several bundles. A single bundle has a table of its forwards instead."""
_OF_ONE = ("speedup_with_prefill", "overhead")
"""Columns of a single bundle. Several bundles need the room."""


def _settings_table(report: Mapping[str, Any]) -> Table:
    """A table with a row for each setting. Columns without any value are left out."""
    settings, is_alone = report["settings"], len(report["bundles"]) == 1
    columns = [
        column
        for column in _COLUMNS
        if any(entry[column[1]] is not None for entry in settings)
        and column[1] not in (_OF_BUNDLES if is_alone else _OF_ONE)
    ]
    table = Table(box=None)
    if not is_alone:
        table.add_column("bundle", overflow="fold", min_width=8)  # only this one may wrap
    table.add_column("method", no_wrap=True)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in settings:
        cells = [_cell(entry[key], key, form, report["prompts"]) for _, key, form in columns]
        table.add_row(*(() if is_alone else (Text(entry["name"]),)), entry["method"], *cells)
    return table


def _cell(value: Any, key: str, form: str, num_prompts: int) -> str:
    if value is None:
        return "-"
    if key == "equal":
        return f"{value}/{num_prompts}"
    text = f"{value / 1e6 if key == 'weight_bytes' else value:{form}}"
    return f"{text}x" if "speedup" in key else text


def _latency_table(latency: Sequence[Mapping[str, float]]) -> Table:
    table = Table(box=None)
    for name in ("n", "T(n) ms", "T(n)/T(1)", "spread"):
        table.add_column(name, justify="right")
    for entry in latency:
        cells = [f"{entry['milliseconds']:.2f}", f"{entry['ratio']:.2f}", f"{entry['ratio_spread']:.0%}"]
        table.add_row(str(int(entry["block_size"])), *cells)
    return table
