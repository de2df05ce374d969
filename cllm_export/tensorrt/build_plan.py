"""Build a TensorRT plan from a bundle, on the machine that will run it. Needs TensorRT and a GPU, not torch or onnx.

The network is the bundle's own graph, parsed unchanged and strongly typed, so precision is that of the ONNX file. There
is one optimization profile for prefill chunks and one for each block size n: the best kernel for one row is not the
best for sixteen. On success the plan is in its place, deserializes and runs.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, NamedTuple

from cllm_export.bundle.contract import LOGITS, Batch, TensorSpec, check_block_size, graph_inputs, graph_outputs
from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle, Manifest
from cllm_export.bundle.quantization import builds_for
from cllm_export.bundle.storage import sha256_of, staged_output
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import CllmExportError, GpuError, OptionError, PlanError
from cllm_export.runtime.decoding.batch import MIN_PREFILL_WIDTH
from cllm_export.tensorrt.engine import TrtEngine, platform_of
from cllm_export.tensorrt.graph import GraphSource, errors_of
from cllm_export.tensorrt.library import Gpu, Log, open_gpu, version_numbers
from cllm_export.tensorrt.memory import MemoryOptions, memory_figures
from cllm_export.tensorrt.plan_files import (
    HARDWARE,
    PLAN_MANIFEST_NAME,
    PLAN_NAME,
    Hardware,
    Plan,
    PlanManifest,
    PlanSettings,
    Platform,
    open_plan,
    plan_key,
    plans_of,
)

DEFAULT_CHUNK = 128
"""Tokens per prefill forward. This is wide enough to be compute-bound on most GPUs, and narrow enough to need little
scratch memory."""
SMALLEST_KV_LENGTH = 256
MEGABYTE = 1_000_000
BFLOAT16_SINCE = 8
"""Major compute capability of Ampere, the first generation with bf16 matrix units."""

Say = Callable[[str], None]
Shape = tuple[int, ...]


class Range(NamedTuple):
    """Least, likely and largest shape of an input in one profile."""

    least: Shape
    likely: Shape
    largest: Shape


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of ``cllm-export plan``. None and () mean the value that the bundle suggests."""

    GROUP: ClassVar[OptionGroup] = "Plan"

    batch_size: int | None = option(
        None, help="Number of slots: prompts that are decoded at once.", otherwise="the bundle's", minimum=1
    )
    block_sizes: tuple[int, ...] = option(
        (),
        help="Block size n, in tokens; repeat the option for several.",
        otherwise="1 and the bundle's own",
        minimum=1,
        flag="--block-size",
    )
    """n of each decode profile. By default 1, the bundle's block size, and 16, which batches use for prefill."""
    prefill_chunk: int | None = option(
        None, help="Number of prompt tokens that one forward reads.", otherwise="128", minimum=1
    )
    kv_lengths: tuple[int, ...] = option(
        (),
        help="KV rows that attention reads; repeat the option for several.",
        otherwise="256, 512 and so on",
        minimum=1,
        flag="--kv-length",
    )
    """KV lengths. By default they double from 256 up to the whole cache."""
    workspace: int | None = option(
        None, help="Scratch memory that the builder may use, such as 512MB.", otherwise="all", minimum=1
    )
    optimization_level: int = option(3, help="How long the builder looks for faster kernels.", minimum=0, maximum=5)
    hardware: Hardware = option(
        "same", help="GPUs that the plan runs on; a wider choice leaves fewer fast kernels.", choices=HARDWARE
    )
    logits: bool = option(True, help="Keep the logits, which sampling, grammars and log-probabilities need.")
    weight_streaming: bool = option(False, help="Let weights stay in host memory, which is slower.")
    strip_weights: bool = option(
        False, help="Write a small plan without weights, which are read from the bundle when it is loaded."
    )
    version_compatible: bool = option(
        False, help="Write a plan that later versions of TensorRT run too; it is larger and may be slower."
    )

    def __post_init__(self) -> None:
        check_options(self)


