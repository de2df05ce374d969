"""Reads training data: answers from a prompt file, collected trajectories, or answers that the model generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cllm_export.bundle.storage import sha256_of
from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError, PromptError, TrajectoryError, TuningError
from cllm_export.exporter.checkpoint.read import Checkpoint, open_checkpoint
from cllm_export.progress import Progress
from cllm_export.prompts import Prompt, read_prompts
from cllm_export.runtime.decoding.request import METHOD_OF_LOOP
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.training.collection.collect import collect
from cllm_export.training.collection.options import CollectOptions
from cllm_export.training.collection.source import open_source
from cllm_export.training.collection.trajectories import read_trajectories
from cllm_export.training.data.samples import TOO_LONG, Sample, Samples, encode_samples, with_shared_ids
from cllm_export.training.options import TuneOptions
from cllm_export.training.settle import settle_tuning


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The samples that a run trains on, and those that it is measured on."""

    samples: list[Sample]
    held_out: list[Sample]
    dropped: dict[str, int]
    """Reason -> number of prompts dropped for it."""
    too_long: tuple[int, ...]
    """Tokens of each prompt that was dropped as too long, as far as they were counted."""
    max_length: int
    """Tokens that a sample may have in this run."""
    longest: int
    """Tokens that the checkpoint holds."""


def prepare(
    checkpoint_path: str | Path,
    prompts: Path,
    options: TuneOptions,
    *,
    trajectories: Path | None = None,
    held_out: Path | None = None,
    num_held_out: int = 64,
    limit: int | None = None,
    collected: Path,
    progress: Progress = lambda *_: None,
) -> TrainingData:
    """Read the training data of a checkpoint.

    A prompt file with answers is used as it is. If it has no answers, the model first answers the prompts itself. Its
    trajectories are collected into ``collected``, where an interrupted run finds them again. If ``trajectories`` of
    these prompts are given, they replace the answers.

    Args:
        held_out: prompts to measure on. By default the last ``num_held_out`` samples, which are then not trained on.
        limit: use only this many prompts, from the first on. It does not apply to ``held_out``.

    Raises:
        PromptError: a prompt file is missing or malformed.
        TrajectoryError: the trajectories are from another model or other prompts, or are damaged.
        TuningError: nothing is left to train on or to measure on. The message says what was dropped.
    """
    require_at_least("num_held_out", num_held_out, 1)
    if limit is not None:
        require_at_least("limit", limit, 1)
    checkpoint = open_checkpoint(checkpoint_path, max_length=options.max_length)
    reader = _Reader(checkpoint, options, collected, progress)
    found = reader.trajectories(trajectories, prompts, limit) if trajectories else reader.prompts(prompts, limit)
    kept, dropped, too_long = found.samples, dict(found.dropped), found.too_long
    if held_out:
        own = reader.prompts(held_out, num_held_out)
        measured, too_long = own.samples, too_long + own.too_long
        dropped |= {f"{reason} (held out)": count for reason, count in own.dropped.items()}
    else:
        measured, kept = kept[-num_held_out:], kept[:-num_held_out]
    if not kept or not measured:
        left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
        raise TuningError(
            f"{len(kept)} samples are left to train on and {len(measured)} to measure on (dropped: {left_out}): "
            "tuning needs both; give more prompts, a smaller num_held_out, or held_out"
        )
    return TrainingData(
        samples=kept,
        held_out=measured,
        dropped=dropped,
        too_long=too_long,
        max_length=reader.max_length,
        longest=int(checkpoint.config.max_position_embeddings),
    )


class _Reader:
    """Reads samples for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, options: TuneOptions, collected: Path, progress: Progress) -> None:
        if not checkpoint.eos_token_ids:
            raise OptionError(f"{checkpoint.path} names no eos_token_id, so that no answer would ever end: set it")
        self._checkpoint, self._options = checkpoint, options
        self._collected, self._progress = collected, progress
        self.max_length = settle_tuning(options, checkpoint).max_length
        self._codec = TextCodec(
            checkpoint.path,
            chat_template=checkpoint.chat_template,
            special_tokens=checkpoint.special_tokens,
            tokenizer_json=checkpoint.tokenizer_json,
        )

    def prompts(self, path: Path, limit: int | None) -> Samples:
        self._progress("reading prompts", 0, 1)
        prompts = read_prompts(path, limit=limit)
        if not any(prompt.answer for prompt in prompts):
            return self._answered_by_model(path, limit)
        return self._encode(prompts)

    def trajectories(self, path: Path, prompts: Path, limit: int | None) -> Samples:
        """Samples of a collection, which must be made from these prompts."""
        found = read_trajectories(path)
        found.require_same_model(self._checkpoint.fingerprint(), self._checkpoint.tokenizer_sha256)
        if found.manifest.settings.prompts_sha256 != _sha256_of_prompts(prompts):
            raise TrajectoryError(
                f"{path} holds trajectories of other prompts than {prompts}: give the prompts that they were collected "
                "from, or collect these with: cllm-export collect"
            )
        with_states = self._options.objective in ("global", "local")
        too_long: list[int] = []

        def fitting() -> Iterator[Sample]:
            for sample in islice(found.samples(with_states=with_states), limit):
                if len(sample.tokens) <= self.max_length:
                    yield sample
                else:
                    too_long.append(len(sample.tokens))

        kept = list(with_shared_ids(fitting()))
        dropped = {reason: entry.count for reason, entry in found.dropped.items()}
        if too_long:
            dropped[TOO_LONG] = len(too_long)
        return Samples(samples=kept, dropped=dropped, too_long=tuple(too_long))

    def _encode(self, prompts: Sequence[Prompt]) -> Samples:
        return encode_samples(prompts, self._codec, eos_token_id=self._end_token(), max_length=self.max_length)

    def _end_token(self) -> int:
        """The token that ends an answer: the tokenizer's own end-of-sequence token if the model stops at it.

        A chat model stops at several tokens, and its template may never end a turn with the first of them.
        """
        ends = self._checkpoint.eos_token_ids
        own = self._codec.tokenizer.token_to_id(self._checkpoint.special_tokens.get("eos_token", ""))
        return own if own in ends else ends[0]

    def _answered_by_model(self, path: Path, limit: int | None) -> Samples:
        options = CollectOptions(
            method=METHOD_OF_LOOP[self._options.loop],
            block_size=self._options.block_sizes[0],
            proposer=self._options.proposer,
            seed=self._options.seed,
            limit=limit,
        )
        output = self._collected / f"{path.stem}-{_sha256_of_prompts(path)[:8]}"
        collect(open_source(self._checkpoint.path), path, output, options, progress=self._progress)
        return self.trajectories(output, path, limit)


def _sha256_of_prompts(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise PromptError(f"cannot read prompts from {path}: {error.strerror}") from None
