"""Memory that a bundle needs on a device, and that the build of its plan needs. Each figure says how it is computed.

The figures come from the manifest alone, on any machine: see ``bundle/memory.py``. The host memory of a build follows
what builds of TensorRT for RTX took (``benchmarks/plan_size.py``). Its device memory is an estimate that no run has
confirmed yet, and the figure says so. The verdict compares them with a device. Of each plan that is there already, the
figures are those that its builder measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cllm_export.bundle.contract import BYTES, KV_DTYPE, PRECISIONS, Precision, check_block_size
from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle
from cllm_export.bundle.memory import (
    PREFILL_CHUNK,
    Figure,
    Load,
    inner_width,
    prefix_cache_figure,
    running_figures,
)
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import CllmExportError, OptionError, PlanError
from cllm_export.runtime.decoding.shared_options import block_size_option
from cllm_export.runtime.engines.cuda import open_cuda
from cllm_export.runtime.engines.machine import available_memory, total_memory
from cllm_export.tensorrt.plan_contents import profile_names
from cllm_export.tensorrt.plan_files import Plan, PlanSettings

BUILDER_BYTES = 300_000_000
"""Host memory of the builder's process besides anything of the size of the weights."""
WEIGHT_COPIES, PAGES = 3.1, 1.0
"""Host memory of a build over the weights, and how much of it are pages of weight files, which the system may drop."""
EXTRA_COPIES = 2.0
"""Host memory of a build over the bytes of a second copy of weights, which the plan then holds."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The case that the figures are for. None means the bundle's own value."""

    GROUP: ClassVar[OptionGroup] = "Plan"

    precision: Precision | None = option(
        None, help="Number format to plan for.", otherwise="the bundle's own", choices=PRECISIONS
    )
    block_size: int | None = block_size_option()
    max_length: int | None = option(
        None,
        help="Largest number of tokens of a prompt and its new tokens.",
        otherwise="the bundle's own",
        minimum=1,
    )
    batch_size: int | None = option(
        None, help="Number of slots: prompts that are decoded at once.", otherwise="the bundle's", minimum=1
    )
    prefill_chunk: int = option(PREFILL_CHUNK, help="Number of prompt tokens that one forward reads.", minimum=1)
    workspace: int | None = option(
        None, help="Scratch memory that the builder may use, such as 512MB.", otherwise="all", minimum=1
    )
    """Bytes that the builder may give to a kernel; None for all memory of the device."""
    single_row_kernels: bool = option(
        False, help="Plan for kernels of its own for n = 1, which read a second copy of linear weights."
    )
    device_memory: int | None = option(
        None, help="Memory of the device, such as 8GB.", otherwise="that of this machine", minimum=1
    )
    """Bytes that the verdict is about."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a device has the memory that a running engine needs."""

    fits: bool
    needed: int
    """Bytes."""
    device_memory: int
    """Bytes."""
    why: str
    """Both in a sentence, and what to do if it does not fit."""


def memory_figures(bundle: Bundle, options: MemoryOptions) -> list[Figure]:
    """Memory of weights, KV cache and activations, of a running engine, and of a build on host and device.

    Raises:
        OptionError: an option is out of range for the bundle.
    """
    parts = _running_parts(bundle, options)
    running = Figure(
        name="running engine",
        bytes=sum(part.bytes for part in parts),
        how=f"{' + '.join(part.name for part in parts)}; CUDA's own context, some hundred MB, is not in it",
    )
    device = _build_on_device(running, options.workspace)
    return [*parts, running, prefix_cache_figure(), _build_on_host(parts), device]


