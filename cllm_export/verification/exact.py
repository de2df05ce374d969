"""Which block sizes are exact: bit-equal to n = 1 in logits and KV, at every place of the cache that is tried.

A size that is not exact fails no bundle: the runtime leaves it out of ``auto``. At that n the tokens are still those of
autoregressive decoding at that n.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle
from cllm_export.errors import EngineError
from cllm_export.runtime.decoding.block_size.auto_sizes import candidate_sizes
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes, RowsOfOne, room_before
from cllm_export.runtime.engines.base import Engine
from cllm_export.verification.engine_checks import EngineRun
from cllm_export.verification.report import Check, VerifyOptions

NAME = "rows are bit-equal at every n"
PASTS = (13, 150, 600)
"""KV rows before the compared ones: within one part of a sum over the cache, in two, and in several. The longest text
that the cache has room for is added, in one slot beside shorter ones."""
WIDTHS = (1, 5, 16, 128)
"""Widths of prefill chunks. They read the second of the pasts, which is longer than the widest."""


class Exactness(NamedTuple):
    """What was found of one bundle on one provider."""

    check: Check
    sizes: ExactSizes | None
    """None if nothing could be compared."""
    num_slots: list[int]
    """The numbers of slots that the sizes were compared with."""

    def to_dict(self) -> dict[str, Any] | None:
        """What the certificate says of it: ``equal``, ``different`` and ``num_slots``."""
        return None if self.sizes is None else {**self.sizes.to_dict(), "num_slots": self.num_slots}


def exactness_of(bundle: Bundle, run: EngineRun, options: VerifyOptions) -> Exactness:
    """Compare with one slot and with several, where the number may vary.

    The block sizes of the options are compared besides those of ``auto``. ``run`` says what the engines run on: the
    plan whose tokens were compared too.
    """
    manifest, own_sizes = bundle.manifest, options.block_sizes
    may_vary = options.slots_may_vary and manifest.graphs[GREEDY_GRAPH].fixed_shapes is None
    several = options.num_slots or max(2, manifest.batch_size)
    sizes = {manifest.block_size, *own_sizes, *([manifest.trained_with.block_size] if manifest.trained_with else [])}

    def opened() -> Generator[Engine]:
        for num_slots in sorted({1, several}) if may_vary else [None]:
            engine = run.open(bundle, num_slots=num_slots)
            try:
                yield engine
            finally:
                engine.close()

    try:
        with closing(opened()) as engines:
            return check_exact_sizes(engines, own_sizes=tuple(sizes))
    except EngineError as error:
        return Exactness(Check(name=NAME, passed=False, detail=str(error)), None, [])


def check_exact_sizes(
    engines: Iterable[Engine], *, own_sizes: tuple[int, ...], pasts: tuple[int, ...] = PASTS
) -> Exactness:
    """Compare every size that ``auto`` may choose, every prefill width and the prefix cache with forwards of one token.

    Args:
        engines: each with another number of slots. Each is used before the next one is asked for.
        own_sizes: sizes to compare besides those of ``auto``.
        pasts: numbers of KV rows before the compared ones. Those that the cache has no room for are left out.

    Raises:
        EngineError: an engine failed.
    """
    found, tried = ExactSizes(), set[int]()
    num_slots: list[int] = []
    problems: list[str] = []
    num_read = 0
    for engine in engines:
        if engine.fixed_shapes:
            return _not_checked("the engine has one shape")
        if not engine.has_logits:
            return _not_checked("the plan gives no logits")
        num_slots.append(engine.num_slots)
        sizes = sorted({*candidate_sizes(engine), *(size for size in own_sizes if size <= engine.max_block_size)} - {1})
        room = room_before(engine, max([1, *sizes]))
        fitting = [each for each in pasts if each <= room] or [room]
        tried |= set(fitting)
        for past in fitting:
            rows = RowsOfOne(engine, past=past, count=max([1, *sizes]), seed=past)
            found = found.joined(_sizes_of(rows, sizes))
            if past == (num_read := fitting[:2][-1]):
                problems += _problems_of_prefill(engine, rows, past)
        if engine.can_copy_rows and fitting[-1] < room:
            tried.add(room)
            if not rows.stretch(room):
                problems.append(f"n = 1 beside a slot with {room} KV rows gives other rows")
                found = found.joined(ExactSizes(different=frozenset(sizes)))
            found = found.joined(_sizes_of(rows, sizes))
    return Exactness(_check(found, num_slots, max(tried, default=0), problems, num_read=num_read), found, num_slots)


def _sizes_of(rows: RowsOfOne, sizes: Sequence[int]) -> ExactSizes:
    equal = rows.sizes_that_give_them(sizes, num_blocks=None)
    return ExactSizes(equal=equal, different=frozenset(sizes) - equal)


def _problems_of_prefill(engine: Engine, rows: RowsOfOne, past: int) -> list[str]:
    """What prefill widths and the prefix cache change, as clauses."""
    if not engine.can_copy_rows:
        return []
    widths = sorted({min(width, past, engine.prefill_chunk) for width in WIDTHS})
    problems = [f"prefill in chunks of {width} writes other KV" for width in widths if not rows.past_is_given_by(width)]
    if not rows.past_is_kept():
        problems.append("KV that the prefix cache kept gives other logits")
    return problems


def _check(found: ExactSizes, slots: list[int], longest: int, problems: list[str], *, num_read: int) -> Check:
    equal, different = (", ".join(map(str, sorted(each))) for each in (found.equal, found.different))
    over = f"with {' and '.join(map(str, slots))} slots, after up to {longest} KV rows"
    said = [f"n = {equal} gives the logits and KV of n = 1, {over}"] if equal else []
    if different:
        said.append(f"n = {different} does not, so auto leaves it out")
    said += sorted(set(problems)) or [f"so do prefill and the prefix cache, over {num_read} rows"]
    is_exact = not different and not problems
    return Check(
        name=NAME,
        passed=True if is_exact else None,
        detail="; ".join(said),
        data={**found.to_dict(), "num_slots": slots, "problems": problems},
    )


def _not_checked(why: str) -> Exactness:
    return Exactness(Check(name=NAME, passed=None, detail=f"not compared: {why}"), None, [])
