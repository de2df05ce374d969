"""Probes for ``gpu_forwards.py``: a bundle on a provider, and a probe for each figure of its forwards and loops."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from gpu_bus import CountingCuda
from gpu_ceilings import (
    COPY_BYTES,
    Probe,
    copy_on_device,
    copy_on_host,
    device_seconds,
    multiply_on_ort,
    multiply_on_tensorrt,
    repeats_for,
    write_product,
)

from cllm_export.bundle.contract import KV_DTYPE
from cllm_export.bundle.manifest import Bundle, Manifest
from cllm_export.errors import CllmExportError, EngineError
from cllm_export.extras import missing_extra
from cllm_export.runtime.decoding.block_size.time_forwards import run_forward
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import Engine
from cllm_export.runtime.engines.cuda import Cuda, open_cuda
from cllm_export.runtime.engines.machine import available_threads, describe_machine
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import Provider
from cllm_export.runtime.model import Model
from cllm_export.runtime.options import GenerateOptions
from cllm_export.tensorrt.engine import TrtEngine
from cllm_export.tensorrt.library import Gpu, open_gpu

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
FORWARDS_PER_SYNC = (1, 2, 4, 8, 16)
ROW_READERS = {"Gather", "Slice", "RotaryEmbedding"}
"""Operators that read only a few rows of a weight."""

Form = bool | None
"""Form of an engine: True with CUDA graphs, False without, None if the engine has no such choice."""


class Key(NamedTuple):
    """Identifies what a probe measures."""

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
    """New tokens of a decode whose loop is timed."""
    sizes: tuple[int, ...] = SIZES
    block_size: int = 16
    forwards_per_sync: tuple[int, ...] = FORWARDS_PER_SYNC
    product_size: int
    copy_bytes: int = COPY_BYTES
    prompts: tuple[Any, ...] = ()
    max_new_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every forward of a bundle must read and multiply, computed from its graph."""

    parameters: int
    """Parameters of matrices that rows are multiplied with. For quantised matrices, numbers in packed form."""
    weight_bytes: int
    """Weight bytes that every forward reads. Tables that rows are looked up in are left out."""


@dataclass(kw_only=True)
class Subject:
    """A bundle on a provider: its engines by form, and the device that they run on."""

    provider: Provider
    bundle: Bundle
    engines: dict[Form, Engine | str]
    """Engine by form, or the reason why there is none."""
    threads: int
    machine: dict[str, Any]
    owned: ExitStack
    cuda: Cuda | str
    """CUDA, or the reason why there is none."""
    gpu: Gpu | None = None
    models: dict[Form, Model] = field(default_factory=dict)

    def engine(self, form: Form) -> Engine:
        found = self.engines[form]
        if isinstance(found, str):
            raise EngineError(found)
        return found

    def model(self, form: Form) -> Model:
        """One model per engine, because loops on the device must close before the engine. Every prompt is prefilled."""
        if form not in self.models:
            model = Model(self.bundle.manifest, self.engine(form), TextCodec.of_bundle(self.bundle))
            self.models[form] = self.owned.enter_context(model)
        return self.models[form]


def open_subject(
    bundle: Bundle, provider: Provider, owned: ExitStack, *, slots: int | None, threads: int | None
) -> Subject:
    """Open a bundle on a provider.

    Raises:
        GpuError, PlanError, MissingExtraError, EngineError: the provider is missing or cannot run this bundle.
    """
    if provider == "tensorrt":
        return open_tensorrt(bundle, open_gpu(), owned)
    count = threads or available_threads()
    facts: dict[str, Any] = describe_machine(threads)
    cuda: Cuda | str = "the processor is the device"
    if provider == "cpu":
        engines: dict[Form, Engine | str] = {None: OrtEngine(bundle, num_slots=slots, threads=count)}
    else:
        engines = {False: OrtEngine(bundle, device="cuda", num_slots=slots, threads=count)}
        engines[True] = _or_reason(
            lambda: OrtEngine(bundle, device="cuda", num_slots=slots, threads=count, cuda_graphs=True)
        )
        cuda = _or_reason(open_cuda)
        facts |= {"gpu": cuda if isinstance(cuda, str) else asdict(cuda.facts())}
    for engine in engines.values():
        if not isinstance(engine, str):
            owned.callback(engine.close)
    return Subject(
        provider=provider, bundle=bundle, engines=engines, threads=count, machine=facts, owned=owned, cuda=cuda
    )


