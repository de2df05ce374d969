"""Time a bundle: every loop on real prompts, the forward at every block size, and PyTorch beside them.

Everything is compared in one run, pass after pass in turn, by medians: machines are shared and noisy, so ratios count.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from cllm_export.bundle.manifest import Bundle
from cllm_export.checks import require_at_least
from cllm_export.errors import OptionError, OutputError
from cllm_export.exporter.checkpoint.source import require_source
from cllm_export.progress import Progress
from cllm_export.prompts import Prompt, random_prompts
from cllm_export.runtime.decoding.block_size.latency_file import write_latency
from cllm_export.runtime.decoding.request import LOOKAHEAD, Method
from cllm_export.runtime.engines.machine import available_threads, describe_machine
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import BlockSize, Options
from cllm_export.runtime.request_run import Generation

log = logging.getLogger(__name__)

_Setting = tuple[Method, BlockSize | None]
DEFAULT_METHODS: tuple[Method, ...] = ("jacobi", "jacobi-block", "autoregressive")
"""The loops that need no draft source but the one a model was trained with."""
LATENCY_BLOCK_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
LATENCY_SECONDS, MIN_ROUNDS = 5.0, 3
SHORT_FORWARD_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What ``cllm-export bench`` lets the user choose."""

    methods: tuple[Method, ...] = DEFAULT_METHODS
    block_size: int | None = None
    lookahead: Mapping[str, int] = field(default_factory=dict)
    """Of ``window``, ``ngram`` and ``guesses``, what shall not be as by default."""
    fill: str | None = None
    """Draft sources of every loop but autoregressive; by default each loop's own."""
    draft_model: Path | None = None
    max_new_tokens: int = 128
    threads: int | None = None
    repeats: int = 3
    ignore_eos: bool = False
    """Decode every prompt to the limit; the only way to time random tokens, which end at once."""
    sweep: tuple[int, ...] = ()
    """Further block sizes for the sliding loop."""

    def __post_init__(self) -> None:
        for size in self.sweep:
            require_at_least("--sweep", size, 1)
        if len(set(self.sweep)) < len(self.sweep):
            raise OptionError(f"--sweep names a block size twice: {','.join(map(str, self.sweep))}")
        if self.sweep and "jacobi" not in self.methods:
            raise OptionError(f"--sweep is for the sliding loop; leave it out with --method {self.methods[0]}")
        if self.block_size and not {"jacobi", "jacobi-block"} & set(self.methods):
            raise OptionError(f"--block-size is for the Jacobi loops; leave it out with --method {self.methods[0]}")
        if self.lookahead and LOOKAHEAD not in self.methods:
            raise OptionError(f"--{next(iter(self.lookahead))} is for lookahead; give --method lookahead")
        if self.fill and self.methods == ("autoregressive",):
            raise OptionError("--fill is for loops that draft; leave it out with --method autoregressive")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One pass of one loop over every prompt."""

    new_tokens: int
    forwards: int
    decode_seconds: float
    prefill_seconds: float
    engine_seconds: float


def run_bench(
    bundle: Bundle,
    *,
    prompts: Sequence[Prompt] = (),
    checkpoint: Path | None = None,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a bundle; the report, JSON-ready (``--json`` writes it as it is).

    ``loops`` holds, for each method, tokens_per_second (decode only), tokens_per_forward, forwards, new_tokens,
    speedup (against the autoregressive loop of the same run, prefill excluded), speedup_with_prefill, and overhead
    (decode wall-clock over time inside the engine). ``sweep`` holds the same for further block sizes, ``auto`` for n
    chosen forward by forward, ``latency`` the milliseconds T(n) of one forward and its ratio to T(1). T(n) is left in
    the bundle as ``latency.json``, where the bundle can be written to, and the runtime begins with it.
    """
    options = options or BenchOptions()
    if checkpoint:
        require_source(bundle, checkpoint)
    model = load(bundle.path, threads=options.threads, draft_model=options.draft_model, prefix_cache_bytes=0)
    if too_large := [size for size in options.sweep if size > model.engine.geometry.max_block_size]:
        largest = model.engine.geometry.max_block_size
        raise OptionError(f"--sweep {too_large[0]}: block_size must be at most {largest} for this bundle")
    encoded = [model.encode(prompt.content) for prompt in prompts]
    if not encoded:
        facts = bundle.manifest
        drawn = random_prompts(16, vocab_size=facts.geometry.vocab_size, max_length=facts.max_length)
        encoded, options = list(drawn.values()), replace(options, ignore_eos=True)
    settings = _settings(options, can_choose=model.engine.fixed_shapes is None)
    runs = _interleaved(model, encoded, settings, options, progress or (lambda *_: None))
    report: dict[str, Any] = {
        "machine": describe_machine(options.threads),
        "bundle": {"path": bundle.path.name, "fingerprint": bundle.fingerprint},
        "prompts": len(encoded),
        "max_new_tokens": options.max_new_tokens,
        "repeats": options.repeats,
        "block_size": options.block_size or bundle.manifest.block_size,
        "lookahead": dict(options.lookahead),
        "fill": options.fill,
        "draft_model": options.draft_model.name if options.draft_model else None,
        "autoregressive_block_size": pinned.block_size if (pinned := model.engine.fixed_shapes) else 1,
    }
    baseline = runs.get(("autoregressive", None))
    report["loops"] = {method: _summary(runs[method, None], baseline) for method in options.methods}
    report["sweep"] = {str(size): _summary(runs["jacobi", size], baseline) for size in options.sweep}
    report["auto"] = _summary(runs["jacobi", "auto"], baseline) if ("jacobi", "auto") in runs else None
    if not model.engine.fixed_shapes:
        report["latency"] = measure_latency(bundle, encoded, options.threads)
        _leave_latency(bundle, report["latency"], options.threads)
    if checkpoint:
        report["transformers"] = _bench_transformers(bundle, checkpoint, encoded, options)
    return report


