"""Forwards against a device's own ceilings, what loops add to them, and what crosses the bus: one run, all in turn.

    python benchmarks/gpu_forwards.py BUNDLE --provider tensorrt [--prompts PROMPTS] [--rounds 15] [--json OUT]

Each round measures everything once, beginning elsewhere each time; shown are medians with quartiles, and shares are of
a ceiling of the same round. What a provider has not is a line with its reason. T(n) is of a forward over ``--past``
rows of KV in every slot:

    tensorrt   seconds of the device between two events, per forward, of forwards that are enqueued in a row
    cuda, cpu  seconds inside ONNX Runtime and of the copies into it, per forward; its runs end when the device has

What a loop adds is the wall-clock of a decode per forward less that: with TensorRT less T(n) with CUDA graphs, whatever
the loop runs, and with ONNX Runtime less what the same forwards took inside it. A loop on the device looks k blocks
ahead, and may so read a larger extent than T(n) did. ``--provider cpu`` takes the processor for the device: it shows
that all of this runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from gpu_bus import CountingCuda, Crossed, count_on_cuda, count_on_ort
from gpu_ceilings import (
    Probe,
    copy_on_device,
    copy_on_host,
    device_seconds,
    multiply_on_ort,
    multiply_on_tensorrt,
    repeats_for,
    write_product,
)

from cllm_export.bundle import Bundle, open_bundle
from cllm_export.contract import KV_DTYPE
from cllm_export.cuda import Cuda, open_cuda
from cllm_export.errors import CllmExportError, EngineError, MissingExtraError, OptionError
from cllm_export.prompts import read_prompts
from cllm_export.runtime.device_loop import DeviceLoop
from cllm_export.runtime.engine import Engine
from cllm_export.runtime.generate import Model, Options
from cllm_export.runtime.ort_device_engine import OrtDeviceEngine
from cllm_export.runtime.ort_engine import OrtEngine, available_threads, describe_machine
from cllm_export.runtime.providers import PROVIDERS, Provider
from cllm_export.runtime.text import TextCodec
from cllm_export.runtime.trt_engine import TrtEngine
from cllm_export.tensorrt_library import Gpu, open_gpu

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
FORWARDS_PER_SYNC = (1, 2, 4, 8, 16)
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192, "tensorrt": 8192}
TARGET_SHARE, TARGET_PARAMETERS = 0.7, 10**9
TARGET_BYTES, TOKEN_BYTES = 260, 8
"""Over the bus in a forward, besides its tokens."""
ROW_READERS = {"Gather", "Slice", "RotaryEmbedding"}
"""Operators that read a few rows of a weight."""

Form = bool | None
"""Of an engine: with CUDA graphs, without, or without the choice."""
Value = dict[str, Any]
"""``median``, ``low`` and ``high``, or ``not_measured`` with the reason."""


class Key(NamedTuple):
    """What a probe measures."""

    what: str
    form: Form = None
    size: int = 0
    forwards_per_sync: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how often."""

    rounds: int = 15
    past: int = 128
    tokens: int = 64
    """New ones of a decode whose loop is timed."""
    sizes: tuple[int, ...] = SIZES
    block_size: int = 16
    forwards_per_sync: tuple[int, ...] = FORWARDS_PER_SYNC
    product_size: int
    copy_bytes: int = 256 << 20
    prompts: tuple[Any, ...] = ()
    max_new_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the forwards of a bundle must read and multiply, told from its graph."""

    parameters: int
    """Of matrices that rows are multiplied with."""
    weight_bytes: int
    """Read by every forward, which leaves out tables that rows are looked up in."""


@dataclass(kw_only=True)
class Subject:
    """A bundle on a provider: its engines by form, and the device that they run on."""

    provider: Provider
    bundle: Bundle
    engines: dict[Form, Engine | str]
    """Or why there is none."""
    threads: int
    machine: dict[str, Any]
    owned: ExitStack
    cuda: Cuda | str
    """Or why there is none."""
    gpu: Gpu | None = None
    models: dict[Form, Model] = field(default_factory=dict)

    def engine(self, form: Form) -> Engine:
        found = self.engines[form]
        if isinstance(found, str):
            raise EngineError(found)
        return found

    def model(self, form: Form) -> Model:
        """One for each engine, since its loops on the device must go before that; it reads every prompt anew."""
        if form not in self.models:
            model = Model(self.bundle.manifest, self.engine(form), TextCodec.of_bundle(self.bundle))
            self.models[form] = self.owned.enter_context(model)
        return self.models[form]


def open_subject(
    bundle: Bundle, provider: Provider, owned: ExitStack, *, slots: int | None, threads: int | None
) -> Subject:
    """A bundle on a provider.

    Raises:
        GpuError, PlanError, MissingExtraError, EngineError: the provider is not there, or not for this bundle.
    """
    if provider == "tensorrt":
        return open_tensorrt(bundle, open_gpu(), owned)
    count = threads or available_threads()
    facts: dict[str, Any] = describe_machine(threads)
    cuda: Cuda | str = "the processor is the device"
    if provider == "cpu":
        engines: dict[Form, Engine | str] = {None: OrtEngine(bundle, num_slots=slots, threads=count)}
    else:
        engines = {False: OrtDeviceEngine(bundle, num_slots=slots)}
        engines[True] = _or_reason(lambda: OrtDeviceEngine(bundle, num_slots=slots, cuda_graphs=True))
        cuda = _or_reason(open_cuda)
        facts |= {"gpu": cuda if isinstance(cuda, str) else asdict(cuda.facts())}
    for engine in engines.values():
        if not isinstance(engine, str):
            owned.callback(engine.close)
    return Subject(
        provider=provider, bundle=bundle, engines=engines, threads=count, machine=facts, owned=owned, cuda=cuda
    )


def open_tensorrt(bundle: Bundle, gpu: Gpu, owned: ExitStack) -> Subject:
    """The bundle's plan on a GPU, twice: with CUDA graphs and without."""
    counting = CountingCuda(gpu.cuda.runtime)
    gpu = replace(gpu, cuda=counting)
    engines: dict[Form, Engine | str] = {
        form: owned.enter_context(TrtEngine(bundle, gpu=gpu, cuda_graphs=form)) for form in (True, False)
    }
    facts = {"gpu": asdict(gpu.facts), "tensorrt": gpu.version, "cuda": counting.versions()}
    return Subject(
        provider="tensorrt",
        bundle=bundle,
        engines=engines,
        threads=1,
        machine=facts,
        owned=owned,
        cuda=counting,
        gpu=gpu,
    )


