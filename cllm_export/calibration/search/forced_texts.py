"""Bundles on teacher-forced text: general text, and what the unquantised bundle says to the held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cllm_export.bundle.quantization import Agreement
from cllm_export.calibration.recording import Recording
from cllm_export.progress import Progress
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.general_text import Passage
from cllm_export.runtime.teacher_forced import (
    ForcedText,
    Reading,
    agreement,
    general_texts,
    perplexity,
    read_texts,
)


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What one bundle predicts on the texts."""

    general: tuple[Reading, ...]
    prompts: tuple[Reading, ...]

    def to_dict(self) -> dict[str, Any]:
        """The perplexities, JSON-ready. ``perplexity`` is over the new tokens of the unquantised bundle's texts."""
        return {"perplexity": perplexity(self.prompts), "general_perplexity": perplexity(self.general)}

    def agreement(self, other: Readings) -> Agreement:
        """The agreement of two bundles on all texts."""
        return agreement((*self.general, *self.prompts), (*other.general, *other.prompts))

    def compare(self, other: Readings) -> dict[str, Any]:
        """The agreement of two bundles on all texts and on each kind, JSON-ready."""
        return {
            "agreement": self.agreement(other).to_dict(),
            "general_agreement": agreement(self.general, other.general).to_dict(),
            "prompts_agreement": agreement(self.prompts, other.prompts).to_dict(),
        }

    def perplexity_rise(self, other: Readings) -> float:
        """Share by which the second bundle's perplexity on general text is above the first one's. Below 0 if lower."""
        return perplexity(other.general) / perplexity(self.general) - 1


class ForcedTexts:
    """The texts that every bundle reads.

    The prompts themselves are read but not counted, because a model that was tuned only on answers does not predict
    prompts.
    """

    def __init__(
        self, codec: TextCodec, passages: Sequence[Passage], recordings: Sequence[Recording], *, max_length: int
    ) -> None:
        self._general = general_texts(codec, passages, max_length=max_length)
        self._prompts = [ForcedText(recording.text, len(recording.prompt)) for recording in recordings]

    def read(self, engine: Engine, pad: int, progress: Progress = lambda *_: None) -> Readings:
        """What an engine predicts."""
        texts = [*self._general, *self._prompts]
        readings = read_texts(engine, texts, pad, lambda done: progress("reading texts", done, len(texts)))
        count = len(self._general)
        return Readings(general=tuple(readings[:count]), prompts=tuple(readings[count:]))