def plan_figures(plan: Plan) -> list[Figure]:
    """What the builder of a plan measured: memory of its weights, and of a context of each profile. Empty if nothing.

    Contexts share one scratch buffer, so that only the largest counts.
    """
    manifest, contents = plan.manifest, plan.manifest.contents
    if contents is None:
        return []
    names = profile_names(manifest.settings.block_sizes, len(contents.profiles))
    profiles = zip(names, contents.profiles, strict=True)
    by = f"measured by the builder of {manifest.built_by} for {manifest.built_for}"
    return [
        Figure(name=f"plan {manifest.key}: weights", bytes=contents.weight_bytes, how=by),
        Figure(
            name=f"plan {manifest.key}: scratch",
            bytes=max(profile.device_bytes for profile in contents.profiles),
            how=f"{by}, the largest of " + ", ".join(f"{name}: {each.device_bytes:,}" for name, each in profiles),
        ),
    ]


def require_host_memory(bundle: Bundle, settings: PlanSettings) -> None:
    """Refuse a build that would run out of this machine's memory, before it starts.

    Pages of weight files are not counted, because the system may drop them.

    Raises:
        PlanError: the build needs more than is free.
    """
    parts, free = _running_parts(bundle, options_of(settings, bundle)), available_memory()
    needed = _build_on_host(parts).bytes - round(PAGES * parts[0].bytes)
    if free is None or needed <= free:
        return
    advice = ", or leave single_row_kernels out" if settings.single_row_kernels else ""
    raise PlanError(
        f"building this plan needs about {needed:,} bytes of this machine's memory, and {free:,} are free: close other "
        f"programs, build it on a larger machine{advice}, or build the bundle in a smaller precision"
    )


def options_of(settings: PlanSettings, bundle: Bundle) -> MemoryOptions:
    """The case that a plan is built for."""
    return MemoryOptions(
        block_size=min(settings.block_sizes[-1], bundle.manifest.max_length),
        batch_size=settings.batch_size,
        prefill_chunk=settings.prefill_chunk,
        workspace=settings.workspace,
        single_row_kernels=settings.single_row_kernels and 1 in settings.block_sizes,
    )


def judge_memory(bundle: Bundle, options: MemoryOptions) -> Verdict:
    """Whether a device has the memory: the one that ``device_memory`` describes, else this machine's.

    Raises:
        OptionError: an option is out of range for the bundle.
    """
    load = _load(bundle, options)
    parts = {figure.name: figure.bytes for figure in _running_parts(bundle, options)}
    needed, (there, whose) = sum(parts.values()), _device_memory(options.device_memory)
    why = f"a running engine needs {needed:,} bytes, and {whose} has {there:,}"
    if needed <= there:
        return Verdict(fits=True, needed=needed, device_memory=there, why=why)
    of_slots = parts["KV cache"] + parts["activations"]
    slots = (there - needed + of_slots) * load.batch_size // of_slots
    fewer = f"; {slots} slots would fit" if slots > 0 else "; not even one slot would fit"
    advice = "give a smaller batch_size, max_length or prefill_chunk, or another precision"
    return Verdict(fits=False, needed=needed, device_memory=there, why=f"{why}{fewer}: {advice}")


def _running_parts(bundle: Bundle, options: MemoryOptions) -> list[Figure]:
    """Weights, a second copy of some if n = 1 has kernels of its own, KV cache and activations."""
    weights, *others = running_figures(bundle, _load(bundle, options))
    return [weights, *([_second_copy(bundle, weights)] if options.single_row_kernels else []), *others]


