"""Properties that an engine must hold bit for bit.

Rows see each other only through attention, dead rows are hidden, and the cache is written in place.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from cllm_export.bundle.contract import Batch, Precision
from cllm_export.bundle.manifest import Bundle
from cllm_export.runtime.engines.base import Engine, KvRows, prefill
from cllm_export.runtime.engines.kv_cache import kv_length_bucket
from cllm_export.runtime.engines.onnxruntime import PROVIDERS as DEVICES
from cllm_export.runtime.engines.onnxruntime import Device, OrtEngine
from cllm_export.runtime.load import Provider, open_engine
from cllm_export.verification.report import Check

POISON: dict[Precision, float] = {"fp32": 1e4, "fp16": 100.0, "bf16": 100.0}
"""The value that dead rows are set to.

In fp16, a larger value makes an attention score overflow to infinity before the mask is applied. No decoder writes rows
as large as this value."""


def check_rows_are_isolated(bundle: Bundle, run: EngineRun, *, trials: int = 8) -> Check:
    """Change later rows and other slots at random. The predictions and KV rows of earlier rows must stay bit-equal."""
    leaks = []
    with _Probe(bundle, run) as probe:
        block = probe.random_block()
        before = probe.run(block)
        for trial in range(trials):
            kept = 1 + trial % max(1, probe.block_size - 1) if trial else 1
            changed = block[:kept] + probe.random_block()[kept:]
            if not probe.same(before, probe.run(changed, disturb=True), rows=kept):
                leaks.append(kept)
    slots = probe.engine.num_slots
    detail = (
        f"{trials} trials, {slots} {'slots' if slots > 1 else 'slot, so no other to change'}, n = {probe.block_size}"
    )
    return Check(
        name="rows see each other only through attention",
        passed=not leaks if probe.block_size > 1 or slots > 1 else None,
        detail=detail if not leaks else f"rows before {leaks[0]} changed with later rows or other slots",
        data={"trials": trials, "slots": slots, "leaks": leaks},
    )


def check_dead_rows_are_hidden(bundle: Bundle, run: EngineRun) -> Check:
    """Set every row above the write index to a large finite value. No output and no valid row may change."""
    poison = POISON[bundle.manifest.precision]
    with _Probe(bundle, run) as probe:
        block = probe.random_block()
        clean = probe.run(block)
        same = probe.same(clean, probe.run(block, poison=poison), rows=probe.block_size)
    visible = probe.num_dead_rows
    detail = f"{visible} rows in sight above the block set to {poison:g}" if same else "a dead row changed an output"
    return Check(
        name="dead cache rows change nothing", passed=(same if visible else None) if same else False, detail=detail
    )


def check_cache_is_in_place(bundle: Bundle, run: EngineRun) -> Check:
    """Check that the engine writes the block's rows into the buffers that it reads, and logs no copy."""
    with _captured_stderr() as log, _Probe(bundle, run, log_severity=2) as probe:
        probe.prefill()
        before = probe.read_cache()
        probe.run(probe.random_block(), on_top=True)
        after = probe.read_cache()
    rows = slice(probe.write_index, probe.write_index + probe.block_size)
    written = all(np.any(mine[:, rows] != other[:, rows]) for mine, other in zip(after[0], before[0], strict=True))
    above = slice(probe.write_index + probe.widest, None)
    kept = all(np.array_equal(mine[:, :, above], other[:, :, above]) for mine, other in zip(after, before, strict=True))
    warned = "in-place" in log()
    problems = [
        text
        for text, failed in (
            ("the block's rows were not written", not written),
            ("rows beyond the block were written", not kept),
            ("ONNX Runtime reports a copy of the cache", warned),
        )
        if failed
    ]
    return Check(
        name="KV cache is updated in place",
        passed=not problems,
        detail="; ".join(problems) or f"{len(before[0])} buffers, past and present on one address",
    )


class EngineRun(NamedTuple):
    """What the engines of the checks run on."""

    provider: Provider
    threads: int | None
    plan: str | None = None
    """Key of the plan, where the provider runs one."""

    def open(self, bundle: Bundle, *, num_slots: int | None = None, log_severity: int = 3) -> Engine:
        """An engine of the bundle. ONNX Runtime logs at this level; 2 shows its warnings."""
        if self.provider in DEVICES:
            device: Device = self.provider
            return OrtEngine(
                bundle, device=device, num_slots=num_slots, threads=self.threads, log_severity=log_severity
            )
        return open_engine(bundle, self.provider, threads=self.threads, plan=self.plan)


