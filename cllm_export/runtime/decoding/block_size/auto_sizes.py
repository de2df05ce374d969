"""What ``auto`` means on an engine: the sizes that it chooses among, which give the tokens of n = 1 bit for bit.

Sizes that were never compared here are compared before the first request, as many as a bounded time allows. A size that
differs, or was not compared, is not used. So whatever ``auto`` chooses, near ties round as at n = 1. Where no size
passes, ``auto`` means one n: the one that the model was trained with, else 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cllm_export.runtime.decoding.block_size.chooser import BLOCK_SIZES, PinnedSize, SizeChooser, SizePolicy
from cllm_export.runtime.decoding.block_size.exact_sizes import (
    BUDGET_SECONDS,
    ExactSizes,
    affordable_sizes,
    compare_sizes,
)
from cllm_export.runtime.decoding.block_size.time_forwards import time_forwards
from cllm_export.runtime.engines.base import Engine

log = logging.getLogger(__name__)


class AutoSizes(NamedTuple):
    """What ``auto`` means on an engine."""

    sizes: tuple[int, ...]
    """The sizes that it may use, sorted."""
    policy: SizePolicy


def candidate_sizes(engine: Engine, *, first: int = 1) -> tuple[int, ...]:
    """The sizes that ``auto`` would choose among if all are exact: 1, ``first``, then the others in order.

    A plan has kernels for a few sizes only, so it gives those of them.
    """
    own = engine.block_sizes or range(1, engine.max_block_size + 1)
    found = dict.fromkeys(size for size in (1, first, *BLOCK_SIZES) if size in own)
    return tuple(found) or tuple(own[:1])


def settle_sizes(
    engine: Engine,
    candidates: Sequence[int],
    *,
    first: int,
    pad_token_id: int,
    known_times: Mapping[int, float] | None,
    known_sizes: ExactSizes,
    keep: Callable[[ExactSizes], None],
    budget: float = BUDGET_SECONDS,
) -> AutoSizes:
    """Compare what is not known yet, and choose the sizes of ``auto``. Says once which are left out, and why.

    A few forwards are timed only to bound what a comparison costs. On a busy machine such times are wrong, so the
    chooser learns its own.

    Args:
        candidates: sizes to choose among, the most useful first.
        first: the size that the model was trained with, or 1.
        known_times: seconds of a forward by block size that ``bench`` measured; None if it did not.
        known_sizes: sizes that were compared before, under the same conditions.
        keep: takes what was found, with what was known.
        budget: seconds that the comparison may take, by the times of forwards; infinity for all candidates.

    Raises:
        EngineError: the engine failed.
    """
    missing = [size for size in candidates if size > 1 and size not in known_sizes.compared]
    if missing and engine.has_logits:
        seconds = known_times or time_forwards(engine, candidates, pad_token_id=pad_token_id)
        if affordable := affordable_sizes(missing, seconds, budget=budget):
            known_sizes = known_sizes.joined(compare_sizes(engine, affordable))
            keep(known_sizes)
    sizes = tuple(sorted(size for size in candidates if size == 1 or size in known_sizes.equal))
    if not sizes or (sizes == (1,) and first in candidates):
        sizes = (first if first in candidates else candidates[0],)
    _say_what_is_left_out(candidates, sizes, known_sizes, has_logits=engine.has_logits)
    if len(sizes) == 1:
        return AutoSizes(sizes, PinnedSize(sizes[0]))
    begin = first if first in sizes else sizes[0]
    return AutoSizes(sizes, SizeChooser(sizes, first=begin, known_times=known_times))


def _say_what_is_left_out(
    candidates: Sequence[int], sizes: Sequence[int], known: ExactSizes, *, has_logits: bool
) -> None:
    left_out = sorted(set(candidates) - set(sizes) - {1})
    different = [size for size in left_out if size in known.different]
    unknown = [size for size in left_out if size not in known.compared]
    reasons = []
    if different:
        verb = "rounds" if len(different) == 1 else "round"
        reasons.append(f"n = {_listed(different)} {verb} otherwise than n = 1 on this engine")
    if unknown and has_logits:
        verb = "was" if len(unknown) == 1 else "were"
        reasons.append(
            f"n = {_listed(unknown)} {verb} not compared with n = 1, which takes more than {BUDGET_SECONDS:g} s: "
            "compare once with Model.compare_sizes() or cllm-export bench"
        )
    elif unknown:
        reasons.append(f"n = {_listed(unknown)} cannot be compared with n = 1, because the plan gives no logits")
    if not reasons:
        return
    own = "" if 1 in sizes else f". So it gives the tokens of autoregressive decoding at n = {sizes[0]}"
    log.warning("auto uses n = %s alone. %s%s", _listed(sizes), ". ".join(reasons), own)


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
