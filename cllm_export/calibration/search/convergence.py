"""``cllm-export convergence``: measure what quantised bundles lose against the unquantised one, mainly convergence.

Every bundle decodes the same held-out prompts. Then each bundle runs over the block states that the unquantised one
went through. ``bench`` measures times; this module does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cllm_export.bundle.manifest import TOKENIZER_NAME, Bundle
from cllm_export.calibration.search.flips import Predictions, count_flips, predict
from cllm_export.calibration.search.forced_texts import ForcedTexts
from cllm_export.calibration.search.measured import HeldOutOptions, Measured, compare_texts, measure_decode, tpf_loss
from cllm_export.errors import CalibrationError
from cllm_export.evaluation.decoding import Settings
from cllm_export.evaluation.tasks.questions import Question
from cllm_export.progress import Progress
from cllm_export.runtime.general_text import general_passages
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import pad_token


def measure_convergence(
    baseline: Bundle,
    candidates: Sequence[Bundle],
    questions: Sequence[Question],
    options: HeldOutOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare quantised bundles with their unquantised bundle and return a JSON-ready report.

    ``baseline`` and each of ``candidates`` hold path, fingerprint, weight_bytes, tokens_per_forward, perplexity (over
    the new tokens of the baseline's texts), general_perplexity, and scores if prompts have answers. A candidate also
    has tpf_loss (a share), exact_match, first_divergence (in new tokens), flips (see ``FlipCount``) and, for
    teacher-forced text, agreement: the rows that predict the baseline's token, in all, on general text, on prompts.

    Raises:
        CalibrationError: a candidate is of another checkpoint or tokenizer.
        OptionError: an option does not suit a bundle.
        PromptError: no prompt can be decoded.
        EngineError: an engine failed.
    """
    options = options or HeldOutOptions()
    progress = progress or (lambda *_: None)
    for candidate in candidates:
        require_same_model(baseline, candidate)
    run = _Run(baseline, questions, options, progress)
    return {
        "prompts": len(run.before.recordings),
        "settings": asdict(run.settings),
        "baseline": _describe(baseline) | run.before.to_dict() | run.readings.to_dict(),
        "candidates": [run.judge(candidate) for candidate in candidates],
    }


def require_same_model(baseline: Bundle, candidate: Bundle) -> None:
    """Refuse to compare bundles of different models.

    Raises:
        CalibrationError: the bundles are of different models, or of another number of layers.
    """
    first, second = baseline.manifest, candidate.manifest
    for what, ours, theirs in (
        ("checkpoint", first.checkpoint_fingerprint, second.checkpoint_fingerprint),
        ("tokenizer", first.files[TOKENIZER_NAME].sha256, second.files[TOKENIZER_NAME].sha256),
    ):
        if ours != theirs:
            raise CalibrationError(
                f"{candidate.path} and {baseline.path} are of different {what}s (fingerprints {theirs[:12]} and "
                f"{ours[:12]}): compare bundles of one checkpoint"
            )
    held = candidate.manifest.geometry.num_layers, baseline.manifest.geometry.num_layers
    if held[0] != held[1]:
        raise CalibrationError(
            f"{candidate.path} has {held[0]} layers and {baseline.path} has {held[1]}: compare bundles of equally many "
            "layers"
        )


class _Run:
    """The decode of the unquantised bundle, with which candidates are compared."""

    def __init__(
        self, baseline: Bundle, questions: Sequence[Question], options: HeldOutOptions, progress: Progress
    ) -> None:
        self._questions, self._options, self._progress = questions, options, progress
        self._pad = pad_token(baseline.manifest)
        model = load(baseline.path, threads=options.threads, prefix_cache_bytes=0)
        self.settings: Settings = options.settings(model)
        self.before: Measured = measure_decode(model, questions, self.settings, progress, "decoding")
        self._predictions = self._predict(model)
        self._texts = ForcedTexts(
            model.codec, general_passages(options.text), self.before.recordings, max_length=model.facts.max_length
        )
        self.readings = self._texts.read(model.engine, self._pad, progress)

    def judge(self, candidate: Bundle) -> dict[str, Any]:
        """The losses of a candidate."""
        model = load(candidate.path, threads=self._options.threads, prefix_cache_bytes=0)
        after = measure_decode(model, self._questions, self.settings, self._progress, "decoding")
        flips = count_flips(self.before.recordings, self._predictions, self._predict(model))
        readings = self._texts.read(model.engine, self._pad, self._progress)
        return (
            _describe(candidate)
            | after.to_dict()
            | readings.to_dict()
            | {"tpf_loss": tpf_loss(self.before, after)}
            | self.readings.compare(readings)
            | compare_texts(self.before, after)
            | {"flips": flips.to_dict()}
        )

    def _predict(self, model: Model) -> Predictions:
        recordings = self.before.recordings
        return predict(
            model.engine, recordings, self._pad, lambda done: self._progress("block states", done, len(recordings))
        )


def _describe(bundle: Bundle) -> dict[str, Any]:
    return {"path": bundle.path.name, "fingerprint": bundle.fingerprint, "weight_bytes": bundle.weight_bytes}
