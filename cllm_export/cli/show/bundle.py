"""Command line output about a bundle, a machine and a verification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from cllm_export.bundle.memory import Figure
from cllm_export.bundle.quantization import ROTATED_TITLES, Agreement
from cllm_export.cli.show.console import MARKS, OUT, bytes_text, plain_table
from cllm_export.tensorrt.doctor import Finding
from cllm_export.tensorrt.memory import Verdict
from cllm_export.verification.report import Parity


def show_description(description: Mapping[str, Any]) -> None:
    """Print what ``inspect`` found, one line per item."""
    OUT.print(Text(description["path"], "bold"))
    for name, value in _description_lines(description):
        OUT.print(Text.assemble((f"{name:<28} ", "dim"), value))
    for plan in description["plans"]:
        _show_plan(plan)


def _show_plan(plan: Mapping[str, Any]) -> None:
    OUT.print(Text.assemble(("plan ", "bold"), (plan["key"], "bold")))
    if plan["error"]:
        OUT.print(Text(plan["error"], "bold red"))
        return
    contents = plan["contents"]
    lines = {
        "built by": plan["built_by"],
        "built for": plan["built_for"] + ("" if plan["is_of_this_bundle"] else "; of another build of this bundle"),
        "file": bytes_text(plan["size"]),
        "weights on the device": bytes_text(contents["weight_bytes"]) if contents else "the builder does not say",
    }
    for name, value in lines.items():
        OUT.print(Text.assemble((f"{name:<28} ", "dim"), value))
    if contents:
        OUT.print(_profiles_table(contents["profiles"]))


def _profiles_table(profiles: Sequence[Mapping[str, Any]]) -> Table:
    """What a forward of each profile runs."""
    columns = ("profile", "kernels", "attention", "cache copies", "logits copies", "reformats", "host copies", "memory")
    table = plain_table(*columns)
    table.columns[2].min_width = len("gemm_mha_v2")
    for profile in profiles:
        attention = ", ".join(f"{count} x {kernel}" for kernel, count in profile["attention"].items()) or "spelled out"
        copies = str(profile["cache_copies"])
        copies += f" ({bytes_text(profile['cache_copy_bytes'])})" if profile["cache_copies"] else ""
        counts = (str(profile[key]) for key in ("logits_copies", "reformats", "host_copies"))
        memory = bytes_text(profile["device_bytes"])
        table.add_row(profile["name"], str(profile["kernels"]), attention, copies, *counts, memory)
    return table


def show_memory(figures: Sequence[Figure], verdict: Verdict) -> None:
    """Print each figure and, below it, how it is computed; last whether the device has the memory."""
    for figure in figures:
        OUT.print(Text.assemble((f"{figure.name:<16} ", "bold"), f"{bytes_text(figure.bytes):>10}"))
        OUT.print(Text(f"    {figure.how}", "dim"))
    said = ("fits", "bold green") if verdict.fits else ("does not fit", "bold red")
    OUT.print(Text.assemble(said, f": {verdict.why}"))


def show_findings(findings: Sequence[Finding], report: Mapping[str, Any]) -> None:
    """Print what ``doctor`` found and, below each finding, how to fix it."""
    OUT.print(Text(report["system"], "bold"))
    for finding in findings:
        style = {"ok": "green", "not needed": "dim"}.get(finding.state, "bold red")
        OUT.print(Text.assemble(f"{finding.name:<17} ", (f"{finding.state:<11} ", style), finding.detail))
        if finding.fix:
            OUT.print(Text(f"    fix: {finding.fix}", "yellow"))
    usable = [name for name, works in report["engines"].items() if works]
    OUT.print(f"engines that can be used here: {', '.join(usable) or 'none'}")


def _description_lines(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shown = ("family", "precision", "block_size", "max_length", "batch_size", "eos_token_ids", "trained_with")
    for key in shown:
        value = description[key]
        text = _pairs(value).replace("_", " ") if isinstance(value, dict) else str(value or "-").strip("[]")
        yield key.replace("_", " "), text
    if description["quantization"]:
        yield "quantization", _quantization_text(description["quantization"])
        yield "agreement", _agreement_text(description["quantization"]["agreement"])
    for name, graph in description["graphs"].items():
        pinned = graph["fixed_shapes"]
        yield (
            f"graph {name}",
            f"{graph['file']}: {_pairs(pinned) if pinned else 'any number of slots, tokens and positions'}",
        )
    for name, size in description["files"].items():
        yield f"file {name}", bytes_text(size)
    for path, size in description["linked_files"].items():
        yield "linked to", f"{path}: {bytes_text(size)}"
    for name, size in description["memory"].items():
        yield f"memory {name.replace('_', ' ')}", bytes_text(size)
    yield "fingerprint", description["fingerprint"]
    yield "parity", description["parity"]


def _quantization_text(quantization: Mapping[str, Any]) -> str:
    """What was quantised, and how many weights were not, by reason."""
    groups = f", groups of {quantization['group_size']}" if quantization["group_size"] else ""
    reasons = Counter(quantization["kept"].values())
    kept = "; ".join(f"{count} kept ({reason})" for reason, count in sorted(reasons.items()))
    scheme, engines = quantization["scheme"], ", ".join(quantization["engines"])
    turned = [f"{ROTATED_TITLES[part]} rotated" for part in quantization["rotated"]]
    turned += [f"{ROTATED_TITLES[part]} not, since {reason}" for part, reason in quantization["unrotated"].items()]
    weights = f"{scheme}, {quantization['method']}{groups}, for {engines}: {len(quantization['weights'])} weights"
    return "; ".join([weights, *([kept] if kept else []), *turned])


def _agreement_text(agreement: Mapping[str, int] | None) -> str:
    """For how many tokens of general text the bundle predicts the model's own token."""
    if agreement is None:
        return "not measured: build the bundle again"
    return f"the model's own token for {Agreement(**agreement)} tokens of general text"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def show_parity(parity: Parity) -> None:
    """Print each check with its mark."""
    for check in parity.checks:
        mark, style = MARKS[check.passed]
        OUT.print(Text.assemble((mark, style), "  ", (check.name, "bold"), "  ", check.detail))
        if parts := check.data.get("parts"):
            OUT.print(_parts_table(parts))
    OUT.print(Text("verified", "bold green") if parity.passed else Text("not verified", "bold red"))


def _parts_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    """The error of each part of a graph."""
    table = plain_table("part", "largest error")
    for part in parts:
        table.add_row(part["part"], f"{part['error']:.1e}")
    return table
