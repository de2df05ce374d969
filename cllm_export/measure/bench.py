"""Time bundles of one model: methods and block sizes on real prompts, bare forwards, and PyTorch for comparison.

Quantised weights make a forward over one token cheap, so further tokens of a block cost relatively more. Precision,
method and block size are therefore one choice. All settings run in turn, pass after pass, and medians are reported:
machines are shared and noisy, so only ratios count. ``convergence`` measures the quality that a precision costs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from cllm_export.bundle.manifest import GREEDY_GRAPH, TOKENIZER_NAME, Bundle
from cllm_export.errors import OptionError, OutputError, PromptError
from cllm_export.exporter.checkpoint.source import require_source
from cllm_export.measure.options import HAVE_NO_BLOCK, BenchOptions
from cllm_export.progress import Progress
from cllm_export.prompts import Prompt, random_prompts
from cllm_export.runtime.decode_all import decode_all
from cllm_export.runtime.decoding.block_size.latency_file import write_latency
from cllm_export.runtime.decoding.block_size.measured_times import MeasuredTimes
from cllm_export.runtime.decoding.block_size.time_forwards import time_in_turn
from cllm_export.runtime.decoding.request import LOOKAHEAD, METHOD_OF_LOOP, METHODS, Method
from cllm_export.runtime.engines.machine import available_threads, describe_machine
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import BlockSize
from cllm_export.runtime.request_run import Generation

log = logging.getLogger(__name__)

DEFAULT_METHODS: tuple[Method, ...] = ("jacobi", "jacobi-block", "autoregressive")
"""Methods that need no draft source other than the one a model was trained with."""
DEFAULT_SIZES = (4, 8, 12, 16, 24, 32)
"""Values of n to try if there are several bundles."""
LATENCY_BLOCK_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
NUM_RANDOM_PROMPTS = 16


class Setting(NamedTuple):
    """The configuration of one pass."""

    bundle: int
    """Index of the bundle, from 0."""
    method: Method
    block_size: BlockSize | None
    """None for a method that takes no block size."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """All prompts, decoded once in one setting."""

    tokens: tuple[tuple[int, ...], ...]
    forwards: int
    decode_seconds: float
    prefill_seconds: float
    engine_seconds: float

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def rate(self) -> float:
        """New tokens per second of decode."""
        return self.new_tokens / self.decode_seconds


def run_bench(
    bundles: Sequence[Bundle],
    *,
    names: Sequence[str] | None = None,
    prompts: Sequence[Prompt] = (),
    checkpoint: Path | None = None,
    options: BenchOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time bundles of one model and return a JSON-ready report. Each bundle has one slot, unless it is pinned.

    ``settings`` has an entry for each bundle, method and n, the fastest first:

    - ``tokens_per_second``: new tokens per second of decode, including the loop's own time but not prefill.
      ``tokens_per_forward``, ``forwards``, ``new_tokens``. ``overhead``: decode seconds / engine seconds.
    - ``speedup``: over the bundle's autoregressive decoding in the same passes. ``speedup_with_prefill``: the same with
      prefill included. Both are None if autoregressive decoding is not timed.
    - ``first_milliseconds`` T(1), ``milliseconds`` T(n), ``expected_speedup`` TPF(n) x T(1) / T(n) and
      ``expected_tokens_per_second`` TPF(n) / T(n): estimates from bare forwards. They are None if n is chosen forward
      by forward, the method takes no n, or the bundle is pinned to one shape.
    - ``equal``: number of prompts whose tokens equal those of the first bundle, which come from autoregressive decoding
      if that is timed. At another n a near tie may round to another token.
    - ``fastest_in``: number of passes in which no other setting was faster.

    ``bundles`` describes each bundle with its T(n), the spread of T(n) / T(1), and ``why_busy`` if the machine was too
    busy for these times to decide anything. One bundle on the CPU keeps steady times and exact n in ``latency.json``.

    Args:
        names: names of the bundles in the report; by default their paths.
        prompts: by default random tokens, decoded to the limit.
        checkpoint: the checkpoint that a single bundle was built from, to time transformers as well.

    Raises:
        OptionError: the tokenizers differ, one of several bundles is pinned, or a bundle does not take an n.
        PromptError: a prompt does not fit.
        BundleError: the bundle was not built from the checkpoint.
        EngineError: an engine failed.
    """
    options, names = options or BenchOptions(), names or [str(bundle.path) for bundle in bundles]
    progress = progress or (lambda *_: None)
    _check(bundles, checkpoint, options)
    models = [_load(bundle, options) for bundle in bundles]
    sizes = _settle_sizes(models, options)
    encoded = _encode(bundles, models[0], prompts)
    options = options if prompts else replace(options, ignore_eos=True)
    passes = _in_turn(models, encoded, settings := _settings(models, options, sizes), options, progress)
    times = _time_forwards(models, encoded, sizes, progress)
    if options.provider == "cpu":
        _leave_latency(bundles, times, options.threads)
    entries = _summaries(settings, passes, models, times)
    for setting, entry in zip(settings, entries, strict=True):
        entry |= {"name": names[setting.bundle], **_about(bundles[setting.bundle])}
    return _about_run(options, len(encoded), models[0]) | {
        "bundles": [
            {"name": name, "fingerprint": bundle.fingerprint, **_about(bundle), **_latency(found)}
            for name, bundle, found in zip(names, bundles, times, strict=True)
        ],
        "settings": sorted(entries, key=lambda entry: -entry["tokens_per_second"]),
        "transformers": _bench_transformers(bundles[0], checkpoint, encoded, options, progress) if checkpoint else None,
    }