def open_tensorrt(bundle: Bundle, gpu: Gpu, owned: ExitStack) -> Subject:
    """Open the bundle's plan on a GPU twice: with CUDA graphs and without."""
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
    """Compute the work of a forward from a bundle's graph.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise missing_extra("onnx", extra="export") from None
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


def forward_work(manifest: Manifest, work: Work, *, slots: int, size: int, past: int) -> tuple[int, int]:
    """Bytes that a forward must read, and operations that it must do. Each row of a slot sees the rows before it."""
    geometry = manifest.geometry
    read = work.weight_bytes + slots * (past + size) * geometry.kv_bytes_per_token(manifest.precision)
    seen = size * past + size * (size + 1) // 2
    attention = 4 * geometry.num_layers * geometry.num_heads * geometry.head_dim * seen
    return read, slots * (2 * work.parameters * size + attention)


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


def require_size(engine: Engine, size: int) -> None:
    """Check that the engine can run a forward of exactly this n.

    Raises:
        EngineError: it cannot.
    """
    if size > (largest := engine.geometry.max_block_size):
        raise EngineError(f"the bundle takes blocks of {largest} at most: build it with --block-size {size}")
    if engine.has_device_loop and size not in engine.block_sizes:
        raise EngineError(f"the plan has no profile for it: cllm-export plan BUNDLE --block-size {size}")


def probe_forward(subject: Subject, form: Form, size: int, settings: Settings) -> Probe:
    engine = subject.engine(form)
    require_size(engine, size)
    for _ in range(3):
        engine.run_seconds = 0.0
        run_forward(engine, size, settings.past)
    repeats = repeats_for(engine.run_seconds)
    if engine.has_device_loop:
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
    """A function that enqueues a forward without its copies, over the data that the last forward left on the device."""
    cuda, stream, kv_length = engine.cuda, engine.stream, engine.kv_length_for(past + size)

    def enqueue() -> None:
        engine.enqueue_decode(size, kv_length)

    if not is_graph:
        return enqueue
    with cuda.capture(stream) as captured:
        enqueue()
    owned.callback(cuda.destroy_graph, captured[0])
    return lambda: cuda.launch(captured[0], stream)


def loop_options(size: int, k: int | None, settings: Settings) -> GenerateOptions:
    return GenerateOptions(
        method="jacobi",
        block_size=size,
        proposer="pad",
        ignore_eos=True,
        max_new_tokens=settings.tokens,
        forwards_per_sync=k,
    )


def some_prompt(engine: Engine, settings: Settings) -> list[int]:
    """A random prompt whose first decode forward has the write index ``past``."""
    draws = random.Random(0)  # noqa: S311 - any tokens will do
    return [draws.randrange(engine.geometry.vocab_size) for _ in range(settings.past + 1)]


def probe_loop(subject: Subject, key: Key, settings: Settings) -> Probe:
    engine, model = subject.engine(key.form), subject.model(key.form)
    require_size(engine, key.size)
    prompt, options = some_prompt(engine, settings), loop_options(key.size, key.forwards_per_sync, settings)

    def measure() -> dict[str, float]:
        took = model.generate(prompt, options).statistics
        figures = {"wall": took.decode_seconds / took.forwards, "tokens": float(took.new_tokens)}
        if not engine.has_device_loop:
            return figures | {"bare": took.engine_seconds / took.forwards}
        on_device = took.on_device
        waits = on_device.num_syncs if on_device else took.forwards
        in_vain = on_device.num_forwards - took.forwards if on_device else 0
        return figures | {"syncs": waits / took.new_tokens, "in_vain": float(in_vain)}

    return measure


def probe_decoding(model: Model, options: GenerateOptions, settings: Settings, given: list[tuple[int, ...]]) -> Probe:
    """A probe that decodes every prompt once. ``given`` receives the tokens of the last round."""
    prompts = [model.encode(prompt) for prompt in settings.prompts]

    def measure() -> dict[str, float]:
        given.clear()
        tokens, forwards, seconds = 0, 0, 0.0
        for prompt in prompts:
            room = min(settings.max_new_tokens, model.facts.max_length - len(prompt))
            made = model.generate(prompt, options, max_new_tokens=room)
            tokens += made.statistics.new_tokens
            forwards += made.statistics.forwards
            seconds += made.statistics.decode_seconds
            given.append(made.token_ids)
        return {"rate": tokens / seconds, "tokens_per_forward": tokens / forwards}

    return measure


def decoding_options(settings: Settings, k: int) -> dict[str, GenerateOptions]:
    jacobi = GenerateOptions(method="jacobi", block_size=settings.block_size)
    return {
        "autoregressive": GenerateOptions(method="autoregressive"),
        "jacobi": jacobi,
        f"jacobi, {k} forwards a sync": replace(jacobi, forwards_per_sync=k),
    }
