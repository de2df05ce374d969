"""``cllm-export quantize``: make the fastest bundle within a budget, from a checkpoint and held-out prompts.

Each scheme keeps as few layers in full precision as the budget allows. If there are several schemes, the bundles within
the budget and the unquantised bundle are timed, and the fastest one is written.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

from cllm_export.bundle.manifest import MANIFEST_NAME, Bundle, open_bundle
from cllm_export.bundle.quantization import SCHEME_NAMES, SCHEME_SPECS, UNQUANTISED, SchemeName, SchemeOption
from cllm_export.bundle.scales import open_scales
from cllm_export.bundle.storage import check_output, output_error, staged_output
from cllm_export.calibration.search.fake_quantization import FakeQuantization
from cllm_export.calibration.search.fit import Budget, Builder, Fit, fit
from cllm_export.calibration.search.measured import HeldOutOptions, Losses
from cllm_export.calibration.search.sensitivity import StandIn
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import CalibrationError, OptionError
from cllm_export.evaluation.tasks.questions import Question
from cllm_export.exporter.checkpoint.source import require_source
from cllm_export.exporter.quantize.options import QuantizeOptions, SchemeOptions, require_takers
from cllm_export.extras import needs_extra
from cllm_export.measure.bench import run_bench
from cllm_export.measure.options import BenchOptions
from cllm_export.progress import Progress, resumable
from cllm_export.runtime.load import load


@dataclass(frozen=True, kw_only=True)
class FitOptions(SchemeOptions):
    """Options of ``cllm-export quantize``, except paths.

    Raises:
        OptionError: there is no scheme, a scheme is repeated, several schemes are for an engine that is not timed here,
            no scheme takes an option, or a scheme does not take the value of one.
    """

    GROUP: ClassVar[OptionGroup] = "Quantisation"

    schemes: tuple[SchemeName, ...] = option(
        help="How linear layers are quantised; repeat the option to choose the fastest of several here.",
        choices=SCHEME_NAMES,
        flag="--precision",
    )
    budget: Budget = field(default_factory=Budget)
    always_rank: bool = option(
        False,
        help="Measure the sensitivity of every layer, even if the budget holds with all layers quantised.",
        flag="--sensitivity",
    )
    held_out: HeldOutOptions = field(default_factory=HeldOutOptions)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.schemes or len(set(self.schemes)) < len(self.schemes):
            raise OptionError(
                f"schemes must be given once for each scheme, got {', '.join(self.schemes) or 'none'}",
                fields=("schemes",),
            )
        if len(self.schemes) > 1 and self.engine not in (None, "onnxruntime"):
            raise OptionError(
                f"schemes must be one alone with engine='{self.engine}', got {', '.join(self.schemes)}: several are "
                "told apart by their speed with ONNX Runtime",
                fields=("schemes",),
            )
        for name in get_args(SchemeOption):
            if getattr(self, name) not in (None, False):
                require_takers(name, getattr(self, name), self.schemes)
        for scheme in self.schemes:
            if self.scales is not None or SCHEME_SPECS[scheme].scales != "needed":  # missing scales are reported later
                self.quantize(scheme, ())

    def quantize(self, scheme: SchemeName, keep: tuple[str, ...]) -> QuantizeOptions:
        """The build options of one scheme: those of these options that it takes. The budget judges the bundle."""
        spec = SCHEME_SPECS[scheme]
        return QuantizeOptions(
            scheme=scheme,
            keep=keep,
            min_agreement=0,
            group_size=self.group_size if spec.takes("group_size") else None,
            scales=self.scales if spec.takes("scales") else None,
            engine=self.engine if spec.takes("engine") else None,
            rotate=self.rotate and spec.takes("rotate"),
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The result of one scheme: a bundle within the budget, or the reason why there is none."""

    scheme: SchemeName
    fit: Fit | None
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"scheme": self.scheme, "refused": self.refused} | (self.fit.to_dict() if self.fit else {})


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The bundle that was written, and the candidates that it was chosen from."""

    bundle: Bundle
    scheme: str
    """The bundle's scheme, or ``fp32`` if no quantised bundle was faster than the unquantised one."""
    candidates: tuple[Candidate, ...]
    timings: Mapping[str, Any] | None
    """The report of ``bench``, with bundles named by scheme. None if there was only one scheme."""
    budget: Budget

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self.budget) | {
            "chosen": self.scheme,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "timings": self.timings,
        }


