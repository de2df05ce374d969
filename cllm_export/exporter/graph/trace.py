"""Turns a checkpoint config into a raw ONNX graph: traces the stock transformers decoder over fake tensors.

No model is re-implemented, and no weight is read. transformers' attention registry and cache argument make the decoder
emit ONNX Attention and TensorScatter. A table look-up replaces its rotary embedding. The wrapper adds what the contract
needs: positions, mask, argmax and the number of accepted tokens. Weights become graph inputs named after their
checkpoint tensors, so every later pass works without data.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cllm_export.bundle.contract import OPSET, Geometry, Precision, TensorSpec, graph_inputs, graph_outputs
from cllm_export.errors import CheckpointError, GraphError, UnsupportedError
from cllm_export.exporter.checkpoint.families import layer_types_of, window_within
from cllm_export.exporter.graph.head import as_returned
from cllm_export.exporter.graph.rotary import Tables, rotary_tables

ATTENTION_NAME = "cllm_export_onnx"
TRACE_DOMAIN = "cllm_export.trace"
"""Domain of the marker operators. Rotary marks cos and sin until the rotary pass removes it. Hidden marks the value
between two layers until the last pass names it. Positions and Visible mark the two values that a variant of the graph
replaces."""

HARMLESS = frozenset({"dropout", "sliding_window", "position_ids", "use_cache"})
"""Arguments of stock attention that can be ignored: the graph expresses them elsewhere, mostly in its mask."""

STORED_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias)$")
"""Buffers that older checkpoints store although the model computes them: frequencies, rotary tables, causal masks."""

TORCH_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A traced decoder: its graph, and the meaning of each graph input that is not in the contract."""

    model: ir.Model
    checkpoint_tensors: tuple[str, ...]
    """Graph inputs that are named after the checkpoint tensor they take."""
    constants: dict[str, Tensor]
    """Graph input -> its computed value (RoPE tables, row numbers)."""


def geometry_of(config: PretrainedConfig, *, max_length: int, max_block_size: int) -> Geometry:
    """The geometry of an engine for this config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Geometry(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        cache_length=max_length + max_block_size - 1,
        max_block_size=max_block_size,
    )


def trace_greedy(config: PretrainedConfig, geometry: Geometry, precision: Precision) -> Trace:
    """Trace the greedy graph of ``contract.py`` with symbolic B, n, S and h.

    Raises:
        UnsupportedError: the modelling code does not use the attention registry or half-split rotation.
    """
    AttentionInterface.register(ATTENTION_NAME, _attention)
    max_length = geometry.cache_length - geometry.max_block_size + 1
    tables = _rotary_tables(config, max_length=max_length, length=geometry.cache_length)
    dtype = TORCH_DTYPE[precision]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        decoder = _empty_decoder(config, precision)
        names = checkpoint_names(decoder)
        rotary = RotaryTable({layer_type: table.shape for layer_type, (table, _) in tables.items()}, dtype)
        graph = GreedyGraph(decoder, geometry, rotary, Masks.of(config, max_length))
        inputs = _example_inputs(geometry, precision)
    _keep_scalars(decoder)
    program = _export(graph, inputs)
    model = program.model
    constants = {
        f"rotary.{_table_name(kind, layer_type)}": table.to(dtype)
        for layer_type, pair in tables.items()
        for kind, table in zip(("cos", "sin"), pair, strict=True)
    }
    constants["row_numbers"] = torch.arange(geometry.cache_length)
    _rename_contract_values(model, geometry, precision)
    _detach_weights(model, names | {name: name for name in constants})
    _require_data(model)
    used = {value.name for value in model.graph.inputs if value.name}
    return Trace(
        model=model,
        checkpoint_tensors=tuple(sorted(used & set(names.values()))),
        constants={name: value for name, value in constants.items() if name in used},
    )


@dataclass(frozen=True, kw_only=True)
class Masks:
    """The masks that the decoder needs: causal, or with a sliding window, for all layers or per layer type."""

    window: int | None
    """Tokens that a sliding layer sees; None if no layer has a window below the maximum length of the graph."""
    by_layer_type: bool

    @classmethod
    def of(cls, config: PretrainedConfig, max_length: int) -> Masks:
        return cls(window=window_within(config, max_length), by_layer_type=layer_types_of(config) is not None)

    def make(self, kv_positions: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Bool masks [B, 1, n, S] in the form that the stock modelling code uses without changes."""
        rows = positions[:, None, :, None]
        causal = kv_positions <= rows
        if self.window is None:
            return _marked("Visible", causal)
        sliding = causal & (kv_positions > rows - self.window)
        return {"full_attention": causal, "sliding_attention": sliding} if self.by_layer_type else sliding