def _about_run(options: BenchOptions, num_prompts: int, model: Model) -> dict[str, Any]:
    engine = None if options.provider == "cpu" else model.engine.describe()
    return {
        "machine": describe_machine(options.threads, engine),
        "provider": options.provider,
        "prompts": num_prompts,
        "max_new_tokens": options.max_new_tokens,
        "repeats": options.repeats,
        "lookahead": options.lookahead,
        "proposer": options.proposer,
        "draft_model": options.draft_model.name if options.draft_model else None,
    }


def precision_name(bundle: Bundle) -> str:
    """Name of a bundle's precision in tables."""
    quantization = bundle.manifest.quantization
    if quantization is None:
        return bundle.manifest.precision
    return f"{quantization.scheme}{f' /{quantization.group_size}' if quantization.group_size else ''}"


def _about(bundle: Bundle) -> dict[str, Any]:
    return {"precision": precision_name(bundle), "weight_bytes": bundle.weight_bytes}


def _check(bundles: Sequence[Bundle], checkpoint: Path | None, options: BenchOptions) -> None:
    if options.plan and len(bundles) > 1:
        raise OptionError(f"plan is of one bundle, got {len(bundles)} bundles: leave it out", fields=("plan",))
    if checkpoint:
        if len(bundles) > 1:
            raise OptionError(
                f"checkpoint is for one bundle, got {len(bundles)} bundles: leave it out", fields=("checkpoint",)
            )
        require_source(bundles[0], checkpoint)
    if len({bundle.manifest.files[TOKENIZER_NAME].sha256 for bundle in bundles}) > 1:
        raise OptionError("the bundles have different tokenizers: compare bundles of one model")
    pinned = next((bundle for bundle in bundles if bundle.manifest.graphs[GREEDY_GRAPH].fixed_shapes), None)
    if pinned and len(bundles) > 1:
        raise OptionError(f"{pinned.path} is pinned to one block size: compare bundles built without fixed_shapes")


def _load(bundle: Bundle, options: BenchOptions) -> Model:
    pinned = bundle.manifest.graphs[GREEDY_GRAPH].fixed_shapes
    return load(
        bundle.path,
        num_slots=None if pinned else 1,
        threads=options.threads,
        draft_model=options.draft_model,
        prefix_cache_bytes=0,
        provider=options.provider,
        plan=options.plan,
    )


def _compare_sizes(models: Sequence[Model], progress: Progress) -> None:
    """Let ``auto`` of a single bundle choose among all exact sizes, and keep which they are for the next load."""
    [model, *others] = models
    if others or model.engine.fixed_shapes:
        return
    progress("comparing block sizes with n = 1", 0, 1)
    model.compare_sizes()


