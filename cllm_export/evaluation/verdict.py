"""Turns the probe's figures into advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Readiness = Literal[
    "ready", "gains a little", "needs consistency tuning", "this machine gains nothing", "unknown: machine busy"
]
UNKNOWN: Readiness = "unknown: machine busy"
"""The verdict where times vary so much that any other would be chance."""
READY, LITTLE = 1.5, 1.1
"""A model is ready from the first expected speed-up on, and gains a little from the second on."""
BUDGETS = (
    "as an anchor, the CLLM paper tuned its 7 B models on 2 M tokens for Spider, 10 M for GSM8K, 100 M for "
    "CodeSearchNet-Python and 200 M for ShareGPT, and a public reproduction at 1.7 B got 1.5 to 1.65x in under five "
    "A100-hours"
)
TUNE = "cllm-export tune CHECKPOINT --prompts PROMPTS --output TUNED"
MEANING = (
    "expected speed-up = tokens per forward x T(1) / T(n): a product of two measurements, not a measured speed-up; it "
    "leaves out prefill and the loop's own cost. `cllm-export bench` measures the real one"
)


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The measurements of one block size, and the speed-up to expect from them."""

    block_size: int
    tokens_per_forward: float
    milliseconds: float
    """T(n)."""
    relative: float
    """T(n) / T(1), at least 1."""
    spread: float = 0.0
    """Distance of the quartiles of T(n) / T(1), as a share of it."""

    @property
    def speedup(self) -> float:
        """Expected speed-up over autoregressive decoding, prefill excluded."""
        return self.tokens_per_forward / self.relative

    @property
    def highest(self) -> float:
        """Speed-up if every draft token is accepted."""
        return self.block_size / self.relative

    def needed(self, speedup: float) -> float:
        """Tokens per forward that this speed-up needs."""
        return speedup * self.relative


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The probe's advice."""

    readiness: Readiness
    best_block_size: int
    expected_speedup: float
    advice: str
    meaning: str = MEANING


def judge(sizes: Sequence[Expectation], *, why_busy: str | None = None) -> Verdict:
    """Judge a model by its best block size.

    Args:
        why_busy: why the times decide nothing. The verdict is then "unknown: machine busy", whatever they are.
    """
    best = max(sizes, key=lambda size: size.speedup)
    room = max(sizes, key=lambda size: size.highest)
    target = max(sizes, key=lambda size: size.speedup * size.highest)
    readiness = UNKNOWN if why_busy else _readiness(best, room)
    return Verdict(
        readiness=readiness,
        best_block_size=best.block_size,
        expected_speedup=round(best.speedup, 4),
        advice=why_busy or _advice(readiness, best, room, target),
    )


def _readiness(best: Expectation, room: Expectation) -> Readiness:
    if best.speedup >= READY:
        return "ready"
    if room.highest < READY:
        return "this machine gains nothing"
    return "gains a little" if best.speedup >= LITTLE else "needs consistency tuning"


def _advice(readiness: Readiness, best: Expectation, room: Expectation, target: Expectation) -> str:
    if readiness == "ready":
        return f"deploy it with n = {best.block_size}: expected {best.speedup:.2f}x autoregressive decoding"
    if readiness == "this machine gains nothing":
        return (
            f"a forward of {room.block_size} tokens takes {room.relative:.1f} times one of a single token here: even "
            f"a perfect draft gives {room.highest:.2f}x; use a machine or a precision where wide forwards are cheap"
        )
    goal = 2.0 if target.highest >= 2.0 else READY
    return (
        f"now {best.speedup:.2f}x at n = {best.block_size}. At n = {target.block_size} it takes "
        f"{target.needed(goal):.1f} tokens per forward to reach {goal:g}x, and it has {target.tokens_per_forward:.2f}. "
        f"Tune it with `{TUNE}`; {BUDGETS}"
    )
