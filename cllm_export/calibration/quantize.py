"""``cllm-export quantize``: from a checkpoint and held-out prompts to the bundle that stays within a budget."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cllm_export.bundle import Bundle, Progress, check_output, open_bundle, output_error, staged_output
from cllm_export.calibration.fake_quantization import FakeQuantization
from cllm_export.calibration.fit import Fit, fit
from cllm_export.calibration.measured import HeldOutOptions, Measured, measure_decode, tpf_loss
from cllm_export.calibration.sensitivity import StandIn
from cllm_export.evaluation.questions import Question
from cllm_export.extras import needs_extra
from cllm_export.quantization import Engine, Scheme
from cllm_export.runtime.generate import load
from cllm_export.scales import open_scales
from cllm_export.verify import require_source


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What ``cllm-export quantize`` lets the user choose beside paths."""

    scheme: Scheme
    max_tpf_loss: float
    block_size: int | None = None
    """Input channels that share a scale of a 4-bit weight."""
    engine: Engine | None = None
    """Engine that an ``int4`` graph is for."""
    scales: Path | None = None
    """What ``int8`` and ``fp8`` need, and ``int4`` takes GPTQ from."""
    always_rank: bool = False
    held_out: HeldOutOptions


def quantize(
    checkpoint: Path,
    baseline: Bundle,
    questions: Sequence[Question],
    output: Path,
    options: FitOptions,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Fit:
    """Build the quantised bundle of a checkpoint that keeps as few layers as the budget allows.

    Args:
        baseline: the unquantised fp32 bundle of the same checkpoint; the new one is built with its block size, length
            and slots.
        questions: prompts on which tokens per forward are counted: not those that scales were made with.

    Raises:
        CalibrationError: the budget cannot be held, or a bundle or scales are of another model.
        OutputError: the output exists and ``force`` is not set, or cannot be written.
        CllmExportError: whatever a build may raise.
    """
    check_output(output, force=force)
    require_source(baseline, checkpoint)
    how = _stand_in(baseline, options)
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, output) from None
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.fitting-", dir=parent) as directory:
        stand_in = StandIn(baseline, questions, how, options.held_out, progress)
        build = _Builder(checkpoint, baseline, Path(directory) / "bundle", options)

        def loss_of(bundle: Bundle) -> float:
            return tpf_loss(stand_in.before, _measure(bundle, questions, options.held_out))

        chosen = fit(stand_in, build, loss_of, options.max_tpf_loss, always_rank=options.always_rank)
        with staged_output(output, force=force) as staging:
            for path in chosen.bundle.path.iterdir():
                shutil.move(path, staging / path.name)
    return replace(chosen, bundle=open_bundle(output))


def _stand_in(baseline: Bundle, options: FitOptions) -> FakeQuantization:
    scales = open_scales(options.scales) if options.scales else None
    if scales:
        scales.require_checkpoint(baseline.manifest.checkpoint_fingerprint)
    return FakeQuantization(scheme=options.scheme, scales=scales, block=options.block_size or 32)


def _measure(bundle: Bundle, questions: Sequence[Question], options: HeldOutOptions) -> Measured:
    model = load(bundle.path, threads=options.threads, prefix_cache_bytes=0)
    return measure_decode(model, questions, options.settings(model))


class _Builder:
    """Builds the checkpoint as the unquantised bundle was built, but quantised."""

    def __init__(self, checkpoint: Path, baseline: Bundle, output: Path, options: FitOptions) -> None:
        self._checkpoint, self._output, self._options = checkpoint, output, options
        self._manifest = baseline.manifest

    def __call__(self, keep: tuple[str, ...]) -> Bundle:
        with needs_extra("export"):
            from cllm_export.exporter import quantize as exporter
            from cllm_export.exporter.pipeline import BuildOptions, build
        manifest = self._manifest
        chosen = self._options
        options = BuildOptions(
            block_size=manifest.block_size,
            max_length=manifest.max_length,
            batch_size=manifest.batch_size,
            trained_with=manifest.trained_with,
            quantize=exporter.QuantizeOptions(
                scheme=chosen.scheme,
                block_size=chosen.block_size,
                keep=keep,
                scales=chosen.scales,
                engine=chosen.engine,
            ),
        )
        return build(self._checkpoint, self._output, options, force=True)
