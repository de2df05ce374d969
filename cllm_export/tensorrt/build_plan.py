"""Build a TensorRT plan from a bundle. Needs one of the two TensorRT libraries, and neither torch nor onnx.

TensorRT builds on the GPU that will run the plan. TensorRT for RTX builds on any machine, for named generations. The
network is the bundle's own graph, parsed unchanged and strongly typed, so precision is that of the ONNX file. There
is one optimization profile for prefill chunks and one for each block size n: the best kernel for one row is not the
best for sixteen. On success the plan is in its place; if there is a GPU, it deserializes and runs.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from cllm_export.bundle.contract import LOGITS, TensorSpec, graph_inputs, graph_outputs
from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle, Manifest
from cllm_export.bundle.quantization import builds_for
from cllm_export.bundle.storage import sha256_of, staged_output
from cllm_export.errors import CllmExportError, PlanError
from cllm_export.tensorrt.engine import TrtEngine, platform_of
from cllm_export.tensorrt.graph import GraphSource, errors_of
from cllm_export.tensorrt.library import (
    LIBRARIES,
    Gpu,
    Library,
    Log,
    import_library,
    open_gpu,
)
from cllm_export.tensorrt.memory import memory_figures, options_of, require_host_memory
from cllm_export.tensorrt.plan_contents import profile_names, read_contents
from cllm_export.tensorrt.plan_files import (
    PLAN_MANIFEST_NAME,
    PLAN_NAME,
    Hardware,
    Plan,
    PlanManifest,
    PlanSettings,
    Platform,
    Targets,
    file_name_of,
    open_plan,
    plan_key,
    plans_of,
    this_system,
)
from cllm_export.tensorrt.plan_options import PlanOptions, settle
from cllm_export.tensorrt.smoke import run_smoke

MEGABYTE = 1_000_000

Say = Callable[[str], None]
Shape = tuple[int, ...]


class Range(NamedTuple):
    """Least, likely and largest shape of an input in one profile."""

    least: Shape
    likely: Shape
    largest: Shape


def build_plan(
    bundle: Bundle,
    options: PlanOptions | None = None,
    *,
    gpu: Gpu | None = None,
    force: bool = False,
    say: Say | None = None,
) -> Plan:
    """Build the plan of a bundle for this machine or for the targets, or return the existing one.

    ``say`` is called with single lines: the predicted memory of the build, the time that each stage took, and what the
    plan holds.

    Raises:
        GpuError: there is no GPU, or it lacks the bundle's precision. Or TensorRT is too old or does not load.
        MissingExtraError: the library or cuda-python is not installed.
        OptionError: an option is out of range for the bundle.
        PlanError: TensorRT refused the graph, could not build a plan, or the plan does not run.
        OutputError: the plan cannot be written.
    """
    options, say = options or PlanOptions(), say or (lambda _: None)
    library = LIBRARIES[options.engine]
    _require_graph(bundle)
    settings = settle(options, bundle.manifest)
    library.require_formats(f"{bundle.path} is", formats_of(bundle.manifest), options.targets)
    tensorrt, on_gpu = open_builder(options, gpu=gpu)
    if on_gpu is None:
        targets = tuple(sorted(set(options.targets), key=library.targets.index))
        built_for: Platform | Targets = Targets(
            targets=targets, tensorrt=str(tensorrt.__version__), system=this_system(), engine=library.name
        )
    else:
        built_for = platform_of(on_gpu)
        library.require_formats(f"{bundle.path} is", formats_of(bundle.manifest), (built_for.generation,))
    target = plans_of(bundle) / plan_key(bundle.fingerprint, built_for, settings)
    if (target / PLAN_MANIFEST_NAME).is_file() and not force:
        plan = open_plan(target)
        plan.check_file()
        say(f"{target} is there already, built for this bundle, {library.title} and settings")
        return plan
    if bundle.tensorrt_graph == GREEDY_GRAPH:
        say("this bundle has no graph for TensorRT: build it again, for a plan of fewer kernels")
    for line in predicted_memory(bundle, settings):
        say(line)
    require_host_memory(bundle, settings)
    with staged_output(target, force=True, marker=PLAN_MANIFEST_NAME) as staging:
        _Build(bundle, settings, built_for, tensorrt, say).write(staging)
        if on_gpu is not None:
            _smoke(bundle, open_plan(staging), on_gpu, say)
    return open_plan(target)


def open_builder(options: PlanOptions, *, gpu: Gpu | None = None) -> tuple[Any, Gpu | None]:
    """The Python module that builds a plan, and the GPU to build on. There is none if the plan is for named targets.

    Raises:
        GpuError: there is no GPU and the library needs one, or it is too old or does not load.
        MissingExtraError: the library or cuda-python is not installed.
    """
    library = LIBRARIES[options.engine]
    if library.targets:
        return import_library(library), None
    gpu = gpu or open_gpu(library)
    return gpu.tensorrt, gpu


def predicted_memory(bundle: Bundle, settings: PlanSettings) -> list[str]:
    """The predicted memory of a build, one line per figure."""
    figures = memory_figures(bundle, options_of(settings, bundle))
    return [f"predicted {each.name}: {each.bytes / MEGABYTE:,.0f} MB ({each.how})" for each in figures]


def formats_of(manifest: Manifest) -> tuple[str, ...]:
    """The number formats that a bundle's forwards need of a card."""
    quantization = manifest.quantization
    return (manifest.precision, *([quantization.scheme] if quantization else []))