def quantize(
    checkpoint: Path,
    baseline: Bundle,
    questions: Sequence[Question],
    output: Path,
    options: FitOptions,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Choice:
    """Build the fastest quantised bundle of a checkpoint within a budget. Each scheme keeps as few layers as possible.

    Args:
        baseline: the unquantised fp32 bundle of the same checkpoint. The new bundle is built with its block size,
            length and slots.
        questions: prompts on which losses are measured. They must not be the prompts that scales were made with.

    Raises:
        CalibrationError: no scheme stays within the budget, or a bundle or scales are of another model.
        OutputError: the output exists and ``force`` is not set, or it cannot be written.
        CllmExportError: a build failed.
    """
    check_output(output, force=force, marker=MANIFEST_NAME)
    require_source(baseline, checkpoint)
    stand_ins = {scheme: _stand_in(baseline, scheme, options) for scheme in options.schemes}
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, output) from None
    with (
        resumable(lambda: f"{output} was not written, and a search keeps nothing: run the same command again"),
        tempfile.TemporaryDirectory(prefix=f".{output.name}.fitting-", dir=parent) as directory,
    ):
        build = _Builder(checkpoint, baseline, Path(directory), options, progress)
        candidates = tuple(
            _fit(baseline, questions, how, build.of(scheme), options, progress) for scheme, how in stand_ins.items()
        )
        within = {each.scheme: each.fit.bundle for each in candidates if each.fit}
        if not within:
            raise CalibrationError("; ".join(f"{each.scheme}: {each.refused}" for each in candidates))
        timings, chosen = None, next(iter(within))
        if len(options.schemes) > 1:
            timings = _time(baseline, within, questions, options.held_out, progress)
            chosen = timings["settings"][0]["name"]
        written = within[chosen] if chosen in within else build.unquantised()
        with staged_output(output, force=force, marker=MANIFEST_NAME) as staging:
            for path in written.path.iterdir():
                shutil.move(path, staging / path.name)
    return Choice(
        bundle=open_bundle(output), scheme=chosen, candidates=candidates, timings=timings, budget=options.budget
    )


def _stand_in(baseline: Bundle, scheme: SchemeName, options: FitOptions) -> FakeQuantization:
    scales = open_scales(options.scales) if options.scales and SCHEME_SPECS[scheme].takes("scales") else None
    if scales:
        scales.require_checkpoint(baseline.manifest.checkpoint_fingerprint)
    return FakeQuantization(
        scheme=scheme,
        scales=scales,
        group_size=options.group_size,
        engine=options.engine,
        rotate=options.rotate and SCHEME_SPECS[scheme].takes("rotate"),
    )


def _fit(
    baseline: Bundle,
    questions: Sequence[Question],
    how: FakeQuantization,
    build: Builder,
    options: FitOptions,
    progress: Progress | None,
) -> Candidate:
    """The bundle of one scheme within the budget. If there is none, that is an error only for a single scheme."""
    stand_in = StandIn(baseline, questions, how, options.held_out, progress)

    def losses_of(bundle: Bundle) -> Losses:
        return stand_in.losses_of(load(bundle.path, threads=options.held_out.threads, prefix_cache_bytes=0))

    try:
        found = fit(stand_in, build, losses_of, options.budget, always_rank=options.always_rank)
    except CalibrationError as error:
        if len(options.schemes) == 1:
            raise
        return Candidate(scheme=how.scheme, fit=None, refused=str(error))
    return Candidate(scheme=how.scheme, fit=found)


def _time(
    baseline: Bundle,
    within: Mapping[SchemeName, Bundle],
    questions: Sequence[Question],
    options: HeldOutOptions,
    progress: Progress | None,
) -> dict[str, Any]:
    """Time the unquantised bundle and the bundles within the budget. The report lists the fastest first."""
    return run_bench(
        [baseline, *within.values()],
        names=[UNQUANTISED, *within],
        prompts=[question.prompt for question in questions],
        options=BenchOptions(
            block_sizes=(options.block_size,) if options.block_size and options.block_size > 1 else (),
            max_new_tokens=options.max_new_tokens,
            threads=options.threads,
        ),
        progress=progress,
    )


class _Builder:
    """Builds the checkpoint with the settings of the unquantised bundle, with any scheme."""

    def __init__(
        self, checkpoint: Path, baseline: Bundle, directory: Path, options: FitOptions, progress: Progress | None
    ) -> None:
        self._checkpoint, self._manifest = checkpoint, baseline.manifest
        self._directory, self._options, self._progress = directory, options, progress

    def of(self, scheme: SchemeName) -> Builder:
        """The builder for a scheme. A new bundle replaces the scheme's earlier one."""
        return lambda keep: self._build(scheme, self._options.quantize(scheme, keep))

    def unquantised(self) -> Bundle:
        """The unquantised bundle, built again with its weights inside, so that it can be moved."""
        return self._build(UNQUANTISED, None)

    def _build(self, name: str, quantized: QuantizeOptions | None) -> Bundle:
        with needs_extra("export"):
            from cllm_export.exporter.options import BuildOptions
            from cllm_export.exporter.pipeline import build
        manifest = self._manifest
        options = BuildOptions(
            block_size=manifest.block_size,
            max_length=manifest.max_length,
            batch_size=manifest.batch_size,
            trained_with=manifest.trained_with,
            quantize=quantized,
        )
        return build(self._checkpoint, self._directory / name, options, force=True, progress=self._progress)
