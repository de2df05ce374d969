"""Statistics of a request, in the measures of the field. They are computed from records, outside the decode loop."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class ForwardRecord(NamedTuple):
    """One decode forward of one request."""

    write_index: int
    """Position of the block's first token."""
    block: list[int]
    next_ids: list[int]
    num_accepted: int
    """Accepted rows, without those whose tokens lie after the end of the request."""
    new: list[int]
    """New tokens, cut at the end of the request."""


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """Measures of a decode whose loop stayed on the device."""

    num_forwards: int
    """Enqueued forwards, with the idle ones at the end, which do not count as forwards of the request."""
    num_syncs: int
    """How often the host waited for the device during decode."""
    form: str
    """The form of its graphs: ``conditional`` or ``unrolled``."""
    form_reason: str | None
    """Why the form is ``unrolled``."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The work and the time of one request. Prefill (the prompt without its last token) is not counted as forwards."""

    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens whose KV came from the prefix cache and was not computed."""
    new_tokens: int
    forwards: int
    """Decode forwards, with those that only confirm a fixed point."""
    acceptance_histogram: dict[int, int]
    """Number of forwards by m, the draft tokens that a forward accepted. The block loop verifies a block again until
    its fixed point. There, m also counts tokens that earlier forwards had accepted."""
    fast_forwarded: int
    """Sum over forwards of the new tokens beyond the first."""
    stationary: int
    """Draft tokens that were right while an earlier one was still wrong, and stayed right until accepted."""
    prefill_seconds: float
    decode_seconds: float
    engine_seconds: float
    """Seconds of decode spent inside the engine. The rest of ``decode_seconds`` is the loop's overhead."""
    on_device: OnDevice | None = None
    """None if the loop ran on the host."""

    @property
    def syncs_per_token(self) -> float | None:
        """Waits of the host for the device / new tokens; None if the loop ran on the host."""
        return self.on_device.num_syncs / max(1, self.new_tokens) if self.on_device else None

    @property
    def tokens_per_forward(self) -> float:
        """New tokens / decode forwards."""
        return self.new_tokens / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decode, prefill excluded."""
        return self.new_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def overhead(self) -> float:
        """Decode wall-clock / time inside the engine, at least 1."""
        return self.decode_seconds / self.engine_seconds if self.engine_seconds else 1.0

    def to_dict(self) -> dict[str, object]:
        """Every measure, JSON-ready."""
        histogram = {str(matched): count for matched, count in sorted(self.acceptance_histogram.items())}
        on_device = {}
        if self.on_device and self.syncs_per_token is not None:
            on_device = {"on_device": vars(self.on_device) | {"syncs_per_token": round(self.syncs_per_token, 4)}}
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "new_tokens": self.new_tokens,
            "forwards": self.forwards,
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "acceptance_histogram": histogram,
            "fast_forwarded": self.fast_forwarded,
            "stationary": self.stationary,
            "prefill_seconds": round(self.prefill_seconds, 6),
            "decode_seconds": round(self.decode_seconds, 6),
            "engine_seconds": round(self.engine_seconds, 6),
            "tokens_per_second": round(self.tokens_per_second, 2),
            **on_device,
        }


def summarize(
    records: Sequence[ForwardRecord],
    *,
    prompt_tokens: int,
    reused_tokens: int = 0,
    prefill_seconds: float,
    decode_seconds: float,
    engine_seconds: float,
    on_device: OnDevice | None = None,
) -> Statistics:
    """Statistics of one request from the record of its forwards."""
    return Statistics(
        prompt_tokens=prompt_tokens,
        reused_tokens=reused_tokens,
        new_tokens=sum(len(record.new) for record in records),
        forwards=len(records),
        acceptance_histogram=dict(Counter(record.num_accepted - 1 for record in records)),
        fast_forwarded=sum(max(0, len(record.new) - 1) for record in records),
        stationary=count_stationary(records),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        engine_seconds=engine_seconds,
        on_device=on_device,
    )


def count_stationary(records: Sequence[ForwardRecord]) -> int:
    """Number of accepted draft tokens that the block before held at the same position without accepting them."""
    if not records:
        return 0
    end = records[0].write_index + sum(len(record.new) for record in records)
    pairs = itertools.pairwise(records)
    return sum(position <= end for pair in pairs for position in stationary_positions(*pair))


def stationary_positions(before: ForwardRecord, after: ForwardRecord) -> list[int]:
    """Absolute positions whose draft token was right in both blocks, but accepted only by the second."""
    first_wrong = before.write_index + before.num_accepted
    positions = []
    for row in range(1, after.num_accepted):
        position = after.write_index + row
        earlier = position - before.write_index
        if position > first_wrong and earlier < len(before.block) and before.block[earlier] == after.block[row]:
            positions.append(position)
    return positions