def copies_left(manifest: PlanManifest) -> list[str]:
    """What a forward of each profile copies of the cache, one line for each profile that copies anything."""
    contents, settings = manifest.contents, manifest.settings
    if contents is None:
        return []
    names = profile_names(settings.block_sizes, len(contents.profiles))
    return [
        f"{name}: a forward copies keys and values of {settings.kv_lengths[-1]:,} rows in {profile.cache_copies} "
        f"kernels, {profile.cache_copy_bytes / MEGABYTE:,.1f} MB read and written"
        for name, profile in zip(names, contents.profiles, strict=True)
        if profile.cache_copies
    ]


def _require_graph(bundle: Bundle) -> None:
    """Refuse a graph with operators that TensorRT does not have, before any work is done."""
    quantization = bundle.manifest.quantization
    if quantization and "tensorrt" not in quantization.engines:
        raise PlanError(
            f"{bundle.path} is {quantization.scheme} for {', '.join(quantization.engines)}, with operators that "
            f"TensorRT has not: build the bundle with {builds_for('tensorrt')}"
        )


class _Build:
    """One build: parses the graph, configures the builder, and writes the plan and its manifest."""

    def __init__(
        self, bundle: Bundle, settings: PlanSettings, built_for: Platform | Targets, tensorrt: Any, say: Say
    ) -> None:
        self._bundle, self._settings, self._built_for = bundle, settings, built_for
        self._tensorrt, self._say = tensorrt, say
        self._library = LIBRARIES[built_for.engine]
        self._log = Log(tensorrt)
        self._builder = tensorrt.Builder(self._log.logger)

    def write(self, staging: Path) -> None:
        bundle, title = self._bundle, f"{self._library.title} {self._tensorrt.__version__}"
        started = perf_counter()
        source = GraphSource(bundle)
        network, parser = self._parse(source, title)
        _check_network(bundle, network)
        allow_decomposing(network, self._tensorrt)
        if not self._settings.logits:
            _drop_logits(network)
        self._say(f"parsed in {perf_counter() - started:.1f} s")
        started = perf_counter()
        serialized = self._build(network)
        if serialized is None:
            raise PlanError(self._log.explain(f"{title} could not build a plan of {bundle.path}"))
        self._say(f"built in {perf_counter() - started:.1f} s")
        path = staging / PLAN_NAME
        path.write_bytes(serialized)
        manifest = PlanManifest(
            bundle_fingerprint=bundle.fingerprint,
            platform=self._built_for,
            settings=self._settings,
            size=path.stat().st_size,
            sha256=sha256_of(path),
            contents=read_contents(self._log.report, kv_length=self._settings.kv_lengths[-1]),
        )
        (staging / PLAN_MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        for line in copies_left(manifest):
            self._say(line)
        del parser  # until here it must hold the network's weights; it reads some from the source's maps

    def _parse(self, source: GraphSource, title: str) -> tuple[Any, Any]:
        """The network of the bundle's graph, and the parser that holds its weights."""
        strongly_typed = 1 << int(self._tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._builder.create_network(strongly_typed)
        parser = self._tensorrt.OnnxParser(network, self._log.logger)
        if not source.parse(parser):
            raise PlanError(self._log.explain(f"{title} does not take {source.path}: {errors_of(parser)}"))
        return network, parser

    def _build(self, network: Any) -> Any:
        config = _configure(self._bundle, self._settings, self._library, self._tensorrt, self._builder)
        if isinstance(self._built_for, Targets):
            _set_targets(config, self._built_for.targets, self._tensorrt)
            return self._builder.build_serialized_network(network, config)
        with _timing_cache(plans_of(self._bundle), self._built_for, config):
            return self._builder.build_serialized_network(network, config)


def allow_decomposing(network: Any, tensorrt: Any) -> int:
    """Let TensorRT spell out each attention that it has no fused kernel for. Returns the number of attentions.

    Without this, fp32 does not build. An attention that has a kernel keeps it.
    """
    found = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == tensorrt.LayerType.ATTENTION_INPUT:
            layer.__class__ = tensorrt.IAttentionInputLayer  # the bindings hand out the base class
            layer.attention.decomposable = True
            found += 1
    return found


def _set_targets(config: Any, targets: Sequence[str], tensorrt: Any) -> None:
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if not config.set_compute_capability(getattr(tensorrt.ComputeCapability, target.upper()), index):
            raise PlanError(f"the library refuses the target {target}")


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


def _configure(bundle: Bundle, settings: PlanSettings, library: Library, tensorrt: Any, builder: Any) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    if settings.workspace is not None:
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, settings.workspace)
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # fp32 promises its precision; for speed there are fp16 and bf16
    for flag in (*library.flags, *_flags(settings)):
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
    sizes = ((size, _rows_of(size, settings)) for size in settings.block_sizes)
    return [prefill, *(_ranges(specs, settings, n=rows, h=size) for size, rows in sizes)]


def _rows_of(size: int, settings: PlanSettings) -> Shape:
    """Least, likely and largest n of a block size's profile.

    A profile of one row alone gets kernels with a weight layout of their own, so that the plan holds every linear
    weight twice. A range of one or two rows shares the layout of the other profiles.
    """
    shares_layout = size == 1 and not settings.single_row_kernels
    return (1, 1, 2) if shares_layout else (size, size, size)


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
    path = directory / f"timing-{file_name_of(name)}.cache"
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
    started = perf_counter()
    try:
        with TrtEngine(bundle, plan=plan, gpu=gpu) as engine:
            run_smoke(engine)
    except CllmExportError as error:
        raise PlanError(f"the plan was built and does not run: {error}") from error
    say(f"loaded and ran in {perf_counter() - started:.1f} s")
