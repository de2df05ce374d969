"""Training samples: tokenised prompts with their target answers, and counts of the prompts that were dropped."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from cllm_export.errors import PromptError
from cllm_export.prompts import Prompt
from cllm_export.runtime.decoding.text import TextCodec

EMPTY_PROMPT, NO_ANSWER, UNTOKENISABLE, TOO_LONG = "empty prompt", "no answer", "does not tokenise", "too long"
"""Reasons why a prompt gives no sample."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and its target. ``tokens`` [L] is the prompt followed by the answer and one end-of-sequence token."""

    id: str
    tokens: tuple[int, ...]
    num_prompt: int
    """Number of prompt tokens, at least one."""
    states: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Recorded Jacobi states, in order. Each is the position of the block's first token, and the block."""

    @property
    def first_start(self) -> int:
        """Position where decoding starts: the prompt's last token, which is the first token of the first block."""
        return self.num_prompt - 1

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tokens[: self.num_prompt]

    @property
    def num_rows(self) -> int:
        """Rows of the clean sequence: every token except the last, since each row predicts the next token."""
        return len(self.tokens) - 1


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a prompt file or of a folder of trajectories."""

    samples: list[Sample]
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of prompts dropped for it."""
    too_long: tuple[int, ...] = ()
    """Tokens of each prompt that was dropped as too long, answer and end-of-sequence included."""


def encode_samples(prompts: Iterable[Prompt], codec: TextCodec, *, eos_token_id: int, max_length: int) -> Samples:
    """Tokenise prompts and their answers: the answer follows the prompt unchanged, then comes end-of-sequence.

    A prompt is dropped and counted if it is empty, has no answer, does not tokenise, or is too long. It is too long if
    prompt, answer and end-of-sequence together exceed ``max_length`` tokens.
    """
    dropped: Counter[str] = Counter()
    too_long: list[int] = []

    def encoded() -> Iterator[Sample]:
        for prompt in prompts:
            made = _encode(prompt, codec, eos_token_id)
            if isinstance(made, str):
                dropped[made] += 1
            elif len(made.tokens) > max_length:
                dropped[TOO_LONG] += 1
                too_long.append(len(made.tokens))
            else:
                yield made

    samples = list(with_shared_ids(encoded()))
    return Samples(samples=samples, dropped=dict(dropped), too_long=tuple(too_long))


def with_shared_ids(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The same samples with one shared object for each token id. Many samples then take a third of the memory."""
    known: dict[int, int] = {}

    def share(tokens: Iterable[int]) -> tuple[int, ...]:
        return tuple(known.setdefault(token, token) for token in tokens)

    for sample in samples:
        states = tuple((start, share(block)) for start, block in sample.states)
        yield replace(sample, tokens=share(sample.tokens), states=states)


def _encode(prompt: Prompt, codec: TextCodec, eos_token_id: int) -> Sample | str:
    """The sample, or the reason why there is none."""
    if not prompt.content:
        return EMPTY_PROMPT
    if not prompt.answer:
        return NO_ANSWER
    try:
        ids = encode_prompt(prompt, codec)
        answer = codec.encode_continuation(prompt.answer)
    except PromptError:
        return UNTOKENISABLE
    if not ids or not answer:
        return EMPTY_PROMPT if not ids else NO_ANSWER
    return Sample(id=prompt.id, tokens=(*ids, *answer, eos_token_id), num_prompt=len(ids))


def encode_prompt(prompt: Prompt, codec: TextCodec) -> list[int]:
    """Token ids of a prompt, text or messages, as ``Model.generate`` encodes it.

    Raises:
        PromptError: the prompt does not tokenise, or the model has no chat template for its messages.
    """
    content = prompt.content
    return codec.encode(content) if isinstance(content, str) else codec.encode_chat(content)


def digest_samples(samples: Iterable[Sample]) -> str:
    """sha256 of everything that training uses of the samples. Equal data gives equal sums, whatever its source."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.id}:{sample.num_prompt}:{len(sample.states)}:".encode())
        for start, tokens in ((0, sample.tokens), *sample.states):
            digest.update(array("q", (start, len(tokens), *tokens)).tobytes())
    return digest.hexdigest()
