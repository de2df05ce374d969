"""What a run says before it begins: which prompts it keeps and drops, why, what to change, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from cllm_export.progress import counted
from cllm_export.training.data.samples import EMPTY_PROMPT, NO_ANSWER, TOO_LONG, UNTOKENISABLE
from cllm_export.training.options import TuneOptions
from cllm_export.training.prepare import TrainingData

REMEDIES = {
    EMPTY_PROMPT: "remove these rows",
    NO_ANSWER: "give each row an answer, or none to all, and the model answers them first",
    UNTOKENISABLE: "the text is not valid, or the model has no chat template for messages",
}
"""Reason for dropping a prompt -> what to change. Too long prompts have their own."""
KEPT = 0.9
"""Share of the prompts that the advice about their length would keep."""


def describe_data(data: TrainingData, options: TuneOptions, *, num_processes: int) -> list[str]:
    """Sentences for the user, the most important first. Names of options are those of ``TuneOptions``."""
    kept, dropped = len(data.samples) + len(data.held_out), sum(data.dropped.values())
    return [
        f"kept {kept:,} of {kept + dropped:,} prompts: {len(data.samples):,} to train on, {len(data.held_out):,} to "
        "measure on",
        *(f"dropped {text}" for text in _dropped(data, kept + dropped)),
        _length(data, options, num_processes),
    ]


def _dropped(data: TrainingData, total: int) -> Iterator[str]:
    for reason, count in sorted(data.dropped.items(), key=lambda entry: -entry[1]):
        bare = reason.removesuffix(" (held out)")
        remedy = _longer(data) if bare == TOO_LONG else REMEDIES.get(bare, "")
        yield f"{count:,} ({count / total:.0%}): {reason}{f'; {remedy}' if remedy else ''}"


def _longer(data: TrainingData) -> str:
    """What to do about samples that are too long."""
    limit = f"they take more than {data.max_length:,} tokens with their answers"
    if not data.too_long:
        return limit
    lengths = sorted([len(sample.tokens) for sample in (*data.samples, *data.held_out)] + list(data.too_long))
    most, all_of_them = lengths[math.ceil(KEPT * len(lengths)) - 1], lengths[-1]
    if data.max_length >= data.longest:
        return f"{limit}, all that the model holds: shorten prompts or answers"
    if all_of_them > data.longest:
        return f"{limit}: raise max_length={min(most, data.longest)}; the model holds at most {data.longest:,}"
    several = f"max_length={most} keeps {KEPT:.0%} of all, " if data.max_length < most < all_of_them else ""
    return f"{limit}: {several}max_length={all_of_them} keeps all"


def _length(data: TrainingData, options: TuneOptions, num_processes: int) -> str:
    lengths = [len(sample.tokens) for sample in data.samples]
    in_a_step = options.batch_size * options.gradient_accumulation * num_processes
    steps_an_epoch = math.ceil(len(lengths) * options.visits / in_a_step)
    if options.steps is None:
        duration = f"{options.minutes:g} minutes of training"
    else:
        epochs = f"{options.steps / steps_an_epoch:.2g}"
        steps = counted(options.steps, "step")
        verb = "is" if options.steps == 1 else "are"
        duration = f"{steps} of training {verb} {epochs} {'epoch' if epochs == '1' else 'epochs'}"
    visits = f", each sample {options.visits} times" if options.visits > 1 else ""
    return (
        f"{sum(lengths):,} tokens to train on, median {median(lengths):g} and at most {max(lengths):,} a sample; "
        f"{steps_an_epoch:,} steps an epoch{visits}; {duration}"
    )
