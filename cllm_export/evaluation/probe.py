"""The readiness probe: estimates the speed-up of parallel decoding on this machine, before deployment or tuning.

The estimate for each n combines two measurements. One is the model's tokens per forward on these prompts. The other is
T(n), the time of one bare forward of n tokens of its bundle on this machine. The estimate leaves out prefill, text
handling and the cost of the loop itself.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from cllm_export.bundle.manifest import PROPOSERS, Bundle, open_bundle
from cllm_export.checks import check_options
from cllm_export.errors import OptionError
from cllm_export.evaluation.decoding import JACOBI_METHODS, Settings, decode_prompts, default_settings
from cllm_export.evaluation.measures import measure
from cllm_export.evaluation.sources import kind_of
from cllm_export.evaluation.verdict import Expectation, judge
from cllm_export.extras import needs_extra
from cllm_export.progress import Progress
from cllm_export.prompts import Prompt
from cllm_export.runtime.decoding.block_size.measured_times import MeasuredTimes
from cllm_export.runtime.decoding.block_size.time_forwards import time_in_turn
from cllm_export.runtime.decoding.shared_options import limit_option, max_new_tokens_option, threads_option
from cllm_export.runtime.engines.machine import describe_machine
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model

BLOCK_SIZES = (1, 4, 8, 16, 32)
FORM_PROMPTS = 8
"""Number of prompts used to compare loops and proposers. The best pair is then measured at every n."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """The options of a probe."""

    limit: int = limit_option(32)
    max_new_tokens: int = max_new_tokens_option(128)
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        check_options(self)


def probe(
    source: Path,
    prompts: Sequence[Prompt],
    *,
    options: ProbeOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probe a bundle, or a checkpoint through a temporary bundle, and return the report, JSON-ready.

    ``forms`` holds the tokens per forward of each loop and proposer at the model's own n. ``sizes`` holds an
    ``Expectation`` for each n with the best loop and proposer. ``verdict`` holds the advice; it is unknown where the
    machine was too busy to time forwards.

    Raises:
        CllmExportError: the model cannot be opened or built, or no prompt can be decoded.
        OptionError: the bundle has fixed shapes, and so only one n.
    """
    options = options or ProbeOptions()
    with _as_bundle(source, progress) as bundle:
        model = load(bundle.path, threads=options.threads, prefix_cache_bytes=0)
        if model.engine.fixed_shapes:
            raise OptionError(f"{source} is pinned to one block size: probe a bundle built without fixed_shapes")
        sample = list(prompts)[: options.limit]
        defaults = default_settings(model, max_new_tokens=options.max_new_tokens)
        forms = _measure_forms(model, sample[:FORM_PROMPTS], defaults, progress)
        best = max(forms, key=lambda form: form[1])[0]
        rates, skipped = _measure_sizes(model, sample, best, progress)
        times = _measure_times(bundle, model, sample, options.threads, progress)
    sizes = [
        Expectation(
            block_size=size,
            tokens_per_forward=rate,
            milliseconds=times.seconds[size] * 1e3,
            relative=times.relative(size),
            spread=times.spread(size),
        )
        for size, rate in rates.items()
    ]
    return {
        "source": source.name,
        "kind": kind_of(source),
        "machine": describe_machine(options.threads),
        "prompts": len(sample),
        "skipped": skipped,
        "forms": [_named(form) | {"tokens_per_forward": round(rate, 4)} for form, rate in forms],
        "form_block_size": defaults.block_size,
        "best_form": _named(best),
        "sizes": [_expectation(size) for size in sizes],
        "verdict": asdict(judge(sizes, why_busy=times.why_busy)),
    }


@contextmanager
def _as_bundle(source: Path, progress: Progress | None) -> Iterator[Bundle]:
    """The bundle itself, or a bundle built from the checkpoint and removed at the end of the block."""
    if kind_of(source) == "bundle":
        yield open_bundle(source)
        return
    with needs_extra("train"):
        from cllm_export.exporter.pipeline import build
    with tempfile.TemporaryDirectory(prefix="cllm-export-probe-") as directory, needs_extra("train"):
        yield build(source, Path(directory) / "bundle", progress=progress)


def _measure_forms(
    model: Model, prompts: Sequence[Prompt], defaults: Settings, progress: Progress | None
) -> list[tuple[Settings, float]]:
    """Tokens per forward of every loop with every proposer, on few prompts.

    The loop and proposer that the model was trained with come first, so that they win a tie.
    """
    forms = [
        replace(defaults, method=method, proposer=proposer)
        for method, proposer in itertools.product(JACOBI_METHODS, PROPOSERS)
    ]
    forms.sort(key=lambda form: (form.method != defaults.method, form.proposer != defaults.proposer))
    return [(form, _rate(model, prompts, form, progress, f"{form.method}, {form.proposer}")[0]) for form in forms]


def _measure_sizes(
    model: Model, prompts: Sequence[Prompt], best: Settings, progress: Progress | None
) -> tuple[dict[int, float], dict[str, int]]:
    rates = {1: 1.0}
    skipped: dict[str, int] = {}
    for size in _block_sizes(model):
        rates[size], skipped = _rate(model, prompts, replace(best, block_size=size), progress, f"n = {size}")
    return rates, skipped


def _block_sizes(model: Model) -> list[int]:
    return [size for size in BLOCK_SIZES if 1 < size <= model.engine.geometry.max_block_size]


def _rate(
    model: Model, prompts: Sequence[Prompt], settings: Settings, progress: Progress | None, stage: str
) -> tuple[float, dict[str, int]]:
    decoded = decode_prompts(model, prompts, settings, compare=False, progress=progress, stage=stage)
    return measure(decoded.answers, settings).tokens_per_forward, decoded.skipped


def _measure_times(
    bundle: Bundle, model: Model, prompts: Sequence[Prompt], threads: int | None, progress: Progress | None
) -> MeasuredTimes:
    progress = progress or (lambda *_: None)
    progress("timing forwards", 0, 1)
    decodable = decode_prompts(
        model, prompts, Settings(method="jacobi", block_size=1, proposer="pad", max_new_tokens=1), compare=False
    )
    past = int(median(answer.generation.statistics.prompt_tokens for answer in decodable.answers))
    engine = OrtEngine(bundle, num_slots=1, threads=threads)
    [times] = time_in_turn([engine], (1, *_block_sizes(model)), past=past, progress=progress)
    return times


def _named(form: Settings) -> dict[str, Any]:
    return {"method": form.method, "proposer": form.proposer}


def _expectation(size: Expectation) -> dict[str, float | int]:
    return {
        "block_size": size.block_size,
        "tokens_per_forward": round(size.tokens_per_forward, 4),
        "milliseconds": round(size.milliseconds, 4),
        "relative_time": round(size.relative, 4),
        "relative_spread": round(size.spread, 4),
        "expected_speedup": round(size.speedup, 4),
        "break_even_tokens_per_forward": round(size.needed(1.0), 4),
        "twice_tokens_per_forward": round(size.needed(2.0), 4),
        "highest_speedup": round(size.highest, 4),
    }
