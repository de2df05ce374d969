"""The engine contract: name, dtype and shape of every graph input and output. Only this module defines them.

Shape legend, used in docstrings everywhere:

    B  slots: rows of the batch, each with its own request and write index
    n  tokens of the block (or of a chunk of the prompt)
    h  rows that the head is computed for: n in decode, 1 in prefill
    S  visible KV length: how many cache rows attention reads
    C  cache length: how many rows the KV cache has
    K  key/value heads      D  head dimension      L  layers      V  vocabulary

One forward over a block:

    input_ids      [B, n]  the block: committed tokens whose KV is not stored yet, then the draft; or a prompt chunk
    num_committed  [B]     number of leading tokens of the block that are known to be right; 0 marks an idle slot
    write_index    [B]     number of valid KV rows of each slot. The block's KV is written from there, in idle slots too
    kv_positions   [S]     0..S-1; its length sets the KV length, its values build the mask
    head_rows      [h]     rows that the head is computed for: 0..n-1 in decode, only 0 in prefill
    past_key.l, past_value.l        [B, K, C, D]

    next_ids       [B, h]  greedy token after each row in head_rows
    num_accepted   [B]     number of rows that are right; the write index advances by exactly this. 0 for an idle slot
    logits         [B h, V]  float32, slot by slot, as the model returns them; fetched only if some slot samples
    present_key.l, present_value.l  [B, K, C, D], bound to the same memory as the past

With c committed tokens, the new tokens of a slot are ``next_ids[c - 1 : num_accepted]``.

The lookahead graph has two more inputs, between ``head_rows`` and the past. All slots share them, because the rows of
a block relate to each other in the same way in every slot.

    row_offsets    [n]     row i sits at position write_index + row_offsets[i]
    row_mask       [n, n]  bool: row i sees row j of the block; it sees every row of the cache below write_index

Head rows come first, so their KV lies where later forwards look for it. The KV of all other rows is dead at once. The
graph's ``num_accepted`` compares each row with the row before it, which is meaningful only for the leading rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from cllm_export.checks import require_at_least
from cllm_export.errors import EngineError, OptionError

CONTRACT_VERSION = 2
"""Increased whenever an engine built for the previous contract would run a new graph wrongly."""

OPSET = 24
"""ONNX opset of every graph: the newest that TensorRT 10.15 parses, and the first with TensorScatter."""

LOGITS = "logits"
"""The output that an engine need not fetch. A plan for greedy decoding only may drop it."""

Precision = Literal["fp32", "fp16", "bf16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

DType = Literal["int64", "float32", "float16", "bfloat16", "bool"]

KV_DTYPE: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

BYTES: dict[DType, int] = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}


@dataclass(frozen=True, kw_only=True)
class FixedShapes:
    """The shapes that a graph is pinned to: B, n and S are numbers in the graph file itself."""

    batch_size: int
    block_size: int
    kv_length: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "block_size", "kv_length"):
            require_at_least(name, getattr(self, name), 1)


def check_block_size(size: object, *, largest: int | None = None, pinned: int | None = None) -> int:
    """Return the block size n if a model can run blocks of that size.

    Args:
        size: the requested n.
        largest: the largest n of the model.
        pinned: the only n of an engine with fixed shapes.

    Raises:
        OptionError: ``size`` is not an integer, or out of range.
    """
    if not isinstance(size, int):
        raise OptionError(f"block_size must be an integer or 'auto', got {size!r}", fields=("block_size",))
    require_at_least("block_size", size, 1)
    if pinned is not None and size != pinned:
        raise OptionError(
            f"block_size must be {pinned}, which this engine is pinned to, got {size}", fields=("block_size",)
        )
    if largest is not None and size > largest:
        raise OptionError(
            f"block_size must be at most {largest} for this model, got {size}: choose a smaller one",
            fields=("block_size",),
        )
    return size


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The numbers that determine the shapes of a model's engine."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    cache_length: int
    """C: rows of the KV cache and of the RoPE table, ``max_length + max_block_size - 1``."""
    max_block_size: int
    """The largest n of a decode forward. ``cache_length`` allows for it, so the length that fits never depends on n."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            require_at_least(name, getattr(self, name), 1)

    def kv_bytes_per_token(self, precision: Precision) -> int:
        """Bytes of KV cache that one token of one slot takes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES[KV_DTYPE[precision]]

    def cache_bytes(self, precision: Precision) -> int:
        """Bytes of the whole KV cache of one slot."""
        return self.cache_length * self.kv_bytes_per_token(precision)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, dtype and shape of one graph input or output. A symbolic axis is a string."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


def graph_inputs(geometry: Geometry, precision: Precision, fixed: FixedShapes | None = None) -> list[TensorSpec]:
    """Specs of every graph input, in graph order. ``fixed`` pins B, n and S (and h, which is then n)."""
    b, n, s = _axes(fixed)
    return [
        TensorSpec(name="input_ids", dtype="int64", shape=(b, n)),
        TensorSpec(name="num_committed", dtype="int64", shape=(b,)),
        TensorSpec(name="write_index", dtype="int64", shape=(b,)),
        TensorSpec(name="kv_positions", dtype="int64", shape=(s,)),
        TensorSpec(name="head_rows", dtype="int64", shape=(_head_axis(fixed),)),
        *_cache_specs("past", geometry, precision, b),
    ]


def lookahead_inputs(geometry: Geometry, precision: Precision) -> list[TensorSpec]:
    """Specs of every input of the lookahead graph, in graph order: the inputs of the greedy graph and two more."""
    inputs = graph_inputs(geometry, precision)
    first_cache = len(inputs) - 2 * geometry.num_layers
    _, n, _ = _axes(None)
    rows = [
        TensorSpec(name="row_offsets", dtype="int64", shape=(n,)),
        TensorSpec(name="row_mask", dtype="bool", shape=(n, n)),
    ]
    return [*inputs[:first_cache], *rows, *inputs[first_cache:]]


def graph_outputs(geometry: Geometry, precision: Precision, fixed: FixedShapes | None = None) -> list[TensorSpec]:
    """Specs of every graph output, in graph order."""
    b, _, _ = _axes(fixed)
    return [
        TensorSpec(name="next_ids", dtype="int64", shape=(b, _head_axis(fixed))),
        TensorSpec(name="num_accepted", dtype="int64", shape=(b,)),
        TensorSpec(name=LOGITS, dtype="float32", shape=(_row_axis(fixed), geometry.vocab_size)),
        *_cache_specs("present", geometry, precision, b),
    ]


def cache_names(num_layers: int) -> Iterator[tuple[str, str]]:
    """(past, present) names of every cache tensor, in graph order: key and value of layer 0, of layer 1, ..."""
    for layer in range(num_layers):
        for kind in ("key", "value"):
            yield f"past_{kind}.{layer}", f"present_{kind}.{layer}"


POSITIONS = "positions"
"""Name of the value [B, n] that RoPE reads: the absolute position of every row."""

VISIBLE = "visible"
"""Name of the value [B, 1, n, S] that says which cache rows each row sees, in a graph without a window."""

HIDDEN = "hidden."


def hidden_name(layer: int) -> str:
    """Name of the value [B, n, hidden size] that enters a layer. For ``num_layers`` it is the last layer's output."""
    return f"{HIDDEN}{layer}"