def settle(options: PlanOptions, manifest: Manifest) -> PlanSettings:
    """The settings for one bundle: the options, with every default filled in.

    Raises:
        OptionError: an option is out of range for the bundle.
    """
    fixed, geometry = manifest.graphs[GREEDY_GRAPH].fixed_shapes, manifest.geometry
    sizes = tuple(sorted(set(options.block_sizes))) or _default_sizes(manifest)
    kv_lengths = tuple(sorted(set(options.kv_lengths) | {geometry.cache_length})) if options.kv_lengths else ()
    batch, chunk = options.batch_size or manifest.batch_size, options.prefill_chunk
    if fixed:
        _require_pinned(options, fixed.block_size, fixed.batch_size)
        sizes, kv_lengths = (fixed.block_size,), (fixed.kv_length,)
        batch, chunk = fixed.batch_size, fixed.block_size
    check_block_size(sizes[-1], largest=geometry.max_block_size)
    if kv_lengths and kv_lengths[-1] > geometry.cache_length:
        raise OptionError(f"kv_lengths must be at most the cache's {geometry.cache_length} rows, got {kv_lengths[-1]}")
    return PlanSettings(
        batch_size=batch,
        block_sizes=sizes,
        prefill_chunk=min(chunk or DEFAULT_CHUNK, geometry.cache_length),
        kv_lengths=kv_lengths or default_kv_lengths(geometry.cache_length),
        workspace=options.workspace,
        optimization_level=options.optimization_level,
        logits=options.logits,
        weight_streaming=options.weight_streaming,
        strip_weights=options.strip_weights,
        version_compatible=options.version_compatible,
        hardware=options.hardware,
    )


def _default_sizes(manifest: Manifest) -> tuple[int, ...]:
    """Default block sizes: 1 for autoregressive decoding, the bundle's own, and the prefill width of a batch."""
    prefill = min(max(manifest.block_size, MIN_PREFILL_WIDTH), manifest.geometry.max_block_size)
    return tuple(sorted({1, manifest.block_size, prefill}))


def _require_pinned(options: PlanOptions, block_size: int, batch_size: int) -> None:
    asked = (*options.block_sizes, options.batch_size, options.prefill_chunk, *options.kv_lengths)
    if any(value is not None for value in asked) and (
        set(options.block_sizes) - {block_size} or options.batch_size not in (None, batch_size) or options.kv_lengths
    ):
        raise OptionError(
            f"this bundle is pinned to {batch_size} slots and blocks of {block_size}; leave batch_size, "
            "block_sizes and kv_lengths out, or build the bundle without fixed_shapes"
        )


def default_kv_lengths(cache_length: int) -> tuple[int, ...]:
    """Default KV lengths. Each is double the last, so a forward reads less than twice what it needs (or 256 rows).

    This keeps the number of captured graphs small.
    """
    kv_lengths, kv_length = [], SMALLEST_KV_LENGTH
    while kv_length < cache_length:
        kv_lengths.append(kv_length)
        kv_length *= 2
    return (*kv_lengths, cache_length)


def build_plan(
    bundle: Bundle,
    options: PlanOptions | None = None,
    *,
    gpu: Gpu | None = None,
    force: bool = False,
    say: Say | None = None,
) -> Plan:
    """Build the plan of a bundle for this machine, or return the existing one.

    ``say`` is called with single lines: the predicted memory of the build, and the time that each stage took.

    Raises:
        GpuError: there is no GPU, or it lacks the bundle's precision. Or TensorRT is too old or does not load.
        MissingExtraError: TensorRT or cuda-python is not installed.
        OptionError: an option is out of range for the bundle.
        PlanError: TensorRT refused the graph, could not build a plan, or the plan does not run.
        OutputError: the plan cannot be written.
    """
    _require_graph(bundle)
    settings = settle(options or PlanOptions(), bundle.manifest)
    gpu, say = gpu or open_gpu(), say or (lambda _: None)
    platform = platform_of(gpu)
    _require_precision(bundle, platform)
    target = plans_of(bundle) / plan_key(bundle.fingerprint, platform, settings)
    if (target / PLAN_MANIFEST_NAME).is_file() and not force:
        plan = open_plan(target)
        plan.check_file()
        say(f"{target} is there already, built for this bundle, machine and settings")
        return plan
    for line in predicted_memory(bundle, settings):
        say(line)
    with staged_output(target, force=True, marker=PLAN_MANIFEST_NAME) as staging:
        _write_plan(bundle, settings, platform, gpu, staging, say)
        _smoke(bundle, open_plan(staging), gpu, say)
    return open_plan(target)


