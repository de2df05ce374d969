"""The demo: one example from checkpoint to speed table."""

from __future__ import annotations

from pathlib import Path

from cllm_export import display
from cllm_export.bench import BenchOptions, run_bench
from cllm_export.bundle import Bundle
from cllm_export.errors import CheckpointError
from cllm_export.prompts import Prompt, read_prompts
from cllm_export.runtime.generate import Model, load
from cllm_export.verify import VerifyOptions, verify

VERIFIED, SHOWN, TIMED = 100, 3, 40
SWEEP = (4, 8, 12)


def run_demo(example: Path, output: Path, *, threads: int | None = None) -> bool:
    """Build the example's checkpoint into ``output``, verify it, decode a few prompts, print the speed table.

    Returns:
        Whether the bundle passed verification; the demo ends there if not.

    Raises:
        CheckpointError: the example is not there.
    """
    if not (example / "checkpoint").is_dir():
        raise CheckpointError(
            f"{example} has no checkpoint/; run the demo from a clone of the repository, or give --example"
        )
    prompts = read_prompts(example / "prompts.jsonl")
    bundle = _build(example / "checkpoint", output)
    if not _verify(bundle, prompts, example / "checkpoint", threads):
        return False
    _decode(load(bundle.path, threads=threads), prompts[:SHOWN])
    _time(bundle, prompts[:TIMED], threads)
    return True


def _build(checkpoint: Path, output: Path) -> Bundle:
    from cllm_export.exporter.pipeline import build

    display.OUT.rule("build")
    with display.progress_bar() as progress:
        bundle = build(checkpoint, output, force=True, progress=progress)
    size = sum(entry.size for entry in bundle.manifest.files.values())
    display.OUT.print(f"wrote {output} ({display.bytes_text(size)})", markup=False)
    return bundle


def _verify(bundle: Bundle, prompts: list[Prompt], checkpoint: Path, threads: int | None) -> bool:
    display.OUT.rule("verify")
    with display.progress_bar() as progress:
        options = VerifyOptions(threads=threads)
        parity = verify(bundle, prompts=prompts[:VERIFIED], checkpoint=checkpoint, options=options, progress=progress)
    display.show_parity(parity)
    return parity.passed


def _decode(model: Model, prompts: list[Prompt]) -> None:
    display.OUT.rule("decode")
    for prompt in prompts:
        generation = model.generate(prompt.content, deterministic=True)
        display.OUT.print(str(prompt.content).rsplit("Question:", 1)[-1].strip(), style="dim", markup=False)
        display.show_blocks(model, generation)
        display.show_statistics(generation)


def _time(bundle: Bundle, prompts: list[Prompt], threads: int | None) -> None:
    display.OUT.rule("speed")
    with display.progress_bar() as progress:
        report = run_bench(
            bundle, prompts=prompts, options=BenchOptions(threads=threads, sweep=SWEEP), progress=progress
        )
    display.show_bench(report)