def _or_reason(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except CllmExportError as error:
        return str(error)


def read_work(bundle: Bundle) -> Work:
    """Raises MissingExtraError: onnx is not installed."""
    try:
        import onnx
    except ImportError:
        raise MissingExtraError("onnx", extra="export") from None
    graph = onnx.load(bundle.graph_path(), load_external_data=False).graph
    users: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.op_type)
    parameters = weight_bytes = 0
    for tensor in graph.initializer:
        length = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
        if not length or users.get(tensor.name, set()) <= ROW_READERS:
            continue
        weight_bytes += length
        if len(tensor.dims) == 2:
            parameters += tensor.dims[0] * tensor.dims[1]
    return Work(parameters=parameters, weight_bytes=weight_bytes)


# Probes.


def probe_copy(subject: Subject, settings: Settings) -> Probe:
    if subject.provider == "cpu":
        return copy_on_host(subject.threads, settings.copy_bytes)
    if isinstance(subject.cuda, str):
        raise EngineError(subject.cuda)
    return copy_on_device(subject.cuda, subject.owned, settings.copy_bytes)


def probe_product(subject: Subject, settings: Settings) -> Probe:
    size, dtype = settings.product_size, KV_DTYPE[subject.bundle.manifest.precision]
    directory = subject.owned.enter_context(tempfile.TemporaryDirectory())
    path = write_product(Path(directory) / "product.onnx", dtype, size)
    if subject.gpu:
        return multiply_on_tensorrt(path, dtype, size, gpu=subject.gpu, owned=subject.owned)
    device = "cpu" if subject.provider == "cpu" else "cuda"
    return multiply_on_ort(path, dtype, size, device=device, threads=subject.threads)


def run_forward(engine: Engine, size: int, past: int) -> None:
    """A block in every slot, always the same."""
    slots = engine.num_slots
    engine.forward([[0] * size] * slots, [1] * slots, [past] * slots)


