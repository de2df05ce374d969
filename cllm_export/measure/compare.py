"""``cllm-export compare``: which of several bundles of a model decodes fastest here, and at which n.

Quantised weights make a forward over one token cheap and leave less room for free tokens beside it, so precision and
block size are one choice. Every bundle at every n is timed in the same rounds, one after the other: on a shared machine
ratios count. What quality a precision costs is ``convergence``'s matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, TypeVar

from cllm_export.bundle.manifest import TOKENIZER_NAME, Bundle
from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError
from cllm_export.progress import Progress
from cllm_export.prompts import Prompt
from cllm_export.runtime.decoding.block_size.time_forwards import run_forward
from cllm_export.runtime.engines.machine import describe_machine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model

UNQUANTISED = "fp32"
"""What ``quantize`` names the bundle it judges by."""
DEFAULT_SIZES = (4, 8, 12, 16, 24, 32)
T = TypeVar("T")

WARM_UP, TIMED = 2, 4
"""Forwards before and in one timing: the first ones refill caches that another bundle has emptied."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What ``cllm-export compare`` lets the user choose."""

    sizes: tuple[int, ...] = ()
    """n to try; by default those of ``DEFAULT_SIZES`` that every bundle takes."""
    max_new_tokens: int = 128
    rounds: int = 5
    threads: int | None = None

    def __post_init__(self) -> None:
        for size in self.sizes:
            require_at_least("--block-size", size, 2)
        require_at_least("max_new_tokens", self.max_new_tokens, 1)
        require_at_least("rounds", self.rounds, 1)


class Setting(NamedTuple):
    """One bundle at one n."""

    bundle: int
    """Its number, from 0."""
    block_size: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one setting came to."""

    name: str
    precision: str
    weight_bytes: int
    block_size: int
    tokens_per_forward: float
    first_milliseconds: float
    """T(1)"""
    milliseconds: float
    """T(n)"""
    tokens_per_second: float
    """Of the decode as it ran, the loop's own time included."""

    @property
    def speedup(self) -> float:
        """TPF(n) x T(1) / T(n): over this bundle's own autoregressive decoding."""
        return self.tokens_per_forward * self.first_milliseconds / self.milliseconds

    @property
    def expected(self) -> float:
        """TPF(n) / T(n) in tokens per second: what bare forwards, one like the other, would come to."""
        return self.tokens_per_forward / self.milliseconds * 1e3

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "speedup": self.speedup, "expected_tokens_per_second": self.expected}


