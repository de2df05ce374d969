"""From files to training data: answers of a prompt file, collected trajectories, or answers the model gives first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm_export.bundle import TOKENIZER_NAME, Progress, sha256_of
from cllm_export.contract import require_at_least
from cllm_export.errors import OptionError, TuningError
from cllm_export.exporter.checkpoint import Checkpoint, default_max_length, open_checkpoint
from cllm_export.prompts import Prompt, read_prompts
from cllm_export.runtime.text import TextCodec
from cllm_export.training.collect import CollectOptions, collect
from cllm_export.training.held_out import METHOD_OF_LOOP
from cllm_export.training.samples import Sample, Samples, encode_samples
from cllm_export.training.source import open_source
from cllm_export.training.trajectories import read_trajectories
from cllm_export.training.tune import TuneOptions


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains on, and what it is measured on meanwhile."""

    samples: list[Sample]
    held_out: list[Sample]
    dropped: dict[str, int]
    """Reason -> prompts left out for it."""


def prepare(
    checkpoint_path: str | Path,
    prompts: Path,
    options: TuneOptions,
    *,
    trajectories: Path | None = None,
    held_out: Path | None = None,
    num_held_out: int = 64,
    collected: Path,
    progress: Progress = lambda *_: None,
) -> TrainingData:
    """Read the training data of a checkpoint.

    A prompt file with answers is trained on as it is. One without is first answered by the model itself: its
    trajectories are collected into ``collected``, where an interrupted run finds them again. ``trajectories`` are used
    instead of either; the prompts then only say what the run is about and may be those of the collection.

    Args:
        held_out: prompts to measure on; by default the last ``num_held_out`` of what there is, not trained on then.

    Raises:
        PromptError: a prompt file is missing or malformed.
        TrajectoryError: the trajectories are another model's, or damaged.
        TuningError: nothing is left to train or to measure on; says what was dropped.
    """
    require_at_least("num_held_out", num_held_out, 1)
    checkpoint = open_checkpoint(checkpoint_path, max_length=options.max_length)
    reader = _Reader(checkpoint, options, collected, progress)
    found = reader.trajectories(trajectories) if trajectories else reader.prompts(prompts)
    if held_out:
        measured = reader.prompts(held_out).samples[:num_held_out]
        kept = found.samples
    else:
        measured, kept = found.samples[-num_held_out:], found.samples[:-num_held_out]
    if not kept or not measured:
        left_out = ", ".join(f"{count} {reason}" for reason, count in found.dropped.items()) or "none dropped"
        raise TuningError(
            f"{len(kept)} samples are left to train on and {len(measured)} to measure on ({left_out}): "
            "tuning needs both; give more prompts, or --held-out"
        )
    return TrainingData(samples=kept, held_out=measured, dropped=found.dropped)


class _Reader:
    """Reads samples for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, options: TuneOptions, collected: Path, progress: Progress) -> None:
        if not checkpoint.eos_token_ids:
            raise OptionError(f"{checkpoint.path} names no eos_token_id, so that no answer would ever end: set it")
        self._checkpoint, self._options = checkpoint, options
        self._collected, self._progress = collected, progress
        self._max_length = options.max_length or default_max_length(checkpoint.config)
        self._codec = TextCodec(
            checkpoint.path, chat_template=checkpoint.chat_template, special_tokens=checkpoint.special_tokens
        )

    def prompts(self, path: Path) -> Samples:
        prompts = read_prompts(path)
        if not any(prompt.answer for prompt in prompts):
            return self._answered_by_model(path)
        return self._encode(prompts)

    def trajectories(self, path: Path) -> Samples:
        found = read_trajectories(path)
        found.require_same_model(self._checkpoint.fingerprint(), sha256_of(self._checkpoint.path / TOKENIZER_NAME))
        with_states = self._options.objective in ("global", "local")
        fitting = [sample for sample in found.samples(with_states=with_states) if self._fits(sample)]
        dropped = {reason: entry.count for reason, entry in found.dropped.items()}
        if too_long := len(found) - len(fitting):
            dropped["too long"] = too_long
        return Samples(samples=fitting, dropped=dropped)

    def _fits(self, sample: Sample) -> bool:
        return len(sample.tokens) <= self._max_length

    def _encode(self, prompts: Sequence[Prompt]) -> Samples:
        return encode_samples(
            prompts, self._codec, eos_token_id=self._checkpoint.eos_token_ids[0], max_length=self._max_length
        )

    def _answered_by_model(self, path: Path) -> Samples:
        options = CollectOptions(
            method=METHOD_OF_LOOP[self._options.loop],
            block_size=self._options.block_sizes[0],
            fill=self._options.fill,
            seed=self._options.seed,
        )
        output = self._collected / path.stem
        collect(open_source(self._checkpoint.path), path, output, options, progress=self._progress)
        return self.trajectories(output)