def predicted_memory(bundle: Bundle, settings: PlanSettings) -> list[str]:
    """The predicted memory of a build, one line per figure."""
    figures = memory_figures(
        bundle,
        MemoryOptions(
            block_size=min(settings.block_sizes[-1], bundle.manifest.max_length),
            batch_size=settings.batch_size,
            prefill_chunk=settings.prefill_chunk,
            workspace=settings.workspace,
        ),
    )
    return [f"predicted {each.name}: {each.bytes / MEGABYTE:,.0f} MB ({each.how})" for each in figures]


def _require_graph(bundle: Bundle) -> None:
    """Refuse a graph with operators that TensorRT does not have, before any work is done."""
    quantization = bundle.manifest.quantization
    if quantization and "tensorrt" not in quantization.engines:
        raise PlanError(
            f"{bundle.path} is {quantization.scheme} for {', '.join(quantization.engines)}, with operators that "
            f"TensorRT has not: build the bundle with {builds_for('tensorrt')}"
        )


def _require_precision(bundle: Bundle, platform: Platform) -> None:
    if bundle.manifest.precision == "bf16" and version_numbers(platform.compute_capability)[0] < BFLOAT16_SINCE:
        raise GpuError(
            f"{bundle.path} is a bf16 bundle, and {platform.gpu} (compute capability {platform.compute_capability}) "
            f"has no bf16: build the bundle with precision='fp16', or use a GPU of {BFLOAT16_SINCE}.0 or newer"
        )


def _write_plan(bundle: Bundle, settings: PlanSettings, platform: Platform, gpu: Gpu, staging: Path, say: Say) -> None:
    """Parse the graph, configure and build the plan, and write the plan and its manifest."""
    log = Log(gpu.tensorrt)
    builder = gpu.tensorrt.Builder(log.logger)
    started = perf_counter()
    source = GraphSource(bundle)
    network, parser = _parse(source, gpu.tensorrt, builder, log)
    _check_network(bundle, network)
    if not settings.logits:
        _drop_logits(network)
    say(f"parsed in {perf_counter() - started:.1f} s")
    config = _configure(bundle, settings, gpu.tensorrt, builder)
    started = perf_counter()
    with _timing_cache(plans_of(bundle), platform, config):
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise PlanError(log.explain(f"TensorRT {gpu.version} could not build a plan of {bundle.path}"))
    say(f"built in {perf_counter() - started:.1f} s")
    path = staging / PLAN_NAME
    path.write_bytes(serialized)
    manifest = PlanManifest(
        bundle_fingerprint=bundle.fingerprint,
        platform=platform,
        settings=settings,
        size=path.stat().st_size,
        sha256=sha256_of(path),
    )
    (staging / PLAN_MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    del parser  # until here it must hold the network's weights; it reads some from the source's maps


def _parse(source: GraphSource, tensorrt: Any, builder: Any, log: Log) -> tuple[Any, Any]:
    """The network of the bundle's graph, and the parser that holds its weights."""
    strongly_typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = tensorrt.OnnxParser(network, log.logger)
    if not source.parse(parser):
        message = f"TensorRT {tensorrt.__version__} does not take {source.path}: {errors_of(parser)}"
        raise PlanError(log.explain(message))
    return network, parser


def _check_network(bundle: Bundle, network: Any) -> None:
    """Check that the network has the contract's inputs and outputs, and that TensorRT wants no input in host memory."""
    manifest = bundle.manifest
    tensors = {
        "inputs": [network.get_input(index) for index in range(network.num_inputs)],
        "outputs": [network.get_output(index) for index in range(network.num_outputs)],
    }
    for kind, specs in (("inputs", graph_inputs), ("outputs", graph_outputs)):
        expected = {spec.name for spec in specs(manifest.geometry, manifest.precision)}
        found = {tensor.name for tensor in tensors[kind]}
        if found != expected:
            raise PlanError(f"the parsed network has other {kind} than the contract: {sorted(found ^ expected)}")
    if shaping := [tensor.name for tensor in tensors["inputs"] if tensor.is_shape_tensor]:
        raise PlanError(
            f"TensorRT takes {shaping[0]} for a shape, which must lie in host memory: this graph cannot run on the "
            "device; build the bundle again with this version of cllm-export, and report it if that does not help"
        )


def _drop_logits(network: Any) -> None:
    outputs = (network.get_output(index) for index in range(network.num_outputs))
    network.unmark_output(next(tensor for tensor in outputs if tensor.name == LOGITS))


def _configure(bundle: Bundle, settings: PlanSettings, tensorrt: Any, builder: Any) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    if settings.workspace is not None:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, settings.workspace)
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # fp32 promises its precision; for speed there are fp16 and bf16
    for flag in _flags(settings):
        config.set_flag(getattr(tensorrt.BuilderFlag, flag))
    if settings.hardware != "same":
        level = getattr(tensorrt.HardwareCompatibilityLevel, _LEVELS[settings.hardware])
        config.hardware_compatibility_level = level
    for ranges in profiles_of(bundle.manifest, settings):
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise PlanError(f"TensorRT refuses the optimization profile {ranges}")
    return config