class GreedyGraph(nn.Module):
    """Wraps the decoder in the greedy contract. Shapes are those of ``contract.py``.

    Some families change logits after the head: Granite divides them, Gemma passes them through tanh. The argmax is
    taken before that. Both functions are increasing, so the argmax is the same unless rounding makes two logits equal.
    """

    row_numbers: Tensor

    def __init__(self, decoder: PreTrainedModel, geometry: Geometry, rotary: RotaryTable, masks: Masks) -> None:
        super().__init__()
        self.decoder = decoder
        self.rotary = rotary
        self.masks = masks
        decoder.model.rotary_emb = self.rotary
        _mark_hidden_states(decoder.model.layers)
        self.register_buffer("row_numbers", torch.zeros(geometry.cache_length, dtype=torch.int64), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        num_committed: Tensor,
        write_index: Tensor,
        kv_positions: Tensor,
        head_rows: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        b, n = input_ids.shape
        rows = self.row_numbers[:n]
        positions = _marked("Positions", write_index[:, None] + rows)
        mask = self.masks.make(kv_positions, positions)
        cache = ScatterCache(past, write_index, kv_positions.shape[0])
        hidden = self.decoder.model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        h = head_rows.shape[0]
        hidden = _op("Gather", hidden, head_rows, shape=(b, h, hidden.shape[2]), axis=1)
        drafted = _op("Gather", input_ids, head_rows, shape=(b, h), axis=1)
        scores = self.decoder.lm_head(hidden.flatten(0, 1)).float()
        next_ids = _op("Reshape", scores.argmax(-1), _op("Shape", drafted, shape=(2,)), shape=(b, h))
        accepted = _num_accepted(input_ids, num_committed, head_rows, drafted, next_ids)
        return (next_ids, accepted, as_returned(scores, self.decoder.config), *cache.present)


def _mark_hidden_states(layers: nn.ModuleList) -> None:
    """Mark the input of each layer and the output of the last one."""

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_marked("Hidden", inputs[0]), *inputs[1:])

    def after(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, Tensor):
            return _marked("Hidden", output)
        return (_marked("Hidden", output[0]), *output[1:])

    for layer in layers:
        layer.register_forward_pre_hook(before)
    layers[-1].register_forward_hook(after)


def _marked(kind: str, value: Tensor) -> Tensor:
    marked: Tensor = torch.onnx.ops.symbolic(
        f"{TRACE_DOMAIN}::{kind}", (value,), dtype=value.dtype, shape=list(value.shape)
    )
    return marked


