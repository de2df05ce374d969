"""Memory that a bundle needs on a device, and that the build of its plan needs. Each figure says how it is computed.

The figures come from the manifest alone, on any machine. Weights and KV cache are exact. Activations are an upper
bound, from the widest forward. The memory of TensorRT's builder is an estimate that no run has confirmed yet, and the
figure says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cllm_export.bundle.contract import BYTES, KV_DTYPE, PRECISIONS, Geometry, Precision, check_block_size
from cllm_export.bundle.manifest import Bundle
from cllm_export.checks import OptionGroup, check_options, option
from cllm_export.runtime.decoding.shared_options import block_size_option

LIVE_ROWS = 4
"""Vectors of the hidden size that a row holds at once: the residual, the normed input, and the input and output of
attention's output projection."""
FLOAT32 = 4


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
    prefill_chunk: int = option(128, help="Number of prompt tokens that one forward reads.", minimum=1)
    workspace: int | None = option(
        None, help="Scratch memory that the builder may use, such as 512MB.", otherwise="all", minimum=1
    )
    """Bytes that the builder may give to a kernel; None for all memory of the device."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of memory, in bytes."""

    name: str
    bytes: int
    how: str
    """The computation, in numbers."""


def memory_figures(bundle: Bundle, options: MemoryOptions) -> list[Figure]:
    """Memory of weights, KV cache and activations, of a running engine, and of a build on host and device.

    Raises:
        OptionError: an option is out of range for the bundle.
    """
    manifest, own = bundle.manifest, bundle.manifest.geometry
    precision = options.precision or manifest.precision
    block = options.block_size or manifest.block_size
    length, batch = options.max_length or manifest.max_length, options.batch_size or manifest.batch_size
    check_block_size(block, largest=own.max_block_size)
    weights = _weights(bundle.weight_bytes, manifest.precision, precision)
    cache = _kv_cache(own, precision, rows=length + own.max_block_size - 1, batch=batch)
    widest = max(block, options.prefill_chunk)
    activations = _activations(
        own, precision, rows=batch * widest, head_rows=batch * block, parameters=_parameters(bundle)
    )
    running = Figure(
        name="running engine",
        bytes=weights.bytes + cache.bytes + activations.bytes,
        how="weights + KV cache + activations; CUDA's own context, some hundred MB, is not in it",
    )
    return [weights, cache, activations, running, *_build(weights, running, options.workspace)]


def _weights(stored: int, own: Precision, wanted: Precision) -> Figure:
    mine, other = BYTES[KV_DTYPE[own]], BYTES[KV_DTYPE[wanted]]
    how = f"{stored:,} bytes of the bundle's weights" + ("" if mine == other else f", x {other} / {mine} for {wanted}")
    return Figure(name="weights", bytes=stored * other // mine, how=how)


def _kv_cache(geometry: Geometry, precision: Precision, *, rows: int, batch: int) -> Figure:
    per_token = geometry.kv_bytes_per_token(precision)
    how = (
        f"2 x {geometry.num_layers} layers x {geometry.num_kv_heads} heads x {geometry.head_dim} x "
        f"{BYTES[KV_DTYPE[precision]]} bytes = {per_token:,} a token; x {rows:,} rows "
        f"(max length + largest block - 1) x {batch} slots"
    )
    return Figure(name="KV cache", bytes=per_token * rows * batch, how=how)


def _parameters(bundle: Bundle) -> int:
    return bundle.weight_bytes // BYTES[KV_DTYPE[bundle.manifest.precision]]


def _activations(geometry: Geometry, precision: Precision, *, rows: int, head_rows: int, parameters: int) -> Figure:
    """Memory of the widest forward's rows in one layer, plus the head's logits. Each layer reuses this memory."""
    projected = (geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_dim
    inner = _inner_width(geometry, parameters)
    width = LIVE_ROWS * geometry.hidden_size + projected + 2 * inner
    size = BYTES[KV_DTYPE[precision]]
    logits = head_rows * geometry.vocab_size * (size + FLOAT32)
    how = (
        f"{rows:,} rows x ({LIVE_ROWS} x {geometry.hidden_size} hidden + {projected} for q, k, v + 2 x {inner} of the "
        f"MLP, told from the number of weights) x {size} bytes, and {head_rows} rows x {geometry.vocab_size} logits in "
        f"{size} and {FLOAT32} bytes; scores of attention are not in it, which fused kernels never store"
    )
    return Figure(name="activations", bytes=rows * width * size + logits, how=how)


def _inner_width(geometry: Geometry, parameters: int) -> int:
    """Width of the MLP, from the number of a layer's weights without attention. It counts one embedding table only."""
    hidden, width = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    attention = hidden * (2 * width + 2 * geometry.num_kv_heads * geometry.head_dim)
    layer = (parameters - geometry.vocab_size * hidden) // geometry.num_layers - attention
    return max(0, layer // (3 * hidden))


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
