"""The demo: one example from checkpoint to speed table."""

from __future__ import annotations

from pathlib import Path

from cllm_export.bundle.manifest import Bundle
from cllm_export.cli.show.bundle import show_parity
from cllm_export.cli.show.console import OUT, bytes_text, progress_bar, say
from cllm_export.cli.show.decoding import show_bench, show_blocks, show_statistics
from cllm_export.measure.bench import run_bench
from cllm_export.measure.options import BenchOptions
from cllm_export.progress import resumable
from cllm_export.prompts import Prompt, read_prompts
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.verification.report import VerifyOptions
from cllm_export.verification.verify import verify

VERIFIED, SHOWN, TIMED = 100, 3, 40
BLOCK_SIZES = (4, 8, 12)
"""Values of n that are timed in addition to the bundle's own."""


def run_demo(example: Path, output: Path, *, threads: int | None = None, force: bool = False) -> bool:
    """Build the example's checkpoint into ``output``, verify it, decode a few prompts, print the speed table.

    Returns:
        Whether the bundle passed verification. If not, the demo ends there.

    Raises:
        OutputError: the output exists, and ``force`` is not set or it is no bundle.
    """
    prompts = read_prompts(example / "prompts.jsonl")
    with resumable(lambda: f"{output} is as it was before: run the same command again"):
        bundle = _build(example / "checkpoint", output, force=force)
    with resumable(lambda: f"{output} is whole: go on with cllm-export verify, generate and bench, or run demo again"):
        if not _verify(bundle, prompts, example / "checkpoint", threads):
            return False
        _decode(load(bundle.path, threads=threads), prompts[:SHOWN])
        _time(bundle, prompts[:TIMED], threads)
        return True


def _build(checkpoint: Path, output: Path, *, force: bool) -> Bundle:
    from cllm_export.exporter.pipeline import export

    OUT.rule("build")
    with progress_bar() as progress:
        bundle = export(checkpoint, output, force=force, progress=progress, say=say).bundle
    size = sum(entry.size for entry in bundle.manifest.files.values())
    OUT.print(f"wrote {output} ({bytes_text(size)})", markup=False)
    return bundle


def _verify(bundle: Bundle, prompts: list[Prompt], checkpoint: Path, threads: int | None) -> bool:
    OUT.rule("verify")
    with progress_bar() as progress:
        options = VerifyOptions(threads=threads)
        parity = verify(bundle, prompts=prompts[:VERIFIED], checkpoint=checkpoint, options=options, progress=progress)
    show_parity(parity)
    return parity.passed


def _decode(model: Model, prompts: list[Prompt]) -> None:
    OUT.rule("decode")
    for prompt in prompts:
        generation = model.generate(prompt.content, deterministic=True)
        OUT.print(str(prompt.content).rsplit("Question:", 1)[-1].strip(), style="dim", markup=False)
        show_blocks(model, generation)
        show_statistics(generation)


def _time(bundle: Bundle, prompts: list[Prompt], threads: int | None) -> None:
    OUT.rule("speed")
    with progress_bar() as progress:
        sizes = sorted({*BLOCK_SIZES, bundle.manifest.block_size})
        options = BenchOptions(block_sizes=tuple(sizes), threads=threads)
        report = run_bench([bundle], prompts=prompts, options=options, progress=progress)
    show_bench(report)