class _Probe:
    """An engine with at least two slots (if it may have them), reset to the same state before every forward."""

    def __init__(self, bundle: Bundle, run: EngineRun, *, log_severity: int = 3) -> None:
        pinned = bundle.manifest.graphs["greedy"].fixed_shapes
        slots = None if pinned else max(2, bundle.manifest.batch_size)
        self.engine = run.open(bundle, num_slots=slots, log_severity=log_severity)
        self.block_size = bundle.manifest.block_size
        self.widest = bundle.manifest.geometry.max_block_size if run.provider not in DEVICES else self.block_size
        """Rows that a forward of the block may write: a plan pads a block to the next size that it has."""
        self._vocabulary = bundle.manifest.geometry.vocab_size
        self._random = random.Random(1)  # noqa: S311 - test data, not a secret
        self._prompt = self._tokens(self._prompt_length(bundle.manifest.max_length))
        self.write_index = len(self._prompt)
        self.num_dead_rows = self._kv_length(self.write_index) - self.write_index - self.block_size
        """Number of rows above the block that attention reads and the mask must hide."""

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def read_cache(self) -> list[KvRows]:
        """A copy of the KV [2L, K, C, D] of every slot."""
        length = self.engine.geometry.cache_length
        return [self.engine.read_rows(slot, 0, length) for slot in range(self.engine.num_slots)]

    def random_block(self) -> list[int]:
        return self._tokens(self.block_size)

    def prefill(self, *, poison: float | None = None) -> None:
        """Every row 0, or the poison above the write index, and the prompt in slot 0."""
        length = self.engine.geometry.cache_length
        rows = np.zeros_like(self.engine.read_rows(0, 0, length))
        for slot in range(self.engine.num_slots):
            self.engine.write_rows(slot, 0, length, rows)
        prefill(self.engine, self._prompt, 0)
        if poison is not None:
            dead = rows[:, :, self.write_index :]
            dead[...] = poison if dead.dtype != np.uint16 else bfloat16_bits(poison)
            for slot in range(self.engine.num_slots):
                self.engine.write_rows(slot, self.write_index, length, dead)

    def _prompt_length(self, max_length: int) -> int:
        """The longest length up to 24 with at least 4 dead rows inside the KV length. Without one, the longest."""
        longest = max(1, min(24, max_length - 1))
        lengths = range(longest, 0, -1)
        return next((size for size in lengths if self._kv_length(size) >= size + self.block_size + 4), longest)

    def _kv_length(self, write_index: int) -> int:
        fixed, cache_length = self.engine.fixed_shapes, self.engine.geometry.cache_length
        return fixed.kv_length if fixed else kv_length_bucket(write_index + self.block_size, cache_length)

    def run(
        self, block: list[int], *, disturb: bool = False, poison: float | None = None, on_top: bool = False
    ) -> tuple[list[int], KvRows]:
        """Predictions [n] of slot 0 and its KV rows [2L, K, n, D], after one forward of the block.

        Everything is reset first, unless the forward runs ``on_top`` of what is there.
        """
        if not on_top:
            self.prefill(poison=poison)
        others = self.engine.num_slots - 1
        blocks = [block] + [self.random_block() if disturb else [0] * self.block_size for _ in range(others)]
        active = [1] + [int(disturb)] * others
        forward = self.engine.forward(Batch(blocks, active, [self.write_index] + [0] * others))
        return forward.next_ids[0], self.engine.read_rows(0, self.write_index, self.write_index + self.block_size)

    @staticmethod
    def same(a: tuple[list[int], KvRows], b: tuple[list[int], KvRows], *, rows: int) -> bool:
        """Whether the first rows agree bit for bit."""
        return a[0][:rows] == b[0][:rows] and a[1][:, :, :rows].tobytes() == b[1][:, :, :rows].tobytes()

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(count)]


def bfloat16_bits(value: float) -> int:
    """The bits of a number in bf16, which numpy does not have. What does not fit is cut off."""
    return int(np.float32(value).view(np.uint32)) >> 16


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Capture what native code, such as ONNX Runtime's log, writes to the process's standard error in the block."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        text = ""
        try:
            yield lambda: text
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            text = file.read().decode(errors="replace")
