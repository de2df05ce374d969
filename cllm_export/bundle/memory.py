"""Memory that a bundle takes while it runs, part by part, from its manifest alone. Each part says how it is computed.

Weights and KV cache are exact. Activations are an upper bound, from the widest forward. The prefix cache is a limit
that fills up. The process itself is not in any part: Python, the engine's library, and CUDA's own context.
"""

from __future__ import annotations

from dataclasses import dataclass

from cllm_export.bundle.contract import BYTES, KV_DTYPE, Geometry, Precision
from cllm_export.bundle.manifest import Bundle

PREFIX_CACHE_BYTES = 256 << 20
"""Default size of the prefix cache: about ten thousand tokens of a small model, or two thousand of a 7 B model."""

PREFILL_CHUNK = 128
"""The most tokens of a prompt that one forward of an engine reads by default."""

LIVE_ROWS = 4
"""Vectors of the hidden size that a row holds at once: the residual, the normed input, and the input and output of
attention's output projection."""
FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of memory, in bytes."""

    name: str
    bytes: int
    how: str
    """The computation, in numbers."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The case that memory is computed for."""

    precision: Precision
    rows: int
    """Rows of a slot's KV cache."""
    batch_size: int
    block_size: int
    prefill_chunk: int

    @classmethod
    def of(cls, bundle: Bundle) -> Load:
        """The case that the bundle was built for."""
        manifest = bundle.manifest
        return cls(
            precision=manifest.precision,
            rows=manifest.geometry.cache_length,
            batch_size=manifest.batch_size,
            block_size=manifest.block_size,
            prefill_chunk=PREFILL_CHUNK,
        )


def running_figures(bundle: Bundle, load: Load) -> list[Figure]:
    """Weights, KV cache and activations of a running engine, in this order."""
    geometry, batch = bundle.manifest.geometry, load.batch_size
    return [
        _weights(bundle.weight_bytes, bundle.manifest.precision, load.precision),
        _kv_cache(geometry, load.precision, rows=load.rows, batch=batch),
        _activations(
            geometry,
            load.precision,
            rows=batch * max(load.block_size, load.prefill_chunk),
            head_rows=batch * load.block_size,
            parameters=bundle.weight_bytes // BYTES[KV_DTYPE[bundle.manifest.precision]],
        ),
    ]


def prefix_cache_figure() -> Figure:
    """The prefix cache, which every engine keeps in host memory."""
    return Figure(
        name="prefix cache",
        bytes=PREFIX_CACHE_BYTES,
        how="in host memory, up to prefix_cache_bytes of load, whose default this is; 0 keeps nothing",
    )


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


def _activations(geometry: Geometry, precision: Precision, *, rows: int, head_rows: int, parameters: int) -> Figure:
    """Memory of the widest forward's rows in one layer, plus the head's logits. Each layer reuses this memory."""
    projected = (geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_dim
    inner = inner_width(geometry, parameters)
    width = LIVE_ROWS * geometry.hidden_size + projected + 2 * inner
    size = BYTES[KV_DTYPE[precision]]
    logits = head_rows * geometry.vocab_size * (size + FLOAT32)
    how = (
        f"{rows:,} rows x ({LIVE_ROWS} x {geometry.hidden_size} hidden + {projected} for q, k, v + 2 x {inner} of the "
        f"MLP, told from the number of weights) x {size} bytes, and {head_rows} rows x {geometry.vocab_size} logits in "
        f"{size} and {FLOAT32} bytes; scores of attention are not in it, which fused kernels never store"
    )
    return Figure(name="activations", bytes=rows * width * size + logits, how=how)


def inner_width(geometry: Geometry, parameters: int) -> int:
    """Width of the MLP, from the number of a layer's weights without attention. It counts one embedding table only."""
    hidden, width = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    attention = hidden * (2 * width + 2 * geometry.num_kv_heads * geometry.head_dim)
    layer = (parameters - geometry.vocab_size * hidden) // geometry.num_layers - attention
    return max(0, layer // (3 * hidden))
