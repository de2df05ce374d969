"""Memory that a bundle needs on a device, and that the build of its plan needs. Each figure says how it is computed.

The figures come from the manifest alone, on any machine: see ``bundle/memory.py``. The memory of TensorRT's builder is
an estimate that no run has confirmed yet, and the figure says so. The verdict compares them with a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cllm_export.bundle.contract import PRECISIONS, Precision, check_block_size
from cllm_export.bundle.manifest import GREEDY_GRAPH, Bundle
from cllm_export.bundle.memory import PREFILL_CHUNK, Figure, Load, prefix_cache_figure, running_figures
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import CllmExportError, OptionError
from cllm_export.runtime.decoding.shared_options import block_size_option
from cllm_export.runtime.engines.cuda import open_cuda
from cllm_export.runtime.engines.machine import total_memory


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
    parts = running_figures(bundle, _load(bundle, options))
    running = Figure(
        name="running engine",
        bytes=sum(part.bytes for part in parts),
        how="weights + KV cache + activations; CUDA's own context, some hundred MB, is not in it",
    )
    return [*parts, running, prefix_cache_figure(), *_build(parts[0], running, options.workspace)]


def judge_memory(bundle: Bundle, options: MemoryOptions) -> Verdict:
    """Whether a device has the memory: the one that ``device_memory`` describes, else this machine's.

    Raises:
        OptionError: an option is out of range for the bundle.
    """
    load = _load(bundle, options)
    weights, cache, activations = (figure.bytes for figure in running_figures(bundle, load))
    needed, (there, whose) = weights + cache + activations, _device_memory(options.device_memory)
    why = f"a running engine needs {needed:,} bytes, and {whose} has {there:,}"
    if needed <= there:
        return Verdict(fits=True, needed=needed, device_memory=there, why=why)
    slots = (there - weights) * load.batch_size // (cache + activations)
    fewer = f"; {slots} slots would fit" if slots > 0 else "; not even one slot would fit"
    advice = "give a smaller batch_size, max_length or prefill_chunk, or another precision"
    return Verdict(fits=False, needed=needed, device_memory=there, why=f"{why}{fewer}: {advice}")


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


def _build(weights: Figure, running: Figure, workspace: int | None) -> Sequence[Figure]:
    host = Figure(
        name="build, host",
        bytes=2 * weights.bytes,
        how="2 x weights, the network's and the plan's copy, which TensorRT's documentation names as the least; "
        "the builder's own memory comes on top (an estimate: no build was measured)",
    )
    scratch = "as much as the device has left for scratch" if workspace is None else f"{workspace:,} bytes of workspace"
    device = Figure(
        name="build, device",
        bytes=running.bytes + (workspace or 0),
        how=f"a running engine's memory, for kernels are timed on buffers of the real size, and {scratch} "
        "(an estimate: no build was measured)",
    )
    return host, device
