"""Bundles on teacher-forced text: general text, and what the unquantised bundle says to the held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cllm_export.bundle.quantization import Agreement
from cllm_export.calibration.recording import Recording
from cllm_export.progress import Progress
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.general_text import Passage
from cllm_export.runtime.teacher_forced import (
    KNOWN_PERPLEXITY,
    ForcedText,
    Reading,
    agreement,
    general_texts,
    perplexity,
    read_texts,
)

Known = Literal["all", "prompts"]


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What one bundle predicts on the texts."""

    general: tuple[Reading, ...]
    prompts: tuple[Reading, ...]

    def to_dict(self) -> dict[str, Any]:
        """The perplexities, JSON-ready. ``perplexity`` is over the new tokens of the unquantised bundle's texts."""
        return {"perplexity": perplexity(self.prompts), "general_perplexity": perplexity(self.general)}

    @property
    def known(self) -> Known:
        """The texts that this bundle knows: those of the prompts, and general text if it is used to such text."""
        return "all" if perplexity(self.general) <= KNOWN_PERPLEXITY else "prompts"

    def agreement(self, other: Readings) -> Agreement:
        """The agreement of two bundles on the texts that this one knows."""
        ours, theirs = (
            (*each.general, *each.prompts) if self.known == "all" else each.prompts for each in (self, other)
        )
        return agreement(ours, theirs)

    def compare(self, other: Readings) -> dict[str, Any]:
        """The agreement of two bundles on the texts that this one knows and on each kind, JSON-ready."""
        return {
            "known": self.known,
            "agreement": self.agreement(other).to_dict(),
            "general_agreement": agreement(self.general, other.general).to_dict(),
            "prompts_agreement": agreement(self.prompts, other.prompts).to_dict(),
        }

    def perplexity_rise(self, other: Readings) -> float:
        """Share by which the second bundle's perplexity is above the first one's. Below 0 if lower.

        It is that of general text, or of the prompts' texts if this bundle does not know general text.
        """
        ours, theirs = (each.general if self.known == "all" else each.prompts for each in (self, other))
        return perplexity(theirs) / perplexity(ours) - 1


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
