"""Decodes one range of prompts into the trajectories to keep, and the reasons for dropping the other prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from cllm_export.bundle.manifest import Loop
from cllm_export.errors import PromptError
from cllm_export.prompts import Prompt
from cllm_export.runtime.decoding.batch import BatchRequest, decode_requests
from cllm_export.runtime.decoding.request import METHOD_OF_LOOP, Decode, JacobiMethod
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import pad_token
from cllm_export.training.collection.collection import CollectionSettings, Dropped, Trajectory, merge_dropped
from cllm_export.training.data.cleaning import why_dropped
from cllm_export.training.data.samples import EMPTY_PROMPT, UNTOKENISABLE

LOOP_OF_METHOD: dict[JacobiMethod, Loop] = {method: loop for loop, method in METHOD_OF_LOOP.items()}

TOO_LONG = "prompt too long"


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A prompt that can be decoded."""

    id: str
    index: int
    request: BatchRequest


@dataclass(frozen=True, kw_only=True)
class _LeftOut:
    """A prompt that gives no trajectory."""

    id: str
    reason: str
    detail: str


def decode_range(
    model: Model,
    prompts: Sequence[Prompt],
    first: int,
    settings: CollectionSettings,
    report: Callable[[int], None],
) -> tuple[list[Trajectory], dict[str, Dropped]]:
    """Decode prompts, of which the first has number ``first`` in the prompt file.

    Returns the trajectories to keep, in the order of the prompts, and the dropped prompts by reason. ``report`` is
    called with the number of prompts done.

    Raises:
        EngineError: the engine failed.
    """
    encoded = [_encode(model, prompt, first + offset, settings) for offset, prompt in enumerate(prompts)]
    usable = [entry for entry in encoded if isinstance(entry, _Encoded)]
    decodes = decode_requests(
        model.engine,
        [entry.request for entry in usable],
        method=METHOD_OF_LOOP[settings.loop],
        block_size=settings.block_size,
        proposer=settings.proposer,
        eos_token_ids=model.facts.eos_token_ids,
        pad_token_id=pad_token(model.facts),
        finished=lambda done: report(len(prompts) - len(usable) + done),
    )
    judged = [_judge(*pair, model.facts.eos_token_ids) for pair in zip(usable, decodes, strict=True)]
    rows = [entry for entry in judged if isinstance(entry, Trajectory)]
    return rows, _by_reason([entry for entry in (*encoded, *judged) if isinstance(entry, _LeftOut)])


def _encode(model: Model, prompt: Prompt, index: int, settings: CollectionSettings) -> _Encoded | _LeftOut:
    if not prompt.content:
        return _LeftOut(id=prompt.id, reason=EMPTY_PROMPT, detail="it holds no text")
    try:
        ids = model.encode(prompt.content)
    except PromptError as error:
        return _LeftOut(id=prompt.id, reason=UNTOKENISABLE, detail=str(error))
    room = settings.max_length - len(ids)
    if room < 1:
        detail = f"it has {len(ids)} tokens, and this model holds {settings.max_length}, at least one of them new"
        return _LeftOut(id=prompt.id, reason=TOO_LONG, detail=detail)
    limit = min(settings.max_new_tokens or room, room)
    request = BatchRequest(prompt=ids, max_new_tokens=limit, seed=_seed_of(settings.seed, index, prompt.id))
    return _Encoded(id=prompt.id, index=index, request=request)


def _seed_of(seed: int, index: int, prompt_id: str) -> int:
    """The seed of one prompt. It does not depend on the prompts decoded before it or in the same batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}:{prompt_id}".encode()).digest()[:8])


def _judge(entry: _Encoded, decode: Decode, eos_token_ids: Collection[int]) -> Trajectory | _LeftOut:
    records = decode.records
    new_ids = [token for record in records for token in record.new]
    assert decode.finish_reason, "it was decoded to its end"
    if reason := why_dropped(new_ids, decode.finish_reason, eos_token_ids=eos_token_ids):
        return _LeftOut(id=entry.id, reason=reason, detail=f"its answer has {len(new_ids)} tokens")
    return Trajectory(
        id=entry.id,
        index=entry.index,
        prompt_ids=list(entry.request.prompt),
        new_ids=new_ids,
        finish_reason=decode.finish_reason,
        write_index=[record.write_index for record in records],
        block=[record.block for record in records],
        next_ids=[record.next_ids for record in records],
        num_accepted=[record.num_accepted for record in records],
    )


def _by_reason(left_out: Sequence[_LeftOut]) -> dict[str, Dropped]:
    parts = [
        {entry.reason: Dropped(count=1, ids=(entry.id,), detail=f"prompt {entry.id}: {entry.detail}")}
        for entry in left_out
    ]
    return merge_dropped(parts)