def _second_copy(bundle: Bundle, weights: Figure) -> Figure:
    """Weights that kernels for one row read in a layout of their own: those of all layers, if weights are copied.

    Linked weights have the checkpoint's order of axes. There the projections behind attention and behind the MLP's gate
    share one layout.
    """
    geometry, quantization = bundle.manifest.geometry, bundle.manifest.quantization
    parameters = bundle.weight_bytes // BYTES[KV_DTYPE[bundle.manifest.precision]]
    attention = (geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_dim
    inner, matrices, parts = inner_width(geometry, parameters), 2, "q, k, v"
    if not bundle.manifest.linked_weights:
        attention, matrices, parts = attention + geometry.num_heads * geometry.head_dim, 3, "q, k, v, o"
    copied = geometry.num_layers * geometry.hidden_size * (attention + matrices * inner)
    if quantization and quantization.scheme == "int4":
        copied = 0
    how = (
        f"{geometry.num_layers} layers x {geometry.hidden_size} hidden x ({attention} for {parts} + "
        f"{matrices} x {inner} of the MLP, told from the number of weights, a head of its own included) of "
        f"{parameters:,} weights; int4 weights have no second copy"
    )
    return Figure(name="second copy", bytes=weights.bytes * copied // parameters, how=how)


def _load(bundle: Bundle, options: MemoryOptions) -> Load:
    manifest, own = bundle.manifest, bundle.manifest.geometry
    block = options.block_size or manifest.block_size
    length, batch = options.max_length or manifest.max_length, options.batch_size or manifest.batch_size
    check_block_size(block, largest=own.max_block_size)
    if length > manifest.max_length:
        raise OptionError(
            f"max_length must be at most the bundle's {manifest.max_length}, got {length}: build the bundle with a "
            "larger max_length first",
            fields=("max_length",),
        )
    if block > length:
        raise OptionError(
            f"block_size must be at most max_length, got a block of {block} and {length} tokens: give a smaller "
            "block_size, or a larger max_length",
            fields=("block_size", "max_length"),
        )
    if manifest.quantization and options.precision not in (None, manifest.precision):
        raise OptionError(
            f"precision is for bundles that are not quantised, and this one has {manifest.quantization.scheme} weights "
            f"and computes in {manifest.precision}: leave precision out",
            fields=("precision",),
        )
    if fixed := manifest.graphs[GREEDY_GRAPH].fixed_shapes:
        pinned = {"batch_size": fixed.batch_size, "block_size": fixed.block_size, "max_length": manifest.max_length}
        for name, value in pinned.items():
            if getattr(options, name) not in (None, value):
                raise OptionError(
                    f"this bundle is pinned to {name} {value}, got {getattr(options, name)}: leave {name} out, or "
                    "build the bundle without fixed_shapes",
                    fields=(name,),
                )
    return Load(
        precision=options.precision or manifest.precision,
        rows=length + own.max_block_size - 1,
        batch_size=batch,
        block_size=block,
        prefill_chunk=options.prefill_chunk,
    )


def _device_memory(given: int | None) -> tuple[int, str]:
    """The memory to judge by, in bytes, and whose it is."""
    if given is not None:
        return given, "the given device"
    try:
        facts = open_cuda().facts()
    except (CllmExportError, RuntimeError, OSError):
        return total_memory(), "this machine, where no GPU can be asked,"
    return facts.memory, f"this machine's {facts.name}"


def _build_on_host(parts: Sequence[Figure]) -> Figure:
    weights = parts[0].bytes
    second = next((part.bytes for part in parts if part.name == "second copy"), 0)
    again = f" + {EXTRA_COPIES} x the second copy" if second else ""
    return Figure(
        name="build, host",
        bytes=BUILDER_BYTES + round(WEIGHT_COPIES * weights + EXTRA_COPIES * second),
        how=f"{BUILDER_BYTES:,} + {WEIGHT_COPIES} x weights{again}, as builds of TensorRT for RTX took for 1.1 B "
        f"weights; {PAGES} x weights of it are pages of files, which the system may drop",
    )


def _build_on_device(running: Figure, workspace: int | None) -> Figure:
    scratch = "as much as the device has left for scratch" if workspace is None else f"{workspace:,} bytes of workspace"
    return Figure(
        name="build, device",
        bytes=running.bytes + (workspace or 0),
        how=f"a running engine's memory, for kernels are timed on buffers of the real size, and {scratch} "
        "(an estimate: no build was measured); TensorRT for RTX builds without a device",
    )