def measure_latency(bundle: Bundle, prompts: Sequence[Sequence[int]], threads: int | None) -> list[dict[str, float]]:
    """Milliseconds of one bare forward at each block size, past as many rows as the median prompt has."""
    engine = OrtEngine(bundle, num_slots=1, threads=threads)
    past = int(median(len(prompt) for prompt in prompts))
    sizes = [size for size in LATENCY_BLOCK_SIZES if size <= engine.geometry.max_block_size]
    times: dict[int, list[float]] = {size: [] for size in sizes}
    started = perf_counter()
    while len(times[sizes[-1]]) < MIN_ROUNDS or perf_counter() - started < LATENCY_SECONDS:
        for size in sizes:
            times[size].append(_time_forward(engine, size, past))
    first = median(times[sizes[0]])
    return [
        {"block_size": size, "milliseconds": median(times[size]) * 1e3, "ratio": median(times[size]) / first}
        for size in sizes
    ]


def _time_forward(engine: OrtEngine, block_size: int, past: int) -> float:
    """Seconds of one forward; short ones are repeated, after some that refill the caches a wider one has emptied."""
    engine.run_bound(block_size, past)
    started = engine.run_seconds
    engine.run_bound(block_size, past)
    seconds = engine.run_seconds - started
    if seconds > SHORT_FORWARD_SECONDS:
        return seconds
    for _ in range(8):
        engine.run_bound(block_size, past)
    started = engine.run_seconds
    for _ in range(5):
        engine.run_bound(block_size, past)
    return (engine.run_seconds - started) / 5


def _leave_latency(bundle: Bundle, latency: list[dict[str, float]], threads: int | None) -> None:
    seconds = {int(entry["block_size"]): entry["milliseconds"] / 1e3 for entry in latency}
    try:
        write_latency(bundle, seconds, num_slots=1, threads=threads)
    except OutputError as error:
        log.warning("the times of forwards are not kept: %s", error)


def _settings(options: BenchOptions, *, can_choose: bool) -> list[_Setting]:
    settings: list[_Setting] = [(method, None) for method in options.methods]
    settings += [("jacobi", size) for size in options.sweep]
    return settings + ([("jacobi", "auto")] if can_choose and "jacobi" in options.methods else [])