def require_size(engine: Engine, size: int) -> None:
    """Raises EngineError: the engine runs no forward of just this n."""
    if size > (largest := engine.geometry.max_block_size):
        raise EngineError(f"the bundle takes blocks of {largest} at most: build it with --block-size {size}")
    if isinstance(engine, TrtEngine) and size not in engine.block_sizes:
        raise EngineError(f"the plan has no profile for it: cllm-export plan BUNDLE --block-size {size}")


def probe_forward(subject: Subject, form: Form, size: int, settings: Settings) -> Probe:
    engine = subject.engine(form)
    require_size(engine, size)
    for _ in range(3):
        engine.run_seconds = 0.0
        run_forward(engine, size, settings.past)
    repeats = repeats_for(engine.run_seconds)
    if isinstance(engine, TrtEngine):
        enqueue = bare_forward(engine, size, settings.past, subject.owned, is_graph=bool(form))
        return lambda: {"seconds": device_seconds(engine.cuda, engine.stream, enqueue, repeats)}

    def measure() -> dict[str, float]:
        run_forward(engine, size, settings.past)
        engine.run_seconds = 0.0
        for _ in range(repeats):
            run_forward(engine, size, settings.past)
        return {"seconds": engine.run_seconds / repeats}

    return measure


def bare_forward(engine: TrtEngine, size: int, past: int, owned: ExitStack, *, is_graph: bool) -> Callable[[], object]:
    """Enqueues a forward without its copies, over what the last one left on the device."""
    cuda, stream, extent = engine.cuda, engine.stream, engine.extent_for(past + size)

    def enqueue() -> None:
        engine.enqueue_decode(size, extent)

    if not is_graph:
        return enqueue
    with cuda.capture(stream) as captured:
        enqueue()
    owned.callback(cuda.destroy_graph, captured[0])
    return lambda: cuda.launch(captured[0], stream)


def loop_options(size: int, k: int | None, settings: Settings) -> Options:
    options: Options = {"method": "jacobi", "block_size": size, "fill": "pad", "ignore_eos": True}
    options["max_new_tokens"] = settings.tokens
    if k is not None:
        options["forwards_per_sync"] = k
    return options


def some_prompt(engine: Engine, settings: Settings) -> list[int]:
    """As many tokens as have their first forward at ``past``."""
    draws = random.Random(0)  # noqa: S311 - any tokens will do
    return [draws.randrange(engine.geometry.vocab_size) for _ in range(settings.past + 1)]


def probe_loop(subject: Subject, key: Key, settings: Settings) -> Probe:
    engine, model = subject.engine(key.form), subject.model(key.form)
    require_size(engine, key.size)
    prompt, options = some_prompt(engine, settings), loop_options(key.size, key.forwards_per_sync, settings)

    def measure() -> dict[str, float]:
        took = model.generate(prompt, **options).statistics
        figures = {"wall": took.decode_seconds / took.forwards, "tokens": float(took.new_tokens)}
        if not isinstance(engine, TrtEngine):
            return figures | {"bare": took.engine_seconds / took.forwards}
        on_device = took.on_device
        waits = on_device.num_syncs if on_device else took.forwards
        in_vain = on_device.num_forwards - took.forwards if on_device else 0
        return figures | {"syncs": waits / took.new_tokens, "in_vain": float(in_vain)}

    return measure


def probe_decoding(model: Model, options: Options, settings: Settings, given: list[tuple[int, ...]]) -> Probe:
    """Every prompt once; ``given`` takes the tokens of the last round."""
    prompts = [model.encode(prompt) for prompt in settings.prompts]

    def measure() -> dict[str, float]:
        given.clear()
        tokens, forwards, seconds = 0, 0, 0.0
        for prompt in prompts:
            room = min(settings.max_new_tokens, model.facts.max_length - len(prompt))
            made = model.generate(prompt, **options, max_new_tokens=room)
            tokens += made.statistics.new_tokens
            forwards += made.statistics.forwards
            seconds += made.statistics.decode_seconds
            given.append(made.token_ids)
        return {"rate": tokens / seconds, "tokens_per_forward": tokens / forwards}

    return measure


def decoding_options(settings: Settings, k: int) -> dict[str, Options]:
    return {
        "autoregressive": {"method": "autoregressive"},
        "jacobi": {"method": "jacobi", "block_size": settings.block_size},
        f"jacobi, {k} forwards a sync": {"method": "jacobi", "block_size": settings.block_size, "forwards_per_sync": k},
    }


