"""Measure forwards against a device's ceilings, the time that loops add, and the bytes over the bus, all in one run.

    python benchmarks/gpu_forwards.py BUNDLE --provider tensorrt [--prompts PROMPTS] [--rounds 15] [--json OUT]

Each round measures everything once, and each starts at another place in the order. The tables show medians with
quartiles. A share is relative to a ceiling of the same round. For a figure that a provider lacks, a line gives the
reason. T(n) is the time of a forward over ``--past`` rows of KV in every slot:

    tensorrt   device seconds per forward, between two events, of forwards enqueued in a row
    cuda, cpu  seconds per forward inside ONNX Runtime and of the copies into it; its runs end when the device has ended

The time that a loop adds is the wall-clock time of a decode per forward minus the forward's time. With TensorRT that is
T(n) with CUDA graphs, whatever the loop runs. With ONNX Runtime it is the time of the same forwards inside it. A loop
on the device looks k blocks ahead, so it may read a larger KV length than T(n) did. ``--provider cpu`` treats the
processor as the device, to show that the benchmark runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from gpu_bus import CountingCuda, Crossed, count_on_cuda, count_on_ort
from gpu_ceilings import Probe
from gpu_probes import (
    SIZES,
    Key,
    Settings,
    Subject,
    Work,
    decoding_options,
    forward_work,
    open_subject,
    probe_copy,
    probe_decoding,
    probe_forward,
    probe_loop,
    probe_product,
    read_work,
    require_size,
    some_prompt,
)
from gpu_table import Value, show

from cllm_export.bundle.manifest import open_bundle
from cllm_export.errors import CllmExportError, EngineError, OptionError
from cllm_export.prompts import read_prompts
from cllm_export.runtime.decoding.block_size.time_forwards import run_forward
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.load import PROVIDERS
from cllm_export.tensorrt.loop.device_loop import DeviceLoop

PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192, "tensorrt": 8192}
TARGET_BYTES, TOKEN_BYTES = 260, 8
"""Target bytes over the bus per forward without its tokens, and bytes per token."""


@dataclass
class Samples:
    """The figures of every probe, round by round, or the reason why there are none."""

    given: dict[Key, list[dict[str, float]]]
    missing: dict[Key, str]

    def figure(self, key: Key, name: str) -> list[float] | str:
        """One figure of a probe in every round, or the reason why it is missing."""
        if key not in self.given or key in self.missing:
            return self.missing.get(key, "it was not asked for")
        values = [figures[name] for figures in self.given[key] if name in figures]
        return values or "this engine has no such figure"


def collect(makers: dict[Key, Callable[[], Probe]], rounds: int) -> Samples:
    """Run every probe once as a warm-up, then once per round."""
    probes, samples = dict[Key, Probe](), Samples({}, {})
    for key, make in makers.items():
        try:
            probe = make()
            probe()
        except CllmExportError as error:
            samples.missing[key] = str(error)
        else:
            probes[key], samples.given[key] = probe, []
    for number in range(rounds):
        keys = list(probes)
        start = number * len(keys) // rounds
        for key in keys[start:] + keys[:start]:
            try:
                samples.given[key].append(probes[key]())
            except CllmExportError as error:
                samples.missing[key] = f"failed in round {number + 1}: {error}"
                del probes[key]
    return samples


def makers_of(subject: Subject, settings: Settings, texts: dict[Key, list[tuple[int, ...]]]) -> dict[Key, Any]:
    """Key -> the function that makes its probe."""
    makers: dict[Key, Callable[[], Probe]] = {
        Key("copy"): lambda: probe_copy(subject, settings),
        Key("product"): lambda: probe_product(subject, settings),
    }
    for form in subject.engines:
        for size in settings.sizes:
            makers[Key("forward", form, size)] = lambda form=form, size=size: probe_forward(
                subject, form, size, settings
            )
        for name, options in decoding_options(settings, max(settings.forwards_per_sync)).items():
            key = Key(name, form)
            if settings.prompts:
                given = texts[key] = []
                makers[key] = lambda form=form, options=options, given=given: probe_decoding(
                    subject.model(form), options, settings, given
                )
    for key in loop_keys(subject, settings):
        makers[key] = lambda key=key: probe_loop(subject, key, settings)
    return makers


def loop_keys(subject: Subject, settings: Settings) -> Iterator[Key]:
    for size in dict.fromkeys((1, settings.block_size)):
        for form in subject.engines:
            yield Key("loop", form, size)
        for k in settings.forwards_per_sync:
            yield Key("loop", next(iter(subject.engines)), size, k)


def spread(values: list[float] | str) -> Value:
    """Median and quartiles, or the reason why there are none."""
    if isinstance(values, str):
        return {"not_measured": values}
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "low": low, "high": high}


def combine(compute: Callable[..., float], *figures: list[float] | str) -> Value:
    """The spread of a value computed from several figures of each round. If one is missing, the first reason."""
    if reason := next((each for each in figures if isinstance(each, str)), None):
        return {"not_measured": reason}
    return spread([compute(*values) for values in zip(*figures, strict=True)])


def forward_rows(subject: Subject, settings: Settings, samples: Samples, work: Work) -> list[dict[str, Any]]:
    manifest, rows = subject.bundle.manifest, []
    copy, product = samples.figure(Key("copy"), "rate"), samples.figure(Key("product"), "rate")
    if manifest.quantization:
        product = f"the bundle is {manifest.quantization.scheme}, and the rate is of {manifest.precision}"
    for form, engine in subject.engines.items():
        slots = manifest.batch_size if isinstance(engine, str) else engine.num_slots
        one = samples.figure(Key("forward", form, 1), "seconds")
        for size in settings.sizes:
            seconds = samples.figure(Key("forward", form, size), "seconds")
            read, done = forward_work(manifest, work, slots=slots, size=size, past=settings.past)
            row = {"cuda_graphs": form, "block_size": size, "bytes": read, "operations": done}
            row["seconds"] = spread(seconds)
            row["over_one"] = combine(lambda mine, one: mine / one, seconds, one)
            row["bandwidth_share"] = combine(lambda mine, rate, read=read: read / mine / rate, seconds, copy)
            row["matrix_share"] = combine(lambda mine, rate, done=done: done / mine / rate, seconds, product)
            rows.append(row)
    return rows


def loop_rows(subject: Subject, settings: Settings, samples: Samples) -> list[dict[str, Any]]:
    rows = []
    for key in loop_keys(subject, settings):
        wall = samples.figure(key, "wall")
        if subject.gpu:
            bare = samples.figure(Key("forward", True, key.size), "seconds")
            syncs, in_vain = samples.figure(key, "syncs"), samples.figure(key, "in_vain")
        else:
            bare = samples.figure(key, "bare")
            syncs = in_vain = "ONNX Runtime does not tell how often it waits"
        rows.append({
            "cuda_graphs": key.form,
            "block_size": key.size,
            "forwards_per_sync": key.forwards_per_sync,
            "wall_seconds": spread(wall),
            "overhead_seconds": combine(lambda wall, bare: wall - bare, wall, bare),
            "syncs_per_token": spread(wall if isinstance(wall, str) else syncs),
            "forwards_in_vain": spread(wall if isinstance(wall, str) else in_vain),
        })  # fmt: skip
    return rows


def bus_rows(subject: Subject, settings: Settings) -> list[dict[str, Any]]:
    """Bytes over the bus for each loop. They are counted once, because they do not vary."""
    rows = []
    for key in loop_keys(subject, settings):
        row: dict[str, Any] = {"cuda_graphs": key.form, "block_size": key.size}
        row["forwards_per_sync"] = key.forwards_per_sync
        try:
            row |= count_bus(subject, key, settings)
        except CllmExportError as error:
            row["not_measured"] = str(error)
        rows.append(row)
    return rows


def count_bus(subject: Subject, key: Key, settings: Settings) -> dict[str, float]:
    """Bytes per forward by direction, and the target."""
    engine = subject.engine(key.form)
    require_size(engine, key.size)
    if key.form is None:
        raise EngineError("the engine works in the processor's own memory, and copies nothing over a bus")
    if key.forwards_per_sync:
        crossed, forwards = count_device_loop(engine, key, settings)
    else:
        run_forward(engine, key.size, settings.past)
        crossed, forwards = count_while(engine, lambda: run_forward(engine, key.size, settings.past)), 1
    target = TARGET_BYTES + TOKEN_BYTES * key.size * engine.num_slots
    return {
        "to_device": crossed["to device"] / forwards,
        "to_host": crossed["to host"] / forwards,
        "bytes": sum(crossed.values()) / forwards,
        "target": target,
    }


def count_while(engine: Engine, run: Callable[[], object]) -> Crossed:
    if engine.has_device_loop:
        assert isinstance(engine.cuda, CountingCuda), "which TensorRT's engines are opened with here"
        return count_on_cuda(engine.cuda, run)
    return count_on_ort(run)


def count_device_loop(engine: Engine, key: Key, settings: Settings) -> tuple[Crossed, int]:
    """Bytes and forwards of a decode whose graphs are already captured. The start of the request is included."""
    if not engine.has_device_loop:
        raise OptionError("forwards_per_sync is for TensorRT")
    prompts = [some_prompt(engine, settings), *([] for _ in range(engine.num_slots - 1))]
    limit = {"max_new_tokens": settings.tokens, "eos_token_ids": (), "proposed_token": 0}
    with DeviceLoop(
        engine,
        block_size=key.size,
        compute_capability=engine.gpu.facts.compute_capability,
        forwards_per_sync=key.forwards_per_sync or 1,
        compiler=engine.gpu.compiler,
    ) as loop:
        for _ in range(2):
            loop.read(prompts)
            before = loop.num_forwards
            crossed = count_while(engine, lambda: list(loop.decode(prompts, **limit)))
    return crossed, loop.num_forwards - before


def decoding_rows(
    subject: Subject, settings: Settings, samples: Samples, texts: dict[Key, list[tuple[int, ...]]]
) -> list[dict[str, Any]]:
    rows = []
    for form in subject.engines:
        for name in decoding_options(settings, max(settings.forwards_per_sync)):
            key, first = Key(name, form), Key("autoregressive", form)
            rate = samples.figure(key, "rate") if settings.prompts else "no --prompts were given"
            alone = samples.figure(first, "rate") if settings.prompts else rate
            differing = sum(
                mine != other for mine, other in zip(texts.get(key, ()), texts.get(first, ()), strict=False)
            )
            rows.append({
                "cuda_graphs": form,
                "method": name,
                "tokens_per_second": spread(rate),
                "tokens_per_forward": spread(
                    rate if isinstance(rate, str) else samples.figure(key, "tokens_per_forward")
                ),
                "over_autoregressive": combine(lambda mine, alone: mine / alone, rate, alone),
                "differing_sequences": spread(rate) if isinstance(rate, str) else differing,
            })  # fmt: skip
    return rows


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Measure everything. The module docstring explains each figure."""
    manifest, work = subject.bundle.manifest, read_work(subject.bundle)
    texts: dict[Key, list[tuple[int, ...]]] = {}
    samples = collect(makers_of(subject, settings, texts), settings.rounds)
    return {
        "machine": subject.machine,
        "provider": subject.provider,
        "bundle": {"name": subject.bundle.path.name, "precision": manifest.precision, **asdict(work)},
        "past": settings.past,
        "rounds": settings.rounds,
        "ceilings": {
            "copy_bytes_per_second": spread(samples.figure(Key("copy"), "rate")),
            "matrix_operations_per_second": spread(samples.figure(Key("product"), "rate")),
        },
        "forwards": forward_rows(subject, settings, samples, work),
        "loops": loop_rows(subject, settings, samples),
        "bus": bus_rows(subject, settings),
        "decoding": decoding_rows(subject, settings, samples, texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--provider", choices=PROVIDERS, required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16, help="n of the loops, besides 1, and of Jacobi decoding")
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slots", type=int, help="ONNX Runtime alone: a plan has its own")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--matrix-size", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        report = run(args)
    except CllmExportError as error:
        sys.exit(str(error))
    print(show(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> dict[str, Any]:
    prompts = read_prompts(args.prompts, limit=args.limit) if args.prompts else []
    settings = Settings(
        rounds=args.rounds,
        past=args.past,
        sizes=tuple(sorted({*SIZES, args.block_size})),
        block_size=args.block_size,
        product_size=args.matrix_size or PRODUCT_SIZE[args.provider],
        prompts=tuple(prompt.content for prompt in prompts),
        max_new_tokens=args.max_new_tokens,
    )
    with ExitStack() as owned:
        bundle = open_bundle(args.bundle)
        subject = open_subject(bundle, args.provider, owned, slots=args.slots, threads=args.threads)
        return measure(subject, settings)


if __name__ == "__main__":
    main()
