"""The summary of a collection: how fast the model converges, how long its samples are, what was dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cllm_export.training.collection.collection import CollectionSettings, ShardEntry, merge_dropped
from cllm_export.training.collection.shards import read_shard

_COLUMNS = ["prompt_ids", "new_ids", "write_index"]


def summarize_collection(directory: Path, settings: CollectionSettings, shards: Sequence[ShardEntry]) -> dict[str, Any]:
    """The summary of a collection's kept samples, JSON-ready. Lengths are in tokens.

    ``tokens_per_forward`` is new tokens / decode forwards. ``iterations_per_block`` is forwards / blocks. In the block
    loop, blocks are those that it iterated. The sliding loop has no blocks, so every n new tokens count as one.
    """
    prompts, answers, forwards, blocks = [], [], 0, 0.0
    for row in _rows(directory, shards):
        prompts.append(len(row["prompt_ids"]))
        answers.append(len(row["new_ids"]))
        forwards += len(row["write_index"])
        blocks += len(set(row["write_index"])) if settings.loop == "block" else answers[-1] / settings.block_size
    dropped = merge_dropped([shard.dropped for shard in shards])
    return {
        "prompts": settings.num_prompts,
        "samples": len(answers),
        "new_tokens": sum(answers),
        "forwards": forwards,
        "tokens_per_forward": _ratio(sum(answers), forwards),
        "iterations_per_block": _ratio(forwards, blocks),
        "prompt_length": _spread(prompts),
        "answer_length": _spread(answers),
        "dropped": {
            reason: {"count": entry.count, "ids": list(entry.ids), "detail": entry.detail}
            for reason, entry in dropped.items()
        },
    }


def _rows(directory: Path, shards: Sequence[ShardEntry]) -> Iterator[Mapping[str, Any]]:
    for shard in shards:
        yield from read_shard(directory / shard.file, _COLUMNS).to_pylist()


def _spread(lengths: Sequence[int]) -> dict[str, float] | None:
    """Median and 90th percentile (nearest rank)."""
    if not lengths:
        return None
    return {"median": median(lengths), "p90": sorted(lengths)[math.ceil(0.9 * len(lengths)) - 1]}


def _ratio(amount: float, per: float) -> float | None:
    return round(amount / per, 4) if per else None