def _encode(bundles: Sequence[Bundle], model: Model, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of every prompt, after a check that every bundle has room for them."""
    smallest = min(bundles, key=lambda bundle: bundle.manifest.max_length)
    if not prompts:
        facts = smallest.manifest
        drawn = random_prompts(NUM_RANDOM_PROMPTS, vocab_size=facts.geometry.vocab_size, max_length=facts.max_length)
        return list(drawn.values())
    encoded = [model.encode(prompt.content) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) >= smallest.manifest.max_length:
            raise PromptError(
                f"prompt {prompt.id} has {len(ids)} tokens, too long for this bundle ({smallest.path}); leave it out"
            )
    return encoded


def _settle_sizes(models: Sequence[Model], options: BenchOptions) -> tuple[int, ...]:
    """Values of n to try: the requested ones, else a single bundle's own n, else the default sizes that all take."""
    largest = min(model.engine.geometry.max_block_size for model in models)
    if too_large := [size for size in options.block_sizes if size > largest]:
        these = "this bundle" if len(models) == 1 else "these bundles"
        raise OptionError(
            f"block_sizes must be at most {largest} for {these}, got {too_large[0]}", fields=("block_sizes",)
        )
    if len(models) > 1:
        sizes = options.block_sizes or tuple(size for size in DEFAULT_SIZES if size <= largest)
    else:
        pinned = models[0].engine.fixed_shapes
        sizes = options.block_sizes or (pinned.block_size if pinned else models[0].facts.block_size,)
    for own in (model.engine.block_sizes for model in models):
        if own and (without := [size for size in sizes if size not in own]):
            raise OptionError(
                f"block_sizes must be among the plan's, {' or '.join(map(str, own))}, got {without[0]}",
                fields=("block_sizes",),
            )
    return sizes


def _settings(models: Sequence[Model], options: BenchOptions, sizes: Sequence[int]) -> list[Setting]:
    """The settings to time. A single bundle that is not pinned also gets an n chosen forward by forward."""
    settings: list[Setting] = []
    for index, model in enumerate(models):
        if len(models) > 1:
            trained = model.facts.trained_with
            methods = options.timed(METHOD_OF_LOOP[trained.loop if trained else "sliding"])
        else:
            methods = options.timed(*(METHODS if options.draft_model else DEFAULT_METHODS))
        for method in methods:
            settings += [Setting(index, method, size) for size in ((None,) if method in HAVE_NO_BLOCK else sizes)]
        if len(models) == 1 and "jacobi" in methods and not model.engine.fixed_shapes:
            settings.append(Setting(index, "jacobi", "auto"))
    return settings


def _in_turn(
    models: Sequence[Model],
    prompts: Sequence[list[int]],
    settings: Sequence[Setting],
    options: BenchOptions,
    progress: Progress,
) -> dict[Setting, list[Pass]]:
    """Run passes through all settings in turn, ``repeats`` times, after a warm-up round.

    A pass is all prompts in one setting, as a service would run them. Switching settings between requests would be
    unfair: the heavy forwards of one loop evict processor caches, and the light forwards of another pay for it. Block
    sizes are compared before, so that ``auto`` chooses among all that are exact.
    """
    _compare_sizes(models, progress)
    passes: dict[Setting, list[Pass]] = {setting: [] for setting in settings}
    total = (options.repeats + 1) * len(settings)
    for done in range(total):
        setting, model = settings[done % len(settings)], models[settings[done % len(settings)].bundle]
        model.pool.clear()  # the pool would know the answers from the previous pass
        decoded = decode_all(
            model,
            prompts,
            at_most=options.max_new_tokens,
            progress=partial(_report_prompts, progress, done, total, len(prompts)),
            **_request_options(setting, options),
        )
        finished = _collect([each.generation for each in decoded])
        if done >= len(settings):
            passes[setting].append(finished)
    return passes


def _report_prompts(progress: Progress, num_passes: int, of_passes: int, num_prompts: int, done: int) -> None:
    """Report prompts over all passes, the warm-up included."""
    progress("prompts", num_passes * num_prompts + done, of_passes * num_prompts, f"pass {num_passes + 1}/{of_passes}")


def _request_options(setting: Setting, options: BenchOptions) -> dict[str, Any]:
    chosen: dict[str, Any] = {"method": setting.method, "ignore_eos": options.ignore_eos}
    if setting.method == LOOKAHEAD:
        chosen |= options.lookahead
    else:
        chosen |= {"block_size": setting.block_size, "deterministic": setting.block_size is None}
    return chosen if setting.method == "autoregressive" else chosen | {"proposer": options.proposer}


def _collect(generations: Sequence[Generation]) -> Pass:
    statistics = [generation.statistics for generation in generations]
    return Pass(
        tokens=tuple(generation.token_ids for generation in generations),
        forwards=sum(entry.forwards for entry in statistics),
        decode_seconds=sum(entry.decode_seconds for entry in statistics),
        prefill_seconds=sum(entry.prefill_seconds for entry in statistics),
        engine_seconds=sum(entry.engine_seconds for entry in statistics),
    )


def _time_forwards(
    models: Sequence[Model], prompts: Sequence[list[int]], sizes: Sequence[int], progress: Progress
) -> Sequence[MeasuredTimes | None]:
    """T(n) of each bundle over as many KV rows as the median prompt has. None for a bundle that is pinned."""
    if models[0].engine.fixed_shapes:
        return [None]
    wanted = {1, *sizes, *(LATENCY_BLOCK_SIZES if len(models) == 1 else ())}
    past = int(median(len(prompt) for prompt in prompts))
    return time_in_turn([model.engine for model in models], sorted(wanted), past=past, progress=progress)


def _leave_latency(bundles: Sequence[Bundle], times: Sequence[MeasuredTimes | None], threads: int | None) -> None:
    """Keep the times of a single bundle for ``auto``, unless the machine was too busy for them to say anything."""
    [bundle, *others], [found, *_] = bundles, times
    if others or found is None:
        return
    if found.why_busy:
        log.warning("times of forwards are not kept, since %s", found.why_busy)
        return
    try:
        write_latency(bundle, found.seconds, num_slots=1, threads=threads)
    except OutputError as error:
        log.warning("the times of forwards are not kept: %s", error)


def _latency(times: MeasuredTimes | None) -> dict[str, Any]:
    if times is None:
        return {"latency": [], "why_busy": None}
    entries = [
        {
            "block_size": size,
            "milliseconds": seconds * 1e3,
            "ratio": times.relative(size),
            "ratio_spread": times.spread(size),
        }
        for size, seconds in times.seconds.items()
    ]
    return {"latency": entries, "why_busy": times.why_busy}


def _summaries(
    settings: Sequence[Setting],
    passes: Mapping[Setting, list[Pass]],
    models: Sequence[Model],
    times: Sequence[MeasuredTimes | None],
) -> list[dict[str, Any]]:
    """The measured results of each setting."""
    first = next((each for each in settings if each[:2] == (0, "autoregressive")), settings[0])
    expected, winners = passes[first][0].tokens, _winners(passes)
    summaries = []
    for setting in settings:
        size = setting.block_size
        if setting.method == "autoregressive":
            pinned = models[setting.bundle].engine.fixed_shapes
            size = pinned.block_size if pinned else 1
        found = _summary(passes[setting], passes.get(Setting(setting.bundle, "autoregressive", None)))
        summaries.append(
            {"method": setting.method, "block_size": size}
            | found
            | _expectation(found["tokens_per_forward"], size, times[setting.bundle])
            | {"equal": sum(a == b for a, b in zip(passes[setting][0].tokens, expected, strict=True))}
            | {"fastest_in": winners.count(setting)}
        )
    return summaries


def _winners(passes: Mapping[Setting, list[Pass]]) -> list[Setting]:
    """The setting of most tokens a second, for each pass."""
    num_passes = min(map(len, passes.values()))
    return [max(passes, key=lambda setting: passes[setting][number].rate) for number in range(num_passes)]


def _summary(passes: Sequence[Pass], baseline: Sequence[Pass] | None) -> dict[str, Any]:
    first = passes[0]
    summary: dict[str, Any] = {
        "tokens_per_second": median(each.rate for each in passes),
        "tokens_per_forward": first.new_tokens / first.forwards,
        "forwards": first.forwards,
        "new_tokens": first.new_tokens,
        "overhead": median(each.decode_seconds / each.engine_seconds for each in passes),
        "speedup": None,
        "speedup_with_prefill": None,
    }
    if baseline:
        pairs = list(zip(baseline, passes, strict=True))
        summary["speedup"] = median(base.decode_seconds / each.decode_seconds for base, each in pairs)
        summary["speedup_with_prefill"] = median(
            (base.decode_seconds + base.prefill_seconds) / (each.decode_seconds + each.prefill_seconds)
            for base, each in pairs
        )
    return summary


def _expectation(
    tokens_per_forward: float, size: BlockSize | None, times: MeasuredTimes | None
) -> dict[str, float | None]:
    """The speed if every forward took T(n) and the loop took no time."""
    if not isinstance(size, int) or times is None or not times.seconds.keys() >= {1, size}:
        names = ("first_milliseconds", "milliseconds", "expected_speedup", "expected_tokens_per_second")
        return dict.fromkeys(names)
    return {
        "first_milliseconds": times.seconds[1] * 1e3,
        "milliseconds": times.seconds[size] * 1e3,
        "expected_speedup": tokens_per_forward / times.relative(size),
        "expected_tokens_per_second": tokens_per_forward / times.seconds[size],
    }


def _bench_transformers(
    bundle: Bundle, checkpoint: Path, prompts: Sequence[list[int]], options: BenchOptions, progress: Progress
) -> dict[str, float | int]:
    import torch

    from cllm_export.exporter.parity.reference import Reference

    torch.set_num_threads(options.threads or available_threads())
    manifest = bundle.manifest
    reference = Reference(checkpoint, max_length=manifest.max_length, num_layers=manifest.geometry.num_layers)
    reference.generate(prompts[0], 4, ())
    tokens, seconds = 0, 0.0
    for index, prompt in enumerate(prompts):
        progress("prompts of transformers", index, len(prompts))
        limit = min(options.max_new_tokens, manifest.max_length - len(prompt))
        new, taken = reference.generate(prompt, limit, manifest.eos_token_ids)
        tokens, seconds = tokens + new, seconds + taken
    return {"new_tokens": tokens, "tokens_per_second_with_prefill": tokens / seconds}