class RotaryTable(nn.Module):
    """Replaces the decoder's rotary embedding: gives cos and sin [B, n, R] as marker operators over tables [C, R/2].

    Args:
        shapes: layer type -> shape of its table; the key is None if all layers share one table.
        dtype: the dtype of the tables.
    """

    def __init__(self, shapes: Mapping[str | None, Sequence[int]], dtype: torch.dtype) -> None:
        super().__init__()
        for layer_type, shape in shapes.items():
            for kind in ("cos", "sin"):
                self.register_buffer(_table_name(kind, layer_type), torch.zeros(*shape, dtype=dtype), persistent=False)

    def forward(self, hidden: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        tables = [self.get_buffer(_table_name(kind, layer_type)) for kind in ("cos", "sin")]
        shape = (*position_ids.shape, 2 * tables[0].shape[1])
        cos, sin = (
            torch.onnx.ops.symbolic(f"{TRACE_DOMAIN}::Rotary", (table, position_ids), dtype=hidden.dtype, shape=shape)
            for table in tables
        )
        return cos, sin


def _table_name(kind: str, layer_type: str | None) -> str:
    return kind if layer_type is None else f"{layer_type}_{kind}"


class ScatterCache:
    """The cache that the decoder uses. Each update writes a block at the write index and returns rows 0..S-1."""

    is_compileable = False

    def __init__(self, past: Sequence[Tensor], write_index: Tensor, kv_length: int) -> None:
        self._past = past
        self._write_index = write_index
        self._kv_length = kv_length
        self.present: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if len(self.present) != 2 * layer:
            raise GraphError(f"layer {layer} updated its cache out of order, after {len(self.present) // 2} layers")
        rows = [self._write(self._past[2 * layer + i], block) for i, block in enumerate((key, value))]
        return rows[0], rows[1]

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def _write(self, past: Tensor, block: Tensor) -> Tensor:
        if (past.shape[1], past.shape[3]) != (block.shape[1], block.shape[3]):
            raise UnsupportedError(
                f"a layer has {block.shape[1]} key/value heads of {block.shape[3]} columns where the config says "
                f"{past.shape[1]} of {past.shape[3]}; layers of different shapes are not supported"
            )
        inputs = (past, block, self._write_index)
        present = _op("TensorScatter", *inputs, shape=past.shape, version=24, axis=-2, mode="linear")
        self.present.append(present)
        return present[:, :, : self._kv_length]


def _num_accepted(
    input_ids: Tensor, num_committed: Tensor, head_rows: Tensor, drafted: Tensor, next_ids: Tensor
) -> Tensor:
    """The number of leading rows that are right, [B]: the index of the first wrong row, else n.

    Row i is right if i < num_committed or if its token equals the prediction after row i - 1. An idle slot has no
    committed row, so its first wrong row is 0. In prefill only row 0 is checked.
    """
    before = nn.functional.pad(next_ids, (1, -1), value=-1)
    right = (head_rows < num_committed[:, None]) | (drafted == before)
    length = _op("Shape", input_ids, shape=(1,), dtype=torch.int64, version=23, start=1, end=2)
    return torch.where(right, length, head_rows).amin(-1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function for the registry: query [B, H, n, D], key and value [B, K, S, D], mask [B, 1, n, S]."""
    if mask is None:
        raise UnsupportedError(f"{type(module).__name__} drops the attention mask it is given")
    if unknown := sorted(name for name, given in others.items() if given is not None and name not in HARMLESS):
        raise UnsupportedError(f"{type(module).__name__} asks its attention for {unknown[0]}, which no graph has yet")
    if softcap is not None:
        return _capped_attention(query, key, value, mask, float(scaling), float(softcap)).transpose(1, 2), None
    shape = (*query.shape[:3], value.shape[3])
    output = _op("Attention", query, key, value, mask, shape=shape, version=24, scale=float(scaling))
    return output.transpose(1, 2), None


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Attention with scores softcap * tanh(score / softcap), [B, H, n, D], in primitive operators.

    TensorRT's Attention has no softcap. As in ``fold_query_groups``, the g heads that share a key/value head become
    rows of one head, so no key or value is repeated.
    """
    b, heads, n, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    rows = query.reshape(b, kv_heads, groups * n, width)
    scores = torch.matmul(rows, key.transpose(2, 3)).float()
    capped = torch.tanh(scores * (scaling / softcap)) * softcap
    visible = torch.cat([mask] * groups, 2) if groups > 1 else mask
    shares = torch.where(visible, capped, torch.finfo(torch.float32).min).softmax(-1)
    return torch.matmul(shares.to(value.dtype), value).reshape(b, heads, n, value.shape[3])


def _op(
    name: str, *inputs: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, version: int = 23, **attrs: Any
) -> Tensor:
    """One ONNX operator of the default domain."""
    return torch.onnx.ops.symbolic(
        name, inputs, attrs, dtype=dtype or inputs[0].dtype, shape=list(shape), version=version
    )


def _empty_decoder(config: PretrainedConfig, precision: Precision) -> PreTrainedModel:
    decoder = decoder_from(config, dtype=TORCH_DTYPE[precision], attn_implementation=ATTENTION_NAME)
    if not (hasattr(decoder, "model") and hasattr(decoder.model, "rotary_emb") and hasattr(decoder, "lm_head")):
        raise UnsupportedError(f"{type(decoder).__name__} is not laid out as model.rotary_emb and lm_head")
    decoder.requires_grad_(False)
    return decoder.eval()


def decoder_from(
    config: PretrainedConfig, attn_implementation: str = "eager", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation=attn_implementation, dtype=dtype
        )
    except Exception as error:  # transformers raises many unrelated types for a bad config
        raise CheckpointError(
            f"transformers makes no model of this config: {type(error).__name__}: {error}; check config.json"
        ) from None


def _rotary_tables(config: PretrainedConfig, *, max_length: int, length: int) -> Tables:
    """The cos and sin tables of positions 0..length - 1, computed by the decoder's own rotary embedding."""
    with torch.device("meta"):
        rotary_type = type(decoder_from(config).model.rotary_emb)
    return rotary_tables(rotary_type, config, max_length=max_length, length=length)


def _keep_scalars(decoder: PreTrainedModel) -> None:
    """Replace fake buffers that hold a computed number (Gemma's embedding scale) by that number.

    No checkpoint holds these buffers. A fake tensor made from a Python number keeps the number.
    """
    for module in decoder.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if isinstance(buffer, FakeTensor) and buffer.constant is not None:
                setattr(module, name, buffer.constant.clone())


def checkpoint_names(decoder: PreTrainedModel) -> dict[str, str]:
    """Parameter name in the trace -> tensor name in a checkpoint. Tied parameters share the name of the first."""
    first: dict[int, str] = {}
    names = {}
    for name, parameter in decoder.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
        names[f"decoder.{name}"] = first[id(parameter)]
    return names


def _example_inputs(geometry: Geometry, precision: Precision) -> tuple[Any, ...]:
    b, n, s = 2, 5, 48
    shape = (b, geometry.num_kv_heads, geometry.cache_length, geometry.head_dim)
    past = [torch.zeros(shape, dtype=TORCH_DTYPE[precision]) for _ in range(2 * geometry.num_layers)]
    ids = torch.zeros(b, n, dtype=torch.int64)
    slots = torch.ones(b, dtype=torch.int64)
    return ids, slots, slots.clone(), torch.arange(s), torch.arange(n - 2), past


def _export(graph: GreedyGraph, inputs: tuple[Any, ...]) -> torch.onnx.ONNXProgram:
    auto = torch.export.Dim.DYNAMIC
    batch = {0: auto}
    shapes = ({0: auto, 1: auto}, batch, batch, {0: auto}, {0: auto}, [batch] * len(inputs[-1]))
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.eval(),
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise GraphError(f"torch could not trace this model: {reason}") from error
    if program is None:
        raise GraphError("torch.onnx.export returned no program")
    return program


def _rename_contract_values(model: ir.Model, geometry: Geometry, precision: Precision) -> None:
    _rename(list(model.graph.inputs), graph_inputs(geometry, precision))
    _rename(list(model.graph.outputs), graph_outputs(geometry, precision))


def _rename(values: list[ir.Value], specs: list[TensorSpec]) -> None:
    if len(values) != len(specs):
        raise GraphError(f"the trace has {len(values)} values where the contract has {len(specs)}")
    for value, spec in zip(values, specs, strict=True):
        dims = value.shape.dims if value.shape is not None else ()
        for dim, stated in zip(dims, spec.shape, strict=True):
            if isinstance(stated, str) and isinstance(dim, int):
                raise GraphError(f"the trace fixed axis {stated} of {spec.name} to {dim}; it must stay open")
        value.name = spec.name


def _detach_weights(model: ir.Model, names: dict[str, str]) -> None:
    """Turn every weight initializer into a graph input named after its checkpoint tensor."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name not in names:
            continue
        del graph.initializers[name]
        value.const_value = None
        value.name = names[name]
        graph.inputs.append(value)


def _require_data(model: ir.Model) -> None:
    """Refuse a fake tensor that has no data: it would be written as noise."""
    for name, value in model.graph.initializers.items():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            raise GraphError(f"the trace holds a buffer {name} of which no data is known; it is not supported yet")


def check_tensors(config: PretrainedConfig, found: dict[str, tuple[int, ...]]) -> frozenset[str]:
    """Compare the checkpoint's tensors with those that its config needs. Returns the names of the latter.

    Raises:
        CheckpointError: a tensor is missing, unexpected or has another shape; names it.
    """
    with torch.device("meta"):
        decoder = decoder_from(config)
    expected = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}  # lists tied ones once
    for name, shape in sorted(expected.items()):
        if name not in found:
            raise CheckpointError(f"the checkpoint has no tensor {name}, which its config asks for; it is incomplete")
        if found[name] != shape:
            raise CheckpointError(f"tensor {name} has shape {list(found[name])}, the config asks for {list(shape)}")
    known = set(expected) | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    extra = sorted(name for name in found if name not in known and not STORED_BUFFERS.search(name))
    if extra:
        raise CheckpointError(
            f"the checkpoint has a tensor {extra[0]!r} that its config has no place for ({len(extra)} such tensors): a "
            f"model without them would be another one. Correct config.json (num_hidden_layers is "
            f"{config.num_hidden_layers}), or remove them from the weights if they are not meant to be there"
        )
    return frozenset(expected)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages of torch's exporter about optional packages and its internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
