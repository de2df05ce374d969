"""The options of a plan, and the settings that they become for one bundle. Needs no TensorRT."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from cllm_export.bundle.contract import check_block_size
from cllm_export.bundle.manifest import GREEDY_GRAPH, Manifest
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.errors import OptionError
from cllm_export.runtime.decoding.batch import MIN_PREFILL_WIDTH
from cllm_export.tensorrt.library import LIBRARIES, LIBRARY_NAMES, TENSORRT_RTX, LibraryName
from cllm_export.tensorrt.plan_files import HARDWARE, Hardware, PlanSettings

DEFAULT_CHUNK = 128
"""Tokens per prefill forward. This is wide enough to be compute-bound on most GPUs, and narrow enough to need little
scratch memory."""
SMALLEST_KV_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of ``cllm-export plan``. None and () mean the value that the bundle suggests."""

    GROUP: ClassVar[OptionGroup] = "Plan"

    engine: LibraryName = option(
        "tensorrt",
        help="The library: tensorrt builds on the GPU that runs the plan, tensorrt-rtx on any machine.",
        choices=LIBRARY_NAMES,
    )
    targets: tuple[str, ...] = option(
        (),
        help="Generation of cards to build for, such as sm89; repeat the option for several. Only for tensorrt-rtx.",
        choices=TENSORRT_RTX.targets,
        flag="--for",
    )
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

    single_row_kernels: bool = option(
        False,
        help="Give n = 1 kernels of its own, which read a second copy of the linear weights.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        library = LIBRARIES[self.engine]
        if bool(self.targets) != bool(library.targets):
            advice = (
                f"builds for named generations: give targets, some of {', '.join(library.targets)}"
                if library.targets
                else "builds for the GPU of this machine: targets is for tensorrt-rtx, leave it out"
            )
            raise OptionError(f"{library.title} {advice}", fields=("targets",))
        for name, reason in library.lacks:
            if getattr(self, name) != next(field.default for field in fields(self) if field.name == name):
                raise OptionError(f"{library.title} takes no {name}: {reason}", fields=(name, "targets"))


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
        single_row_kernels=options.single_row_kernels,
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