def compare(
    bundles: Sequence[Bundle],
    prompts: Sequence[Prompt],
    options: CompareOptions | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time bundles of one model; the report, JSON-ready: ``settings``, the fastest first (see ``Timing``).

    Raises:
        OptionError: bundles of different tokenizers, one with fixed shapes, an n that one of them does not take, or a
            prompt that does not fit.
        EngineError: an engine failed.
    """
    options = options or CompareOptions()
    _check(bundles)
    run = _Run(bundles, prompts, options, progress or (lambda *_: None))
    timings = sorted(run.timings(), key=lambda timing: -timing.tokens_per_second)
    return {
        "machine": describe_machine(options.threads),
        "prompts": len(prompts),
        "rounds": options.rounds,
        "max_new_tokens": options.max_new_tokens,
        "settings": [timing.to_dict() for timing in timings],
    }


def precision_name(bundle: Bundle) -> str:
    """What a table calls the precision of a bundle."""
    quantization = bundle.manifest.quantization
    if quantization is None:
        return bundle.manifest.precision
    return f"{quantization.scheme}{f' /{quantization.group_size}' if quantization.group_size else ''}"


def _check(bundles: Sequence[Bundle]) -> None:
    if len({bundle.manifest.files[TOKENIZER_NAME].sha256 for bundle in bundles}) > 1:
        raise OptionError("the bundles have different tokenizers: compare bundles of one model")
    for bundle in bundles:
        if bundle.manifest.graphs["greedy"].fixed_shapes:
            raise OptionError(f"{bundle.path} is pinned to one block size: compare bundles without --fixed-shapes")


class _Run:
    """Models, bare engines, and everything measured on them in turn."""

    def __init__(
        self, bundles: Sequence[Bundle], prompts: Sequence[Prompt], options: CompareOptions, progress: Progress
    ) -> None:
        self._bundles, self._options, self._progress = bundles, options, progress
        self._models = [load(bundle.path, threads=options.threads, prefix_cache_bytes=0) for bundle in bundles]
        self._encoded = [self._models[0].encode(prompt.content) for prompt in prompts]
        self._past = int(median(len(prompt) for prompt in self._encoded))
        sizes = self._settle_sizes()
        self._settings = [Setting(index, size) for size in sizes for index in range(len(bundles))]

    def timings(self) -> list[Timing]:
        """Every setting, measured."""
        decodes = self._in_rounds("decoding", self._settings, self._decode)
        firsts = [Setting(index, 1) for index in range(len(self._bundles))]
        forwards = self._in_rounds("forwards", [*firsts, *self._settings], self._forward)
        times = {setting: median(found) for setting, found in forwards.items()}
        return [
            Timing(
                name=str(self._bundles[setting.bundle].path),
                precision=precision_name(self._bundles[setting.bundle]),
                weight_bytes=self._bundles[setting.bundle].weight_bytes,
                block_size=setting.block_size,
                tokens_per_forward=decodes[setting][0][0],
                first_milliseconds=times[Setting(setting.bundle, 1)],
                milliseconds=times[setting],
                tokens_per_second=median(tokens_per_second for _, tokens_per_second in decodes[setting]),
            )
            for setting in self._settings
        ]

    def _in_rounds(
        self, stage: str, settings: Sequence[Setting], measure: Callable[[Setting], T]
    ) -> Mapping[Setting, list[T]]:
        found: dict[Setting, list[T]] = {setting: [] for setting in settings}
        total = self._options.rounds * len(settings)
        for index in range(total):
            setting = settings[index % len(settings)]
            found[setting].append(measure(setting))
            self._progress(stage, index + 1, total)
        return found

    def _decode(self, setting: Setting) -> tuple[float, float]:
        """Tokens per forward and per second over all prompts."""
        model = self._models[setting.bundle]
        statistics = [self._generate(model, prompt, setting.block_size) for prompt in self._encoded]
        new_tokens = sum(entry.new_tokens for entry in statistics)
        seconds = sum(entry.decode_seconds for entry in statistics)
        return new_tokens / sum(entry.forwards for entry in statistics), new_tokens / seconds

    def _generate(self, model: Model, prompt: list[int], block_size: int) -> Any:
        room = model.facts.max_length - len(prompt)
        if room < 1:
            raise OptionError(f"a prompt has {len(prompt)} tokens, too long for these bundles; leave it out")
        limit = min(self._options.max_new_tokens, room)
        return model.generate(prompt, max_new_tokens=limit, block_size=block_size).statistics

    def _forward(self, setting: Setting) -> float:
        """Milliseconds of one bare forward past as many rows as the median prompt has."""
        engine = self._models[setting.bundle].engine
        for _ in range(WARM_UP):
            run_forward(engine, setting.block_size, self._past)
        started = engine.run_seconds
        for _ in range(TIMED):
            run_forward(engine, setting.block_size, self._past)
        return (engine.run_seconds - started) / TIMED * 1e3

    def _settle_sizes(self) -> tuple[int, ...]:
        largest = min(model.engine.geometry.max_block_size for model in self._models)
        if too_large := [size for size in self._options.sizes if size > largest]:
            raise OptionError(f"--block-size must be at most {largest} for these bundles, got {too_large[0]}")
        return self._options.sizes or tuple(size for size in DEFAULT_SIZES if size <= largest)
