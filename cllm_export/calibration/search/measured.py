"""One bundle's decode of held-out prompts, and its measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from cllm_export.bundle.manifest import ProposerName
from cllm_export.calibration.recording import Recording, recording_of
from cllm_export.calibration.search.forced_texts import Readings
from cllm_export.checks import check_options
from cllm_export.errors import CalibrationError
from cllm_export.evaluation.decoding import Settings, decode_prompts, default_settings
from cllm_export.evaluation.tasks.questions import Question
from cllm_export.evaluation.tasks.score_prompts import score_prompts
from cllm_export.progress import Progress
from cllm_export.runtime.decode_all import first_difference
from cllm_export.runtime.decoding.shared_options import (
    block_size_option,
    max_new_tokens_option,
    proposer_option,
    threads_option,
)
from cllm_export.runtime.general_text import text_option
from cllm_export.runtime.model import Model


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """How held-out prompts are decoded. By default they are decoded with the settings the model was trained with."""

    block_size: int | None = block_size_option()
    proposer: ProposerName | None = proposer_option()
    max_new_tokens: int = max_new_tokens_option()
    threads: int | None = threads_option()
    text: Path | None = text_option()

    def __post_init__(self) -> None:
        check_options(self)

    def settings(self, model: Model) -> Settings:
        """The settings for a model."""
        default = default_settings(model, max_new_tokens=self.max_new_tokens)
        return Settings(
            method=default.method,
            block_size=self.block_size or default.block_size,
            proposer=self.proposer or default.proposer,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The decodes of all prompts that could be decoded."""

    questions: tuple[Question, ...]
    recordings: tuple[Recording, ...]
    texts: tuple[str, ...]

    @property
    def new_tokens(self) -> int:
        return sum(len(recording.new) for recording in self.recordings)

    @property
    def forwards(self) -> int:
        return sum(len(recording.states) for recording in self.recordings)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens / decode forwards."""
        return self.new_tokens / self.forwards

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Scores of the prompts that have answers. They execute SQL, which takes longer than decoding it."""
        scores = score_prompts(self.questions, self.texts)
        return {measure: share.to_dict() for measure, share in scores.shares.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the scores."""
        return {
            "prompts": len(self.recordings),
            "new_tokens": self.new_tokens,
            "forwards": self.forwards,
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "scores": self.scores,
        }


def measure_decode(
    model: Model,
    questions: Sequence[Question],
    settings: Settings,
    progress: Progress | None = None,
    stage: str = "prompts",
) -> Measured:
    """Decode held-out prompts.

    Raises:
        OptionError: the settings do not suit the model.
        PromptError: no prompt can be decoded.
    """
    prompts = [question.prompt for question in questions]
    decoded = decode_prompts(model, prompts, settings, compare=False, progress=progress, stage=stage)
    chosen = [questions[answer.index] for answer in decoded.answers]
    return Measured(
        questions=tuple(chosen),
        recordings=tuple(
            recording_of(question.prompt.id, model.encode(question.prompt.content), answer.generation.forwards)
            for question, answer in zip(chosen, decoded.answers, strict=True)
        ),
        texts=tuple(answer.generation.text for answer in decoded.answers),
    )


QualityMeasure = Literal["execution_match", "exact_match", "same_text"]
SAME_TEXT: QualityMeasure = "same_text"
QUALITY_MEASURES: tuple[QualityMeasure, ...] = ("execution_match", "exact_match")
"""Scores of right answers, the better one first."""


class Quality(NamedTuple):
    """How much worse a bundle answers, and by which measure."""

    loss: float
    """Lost share of prompts. Below 0 if more answers are right."""
    measure: QualityMeasure


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a bundle against the unquantised one, on the same prompts and texts."""

    tpf: float
    """Lost share of the tokens per forward. Below 0 if there are more."""
    quality: Quality
    agreement: float
    """Share of the tokens of given texts for which both predict the same token."""
    perplexity: float
    """Share by which the perplexity is higher, see ``Readings.perplexity_rise``. Below 0 if it is lower."""
    same_text: float
    """Share of prompts with an equal text."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "tpf_loss": self.tpf,
            "quality_loss": self.quality.loss,
            "quality_measure": self.quality.measure,
            "agreement": self.agreement,
            "perplexity_rise": self.perplexity,
            "same_text": self.same_text,
        }


def tpf_loss(before: Measured, after: Measured) -> float:
    """Lost share of the tokens per forward. Below 0 if there are more."""
    return 1 - after.tokens_per_forward / before.tokens_per_forward


def quality_loss(before: Measured, after: Measured) -> Quality:
    """Share of prompts that the second bundle answers worse.

    If answers can be executed, this is the loss of the execution score, else that of the exact-match score. A score of
    0 of both bundles is no evidence. Where no score is evidence, it is the share of texts that differ from the
    unquantised bundle's.
    """
    for measure in QUALITY_MEASURES:
        first, second = (each.scores.get(measure, {}).get("share") for each in (before, after))
        if first is not None and second is not None and is_evidence(first, second):
            return Quality(float(first - second), measure)
    return Quality(1 - same_text(before, after), SAME_TEXT)


def is_evidence(*shares: float) -> bool:
    """Whether scores say anything: if no model has a right answer, nothing can be lost."""
    return any(share > 0 for share in shares)


def same_text(before: Measured, after: Measured) -> float:
    """Share of prompts with an equal text."""
    return float(compare_texts(before, after)["exact_match"]["share"])


def losses_between(before: Measured, after: Measured, ours: Readings, theirs: Readings) -> Losses:
    """The losses of the second of two bundles, from the decodes and the readings of both."""
    return Losses(
        tpf=tpf_loss(before, after),
        quality=quality_loss(before, after),
        agreement=ours.agreement(theirs).share,
        perplexity=ours.perplexity_rise(theirs),
        same_text=same_text(before, after),
    )


def compare_texts(before: Measured, after: Measured) -> dict[str, Any]:
    """Count exact matches, and find where other texts first differ, in new tokens. JSON-ready.

    Raises:
        CalibrationError: the bundles decoded different prompts.
    """
    if [each.prompt for each in before.recordings] != [each.prompt for each in after.recordings]:
        raise CalibrationError("the bundles tokenise or take prompts differently: build both from one checkpoint alike")
    pairs = [(first.new, second.new) for first, second in zip(before.recordings, after.recordings, strict=True)]
    divergences = sorted(at for pair in pairs if (at := first_difference(*pair)) is not None)
    return {
        "exact_match": {
            "equal": len(pairs) - len(divergences),
            "of": len(pairs),
            "share": round(1 - len(divergences) / len(pairs), 6),
        },
        "first_divergence": {"earliest": divergences[0], "median": median(divergences)} if divergences else None,
    }
