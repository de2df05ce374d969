"""Decodes each prompt of a task twice: with the chosen Jacobi loop, and autoregressively at the same n."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cllm_export.bundle.contract import check_block_size
from cllm_export.bundle.manifest import PROPOSERS, ProposerName
from cllm_export.checks import require_at_least, require_one_of
from cllm_export.errors import PromptError
from cllm_export.progress import Progress
from cllm_export.prompts import Prompt
from cllm_export.runtime.decoding.request import METHOD_OF_LOOP, JacobiMethod
from cllm_export.runtime.model import Model
from cllm_export.runtime.request_run import Generation

JACOBI_METHODS: tuple[JacobiMethod, ...] = tuple(METHOD_OF_LOOP.values())


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How prompts are decoded."""

    method: JacobiMethod
    block_size: int
    proposer: ProposerName
    max_new_tokens: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_one_of("method", self.method, JACOBI_METHODS)
        require_one_of("proposer", self.proposer, PROPOSERS)
        require_at_least("block_size", self.block_size, 1)
        require_at_least("max_new_tokens", self.max_new_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of one prompt."""

    index: int
    """Number of the example, from 0."""
    generation: Generation
    exact: bool | None
    """Whether autoregressive decoding at the same n gave the same tokens; None if they were not compared."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The results of a set of prompts."""

    answers: tuple[Answer, ...]
    skipped: dict[str, int]
    """Reason (``empty``, ``too_long``, ``not_tokenised``) -> number of prompts."""


def default_settings(model: Model, *, max_new_tokens: int) -> Settings:
    """The loop, n and proposer that a model was trained with; without these, sliding, the model's n and pad."""
    trained = model.facts.trained_with
    fixed = model.engine.fixed_shapes
    return Settings(
        method=METHOD_OF_LOOP[trained.loop if trained else "sliding"],
        block_size=fixed.block_size if fixed else model.facts.block_size,
        proposer=trained.proposer if trained else "pad",
        max_new_tokens=max_new_tokens,
    )


def check_settings(model: Model, settings: Settings) -> None:
    """Refuse settings that a model cannot decode with.

    Raises:
        OptionError: n is larger than the model allows, or differs from the n that the bundle is pinned to.
    """
    fixed = model.engine.fixed_shapes
    pinned = fixed.block_size if fixed else None
    check_block_size(settings.block_size, largest=model.engine.geometry.max_block_size, pinned=pinned)


def decode_prompts(
    model: Model,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    compare: bool = True,
    progress: Progress | None = None,
    stage: str = "prompts",
) -> Decoded:
    """Decode every prompt that the model can decode, and count the others.

    Args:
        compare: also decode autoregressively, to check that the tokens are equal.

    Raises:
        OptionError: the settings do not fit the model.
        PromptError: no prompt can be decoded.
    """
    check_settings(model, settings)
    answers: list[Answer] = []
    skipped: Counter[str] = Counter()
    first_error = ""
    for index, prompt in enumerate(prompts):
        try:
            answers.append(_decode(model, index, _encode(model, prompt), settings, compare))
        except _SkippedError as skip:
            skipped[skip.reason] += 1
            first_error = first_error or str(skip)
        if progress:
            progress(stage, index + 1, len(prompts))
    if not answers:
        raise PromptError(f"none of {len(prompts)} prompts can be decoded; the first: {first_error}")
    return Decoded(answers=tuple(answers), skipped=dict(skipped))


class _SkippedError(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _encode(model: Model, prompt: Prompt) -> list[int]:
    if isinstance(prompt.content, str) and not prompt.content.strip():
        raise _SkippedError("empty", "the prompt is empty")
    try:
        ids = model.encode(prompt.content)
    except PromptError as error:
        raise _SkippedError("not_tokenised", str(error)) from None
    if len(ids) >= model.facts.max_length:
        raise _SkippedError(
            "too_long", f"{len(ids)} tokens, and the model holds {model.facts.max_length} with the new ones"
        )
    return ids


def _decode(model: Model, index: int, ids: list[int], settings: Settings, compare: bool) -> Answer:
    limit = min(settings.max_new_tokens, model.facts.max_length - len(ids))
    common = {"max_new_tokens": limit, "block_size": settings.block_size, "stop": settings.stop}
    generation = model.generate(ids, method=settings.method, proposer=settings.proposer, **common)  # type: ignore[arg-type]
    exact = None
    if compare:
        baseline = model.generate(ids, method="autoregressive", **common)  # type: ignore[arg-type]
        exact = baseline.token_ids == generation.token_ids
    return Answer(index=index, generation=generation, exact=exact)