# Rounds.


@dataclass
class Samples:
    """What every probe gave, round by round, or why it gave nothing."""

    given: dict[Key, list[dict[str, float]]]
    missing: dict[Key, str]

    def figure(self, key: Key, name: str) -> list[float] | str:
        """One of a probe's figures in every round, or the reason."""
        if key in self.missing:
            return self.missing[key]
        values = [figures[name] for figures in self.given[key] if name in figures]
        return values or "this engine has no such figure"


def collect(makers: dict[Key, Callable[[], Probe]], rounds: int) -> Samples:
    """Run every probe once to warm up, then once a round."""
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
    """Key -> what makes its probe."""
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


# The report.


def spread(values: list[float] | str) -> Value:
    """Median and quartiles, or the reason."""
    if isinstance(values, str):
        return {"not_measured": values}
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "low": low, "high": high}


def combine(compute: Callable[..., float], *figures: list[float] | str) -> Value:
    """The spread of what is computed from several figures of each round; the first reason where one is missing."""
    if reason := next((each for each in figures if isinstance(each, str)), None):
        return {"not_measured": reason}
    return spread([compute(*values) for values in zip(*figures, strict=False)])


def forward_rows(subject: Subject, settings: Settings, samples: Samples, work: Work) -> list[dict[str, Any]]:
    manifest = subject.bundle.manifest
    geometry, past, rows = manifest.geometry, settings.past, []
    copy, product = samples.figure(Key("copy"), "rate"), samples.figure(Key("product"), "rate")
    if manifest.quantization:
        product = f"the bundle is {manifest.quantization.scheme}, and the rate is of {manifest.precision}"
    for form, engine in subject.engines.items():
        slots = 1 if isinstance(engine, str) else engine.num_slots
        for size in settings.sizes:
            seconds = samples.figure(Key("forward", form, size), "seconds")
            read = work.weight_bytes + slots * (past + size) * geometry.kv_bytes_per_token(manifest.precision)
            seen = size * past + size * (size + 1) // 2
            attention = 4 * geometry.num_layers * geometry.num_heads * geometry.head_dim * seen
            operations = slots * (2 * work.parameters * size + attention)
            one = samples.figure(Key("forward", form, 1), "seconds")
            rows.append({
                "cuda_graphs": form,
                "block_size": size,
                "seconds": spread(seconds),
                "over_one": combine(lambda mine, one: mine / one, seconds, one),
                "bytes": read,
                "bandwidth_share": combine(lambda mine, rate, read=read: read / mine / rate, seconds, copy),
                "operations": operations,
                "matrix_share": combine(lambda mine, rate, done=operations: done / mine / rate, seconds, product),
            })  # fmt: skip
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
    """Counted once: they do not vary."""
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
    if isinstance(engine, OrtEngine):
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
    if isinstance(engine, TrtEngine):
        assert isinstance(engine.cuda, CountingCuda), "which TensorRT's engines are opened with here"
        return count_on_cuda(engine.cuda, run)
    return count_on_ort(run)


def count_device_loop(engine: Engine, key: Key, settings: Settings) -> tuple[Crossed, int]:
    """Of a decode whose graphs are recorded; what starts a request is shared among its forwards."""
    if not isinstance(engine, TrtEngine):
        raise OptionError("forwards_per_sync is for TensorRT")
    prompts = [some_prompt(engine, settings), *([] for _ in range(engine.num_slots - 1))]
    limit = {"max_new_tokens": settings.tokens, "eos_token_ids": (), "fill_token": 0}
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
    """Everything; see the module for what each figure is."""
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


# What is shown.


def show_value(value: Value, scale: float = 1.0, form: str = ",.2f") -> str:
    """``median [low, high]``; a dash for what a line below the table says the reason of."""
    if "not_measured" in value:
        return "-"
    return "{} [{}, {}]".format(*(format(value[name] * scale, form) for name in ("median", "low", "high")))