def _interleaved(
    model: Model,
    prompts: list[list[int]],
    settings: list[_Setting],
    options: BenchOptions,
    progress: Progress,
) -> dict[_Setting, list[_Run]]:
    """Pass by pass through every setting, again and again, after one that warms up.

    A pass is all prompts in one setting, as a service would run them: switching from request to request would charge
    the light forwards of one loop for the caches that the heavy ones of another have emptied.
    """
    runs: dict[_Setting, list[_Run]] = {setting: [] for setting in settings}
    for repeat in range(options.repeats + 1):
        for index, (method, size) in enumerate(settings):
            model.pool.clear()  # it would know the answers from the pass before
            done = [_generate(model, prompt, method, size, options) for prompt in prompts]
            if repeat:
                runs[method, size].append(_collect(done))
            progress("passes", repeat * len(settings) + index + 1, (options.repeats + 1) * len(settings))
    return runs


def _generate(
    model: Model, prompt: list[int], method: Method, size: BlockSize | None, options: BenchOptions
) -> Generation:
    limit = min(options.max_new_tokens, model.facts.max_length - len(prompt))
    if limit < 1:
        raise OptionError(f"a prompt has {len(prompt)} tokens, too long for this bundle; leave it out")
    settings: Options = {"max_new_tokens": limit, "method": method, "ignore_eos": options.ignore_eos}
    if method == LOOKAHEAD:
        settings |= options.lookahead  # type: ignore[typeddict-item]
    else:
        block_size = None if method == "autoregressive" else size or options.block_size
        settings |= {"block_size": block_size, "deterministic": block_size is None}
    if method != "autoregressive":
        settings |= {"fill": options.fill}
    return model.generate(prompt, **settings)


def _collect(generations: list[Generation]) -> _Run:
    statistics = [generation.statistics for generation in generations]
    return _Run(
        new_tokens=sum(entry.new_tokens for entry in statistics),
        forwards=sum(entry.forwards for entry in statistics),
        decode_seconds=sum(entry.decode_seconds for entry in statistics),
        prefill_seconds=sum(entry.prefill_seconds for entry in statistics),
        engine_seconds=sum(entry.engine_seconds for entry in statistics),
    )


def _summary(runs: list[_Run], baseline: list[_Run] | None) -> dict[str, float | int | None]:
    first = runs[0]
    summary: dict[str, float | int | None] = {
        "tokens_per_second": median(run.new_tokens / run.decode_seconds for run in runs),
        "tokens_per_forward": first.new_tokens / first.forwards,
        "forwards": first.forwards,
        "new_tokens": first.new_tokens,
        "overhead": median(run.decode_seconds / run.engine_seconds for run in runs),
        "speedup": None,
        "speedup_with_prefill": None,
    }
    if baseline:
        pairs = list(zip(baseline, runs, strict=True))
        summary["speedup"] = median(base.decode_seconds / run.decode_seconds for base, run in pairs)
        summary["speedup_with_prefill"] = median(
            (base.decode_seconds + base.prefill_seconds) / (run.decode_seconds + run.prefill_seconds)
            for base, run in pairs
        )
    return summary


def _bench_transformers(
    bundle: Bundle, checkpoint: Path, prompts: list[list[int]], options: BenchOptions
) -> dict[str, float | int]:
    import torch

    from cllm_export.exporter.parity.reference import Reference

    torch.set_num_threads(options.threads or available_threads())
    manifest = bundle.manifest
    reference = Reference(checkpoint, max_length=manifest.max_length, num_layers=manifest.geometry.num_layers)
    reference.generate(prompts[0], 4, ())
    tokens, seconds = 0, 0.0
    for prompt in prompts:
        limit = min(options.max_new_tokens, bundle.manifest.max_length - len(prompt))
        new, taken = reference.generate(prompt, limit, bundle.manifest.eos_token_ids)
        tokens, seconds = tokens + new, seconds + taken
    return {"new_tokens": tokens, "tokens_per_second_with_prefill": tokens / seconds}