def is_hidden(name: str) -> bool:
    """Whether this is the name of a value between layers."""
    return name.startswith(HIDDEN)


class Batch(NamedTuple):
    """The host's input to a forward: a block and two numbers for each slot."""

    input_ids: Sequence[Sequence[int]]
    """[B, n]"""
    num_committed: Sequence[int]
    """[B]"""
    write_index: Sequence[int]
    """[B]"""


def check_forward(*, block_size: int, write_index: Sequence[int], kv_length: int, geometry: Geometry) -> None:
    """Check on the host, before a forward, that every slot's block [B, n] lies inside the KV length and the cache.

    ``block_size`` is separate from the batch because a plan may pad a block. No later check is reliable: ONNX Runtime
    raises on a write outside the cache, but TensorRT ignores it silently. A KV length that is one row short hides a row
    from itself without an error.

    Raises:
        EngineError: the forward would write or read outside its bounds.
    """
    if min(write_index) < 0:
        raise EngineError(f"the write index must be at least 0, got {min(write_index)}")
    last = max(write_index)
    needed = last + block_size
    if needed > geometry.cache_length:
        raise EngineError(
            f"a block of {block_size} at write index {last} needs {needed} cache rows, "
            f"but the engine has {geometry.cache_length}; stop earlier, or build with a larger max_length if the "
            "checkpoint has more positions"
        )
    if kv_length < needed:
        raise EngineError(f"KV length {kv_length} is below write index {last} + block {block_size}")


def check_rows(*, slot: int, start: int, stop: int, num_slots: int, geometry: Geometry) -> None:
    """Check that rows ``start`` to ``stop`` of a slot exist, before they are copied.

    Raises:
        EngineError: the slot does not exist, or the rows lie outside the cache.
    """
    if not 0 <= slot < num_slots:
        raise EngineError(f"there is no slot {slot}: the engine has {num_slots}, from 0")
    if not 0 <= start <= stop <= geometry.cache_length:
        raise EngineError(f"rows {start} to {stop} are no rows of a cache of {geometry.cache_length}")


def _axes(fixed: FixedShapes | None) -> tuple[int | str, int | str, int | str]:
    return (fixed.batch_size, fixed.block_size, fixed.kv_length) if fixed else ("B", "n", "S")


def _head_axis(fixed: FixedShapes | None) -> int | str:
    return fixed.block_size if fixed else "h"


def _row_axis(fixed: FixedShapes | None) -> int | str:
    return fixed.batch_size * fixed.block_size if fixed else "R"


def _cache_specs(prefix: str, geometry: Geometry, precision: Precision, batch: int | str) -> list[TensorSpec]:
    shape = (batch, geometry.num_kv_heads, geometry.cache_length, geometry.head_dim)
    index = 0 if prefix == "past" else 1
    names = [pair[index] for pair in cache_names(geometry.num_layers)]
    return [TensorSpec(name=name, dtype=KV_DTYPE[precision], shape=shape) for name in names]