Columns = dict[str, Callable[[dict[str, Any]], str]]
GRAPHS = {None: "", True: "graphs", False: "no graphs"}
LABELS: Columns = {
    "form": lambda row: GRAPHS[row["cuda_graphs"]],
    "n": lambda row: str(row["block_size"]),
}
LOOP_LABELS: Columns = LABELS | {"k": lambda row: str(row["forwards_per_sync"] or "host")}
FORWARDS: Columns = LABELS | {
    "T(n) ms": lambda row: show_value(row["seconds"], 1e3, ",.3f"),
    "T(n)/T(1)": lambda row: show_value(row["over_one"]),
    "MB read": lambda row: f"{row['bytes'] / 1e6:,.1f}",
    "% of copy bandwidth": lambda row: show_value(row["bandwidth_share"], 100, ".1f"),
    "% of matrix rate": lambda row: show_value(row["matrix_share"], 100, ".1f"),
}
LOOPS: Columns = LOOP_LABELS | {
    "us a forward": lambda row: show_value(row["wall_seconds"], 1e6, ",.0f"),
    "us the loop adds": lambda row: show_value(row["overhead_seconds"], 1e6, ",.1f"),
    "syncs a token": lambda row: show_value(row["syncs_per_token"], 1, ".3f"),
    "forwards in vain": lambda row: show_value(row["forwards_in_vain"], 1, ".0f"),
}
BUS: Columns = LOOP_LABELS | {
    name: lambda row, name=name: f"{row[name]:,.0f}" if name in row else "-"
    for name in ("to_device", "to_host", "bytes", "target")
}
DECODING: Columns = {
    "form": LABELS["form"],
    "method": lambda row: row["method"],
    "tokens/s": lambda row: show_value(row["tokens_per_second"], 1, ",.0f"),
    "tokens/forward": lambda row: show_value(row["tokens_per_forward"]),
    "over autoregressive": lambda row: show_value(row["over_autoregressive"], 1, ".3f"),
    "sequences that differ": lambda row: (
        "-" if isinstance(row["differing_sequences"], dict) else str(row["differing_sequences"])
    ),
}


def table(rows: Sequence[dict[str, Any]], columns: Columns) -> list[str]:
    """A table, and a line for each reason why something is not in it."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        cells = [show(row) for show in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
        for name, value in ({"all": row} | row).items():
            if isinstance(value, dict) and "not_measured" in value:
                label = " ".join(filter(None, cells[: len(columns.keys() & LOOP_LABELS.keys()) or 2]))
                reasons.setdefault(str(value["not_measured"]), []).append(f"{label} {name}")
    lines += [f"not measured: {'; '.join(names)}: {reason}" for reason, names in reasons.items()]
    return lines


def target_line(report: dict[str, Any]) -> str:
    """Whether a forward of one row reaches its share of the copy bandwidth."""
    parameters = report["bundle"]["parameters"]
    if parameters < TARGET_PARAMETERS:
        return (
            f"target of {TARGET_SHARE:.0%} of the copy bandwidth at n = 1: for 1 B parameters, here are {parameters:,}"
        )
    shares = [row["bandwidth_share"] for row in report["forwards"] if row["block_size"] == 1]
    found = [share["median"] for share in shares if "median" in share]
    best = f"{max(found):.1%}, {'met' if max(found) >= TARGET_SHARE else 'not met'}" if found else "not measured"
    return f"target of {TARGET_SHARE:.0%} of the copy bandwidth at n = 1: {best}"


def show(report: dict[str, Any]) -> str:
    bundle, ceilings = report["bundle"], report["ceilings"]
    lines = [
        f"{bundle['name']} ({bundle['precision']}, {bundle['parameters'] / 1e6:,.0f} M parameters in products) on "
        f"{report['provider']}: {json.dumps(report['machine'])}",
        f"medians [quartiles] of {report['rounds']} rounds, {report['past']} rows of KV in sight",
    ]
    for name, value, scale, unit in (
        ("copy bandwidth, read and written", ceilings["copy_bytes_per_second"], 1e-9, "GB/s"),
        ("matrix rate", ceilings["matrix_operations_per_second"], 1e-12, "T operations/s"),
    ):
        reason = value.get("not_measured")
        lines.append(f"{name}: " + (f"not measured: {reason}" if reason else f"{show_value(value, scale)} {unit}"))
    parts = {"forwards": FORWARDS, "loops": LOOPS, "bus": BUS, "decoding": DECODING}
    for name, columns in parts.items():
        lines += ["", name if name != "bus" else "bytes over the bus per forward, as the engine asks for copies"]
        lines += table(report[name], columns)
    return "\n".join([*lines, "", target_line(report)])


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