_LEVELS: dict[Hardware, str] = {"compute-capability": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}


def _flags(settings: PlanSettings) -> list[str]:
    """Names of the builder flags that the settings need.

    A stripped plan uses REFIT_IDENTICAL, not REFIT: it gets the same weights back that it was built with. According to
    TensorRT's notes, REFIT is known to lose biases.
    """
    wanted = {
        "WEIGHT_STREAMING": settings.weight_streaming,
        "STRIP_PLAN": settings.strip_weights,
        "REFIT_IDENTICAL": settings.strip_weights,
        "VERSION_COMPATIBLE": settings.version_compatible,
    }
    return [flag for flag, is_wanted in wanted.items() if is_wanted]


def profiles_of(manifest: Manifest, settings: PlanSettings) -> list[dict[str, Range]]:
    """Shapes of every input in each profile: the prefill profile, then one per n. No profile if shapes are fixed."""
    if manifest.graphs[GREEDY_GRAPH].fixed_shapes:
        return []
    specs = graph_inputs(manifest.geometry, manifest.precision)
    prefill = _ranges(specs, settings, n=(1, settings.prefill_chunk, settings.prefill_chunk), h=1)
    return [prefill, *(_ranges(specs, settings, n=(size, size, size), h=size) for size in settings.block_sizes)]


def _ranges(specs: list[TensorSpec], settings: PlanSettings, *, n: Shape, h: int) -> dict[str, Range]:
    kv_lengths = (settings.kv_lengths[0], settings.kv_lengths[len(settings.kv_lengths) // 2], settings.kv_lengths[-1])

    def shape(spec: TensorSpec, index: int) -> Shape:
        lengths = {"B": settings.batch_size, "n": n[index], "S": kv_lengths[index], "h": h}
        return tuple(lengths[axis] if isinstance(axis, str) else axis for axis in spec.shape)

    return {spec.name: Range(shape(spec, 0), shape(spec, 1), shape(spec, 2)) for spec in specs}


@contextlib.contextmanager
def _timing_cache(directory: Path, platform: Platform, config: Any) -> Iterator[None]:
    """Let the build use kernel timings of earlier builds on the same GPU and TensorRT version, and save its own."""
    name = f"{platform.gpu}-{platform.compute_capability}-{platform.tensorrt}"
    path = directory / f"timing-{''.join(letter if letter.isalnum() else '-' for letter in name)}.cache"
    known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, ignore_mismatch=False):  # a mismatch: start with an empty cache
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    yield
    measured = bytes(config.get_timing_cache().serialize())
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        file.write(measured)
    Path(file.name).replace(path)


def _smoke(bundle: Bundle, plan: Plan, gpu: Gpu, say: Say) -> None:
    """Load the plan, and run one prefill chunk and one block of each size."""
    started = perf_counter()
    try:
        with TrtEngine(bundle, plan=plan, gpu=gpu) as engine:
            slots = engine.num_slots
            chunk = engine.prefill_chunk
            engine.prefill(Batch([[0] * chunk] * slots, [chunk] * slots, [0] * slots))
            for size in plan.manifest.settings.block_sizes:
                forward = engine.forward(Batch([[0] * size] * slots, [1] * slots, [1] * slots))
                _check_smoke(forward.next_ids, forward.num_accepted, size, engine.geometry.vocab_size)
    except CllmExportError as error:
        raise PlanError(f"the plan was built and does not run: {error}") from error
    say(f"loaded and ran in {perf_counter() - started:.1f} s")


def _check_smoke(next_ids: list[list[int]], num_accepted: list[int], size: int, vocab_size: int) -> None:
    sound = all(1 <= count <= size for count in num_accepted)
    if not sound or not all(0 <= token < vocab_size for row in next_ids for token in row):
        raise PlanError(f"a block of {size} gave next_ids {next_ids} and num_accepted {num_accepted}")
