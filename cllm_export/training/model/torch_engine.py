"""A checkpoint as an engine: the stock transformers model behind the runtime's engine protocol.

The runtime's own loops can therefore decode a model before its export and during tuning.

The engine follows the rules of the exported graph (``contract.py``). The KV of a block is written in place at each
slot's write index. A row attends to the rows up to its own position. The number of accepted rows is counted on the
device, so a forward costs one copy to the host. Every forward reads the current weights of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cllm_export.bundle.contract import Batch, Geometry, check_forward
from cllm_export.bundle.manifest import TrainedWith
from cllm_export.checks import require_at_least
from cllm_export.errors import CheckpointError, EngineError
from cllm_export.exporter.checkpoint.read import Checkpoint, default_max_length, open_checkpoint, refuse_in_torch
from cllm_export.exporter.graph.rotary import settle_rope
from cllm_export.exporter.graph.trace import check_tensors
from cllm_export.exporter.options import BuildOptions
from cllm_export.exporter.settle import Settings, settle
from cllm_export.runtime.decoding.text import TextCodec
from cllm_export.runtime.engines.base import EngineBase, Forward, KvRows
from cllm_export.runtime.engines.kv_cache import check_row_shape, kv_length_bucket
from cllm_export.runtime.model import Model
from cllm_export.training.model.attention import CPU_ATTENTION

PREFILL_CHUNK = 128
"""Tokens in a prefill forward. PyTorch's overhead per forward equals about a hundred rows of a small model."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """The facts that a bundle's manifest would hold for a checkpoint: see ``ModelFacts``."""

    block_size: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    trained_with: TrainedWith | None


class TorchEngine(EngineBase):
    """Runs a causal LM of transformers on its own device and in its own dtype. See ``Engine`` for the methods.

    The model may be in training mode. Every forward runs in evaluation mode, then restores the previous mode.

    Args:
        model: a decoder of a family that the exporter supports. Its attention must take a boolean mask, as ``sdpa``
            does.
        geometry: the model's geometry, see ``geometry_of``.
        num_slots: number of slots B.

    Raises:
        EngineError: the model's attention does not take a boolean mask.
    """

    can_copy_rows = True
    _AFTER_CLOSE = "make another of the model"

    def __init__(self, model: PreTrainedModel, geometry: Geometry, *, num_slots: int = 1) -> None:
        require_at_least("num_slots", num_slots, 1)
        attention = model.config._attn_implementation
        if attention not in ("sdpa", CPU_ATTENTION):
            raise EngineError(f"the model runs {attention!r} attention; load it with attn_implementation='sdpa'")
        super().__init__(geometry, num_slots=num_slots, prefill_chunk=PREFILL_CHUNK)
        self._model = model
        self._device = model.device
        self._held: SlotCache | None = SlotCache(geometry, num_slots, model.dtype, self._device)
        self._positions = torch.arange(geometry.cache_length, device=self._device)

    def forward(self, batch: Batch, *, with_logits: bool = False) -> Forward:
        block_size = self._check_batch(batch)
        packed, kv_length = _pack(batch), self._kv_length(block_size, batch.write_index)
        with self._running():
            packed = packed.to(self._device)
            logits = self._logits(packed, kv_length, num_rows=0)
            rows: list[list[int]] = _greedy(packed, logits).tolist()
            fetched = logits.float().cpu().numpy() if with_logits else None
        return Forward([row[:block_size] for row in rows], [row[block_size] for row in rows], fetched)

    def prefill(self, batch: Batch) -> None:
        size = self._check_batch(batch)
        packed, kv_length = _pack(batch), self._kv_length(size, batch.write_index)
        with self._running():
            self._logits(packed.to(self._device), kv_length, num_rows=1)

    def read_rows(self, slot: int, start: int, stop: int) -> KvRows:
        self._check_rows(slot, start, stop)
        rows = self._cache.read(slot, start, stop).cpu()
        found: KvRows = (
            (rows.view(torch.int16).numpy().view(np.uint16)) if rows.dtype == torch.bfloat16 else rows.numpy()
        )
        return found

    def write_rows(self, slot: int, start: int, stop: int, rows: KvRows) -> None:
        self._check_rows(slot, start, stop)
        dtype = self.read_rows(slot, start, start).dtype
        check_row_shape(rows, stop - start, geometry=self.geometry, dtype=dtype)
        is_bits = dtype == np.uint16
        given = torch.from_numpy(np.ascontiguousarray(rows.view(np.int16) if is_bits else rows))
        self._cache.write(slot, start, stop, given.view(torch.bfloat16) if is_bits else given)

    def _logits(self, packed: Tensor, kv_length: int, *, num_rows: int) -> Tensor:
        """Write the KV of packed blocks [B, n + 2]; return logits of their last ``num_rows`` rows, or of all if 0."""
        input_ids, write_index = packed[:, :-2], packed[:, -1]
        positions = write_index[:, None] + self._positions[: input_ids.shape[1]]
        self._cache.aim(positions, kv_length)
        logits: Tensor = self._model(
            input_ids=input_ids,
            attention_mask=self._positions[:kv_length] <= positions[:, None, :, None],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=num_rows,
        ).logits
        return logits

    def close(self) -> None:
        """Drop the cache, but not the model. The engine cannot run afterwards."""
        self._is_closed, self._held = True, None

    @property
    def _cache(self) -> SlotCache:
        self._require_open()
        assert self._held, "an open engine has one"
        return self._held

    @contextmanager
    def _running(self) -> Iterator[None]:
        started = perf_counter()
        try:
            with torch.inference_mode(), _evaluating(self._model):
                yield
        except RuntimeError as error:  # from PyTorch, out of memory included
            raise EngineError(f"PyTorch failed in a forward: {error}") from error
        self.run_seconds += perf_counter() - started

    def _kv_length(self, block_size: int, write_index: Sequence[int]) -> int:
        kv_length = kv_length_bucket(max(write_index) + block_size, self.geometry.cache_length)
        check_forward(block_size=block_size, write_index=write_index, kv_length=kv_length, geometry=self.geometry)
        return kv_length


def _pack(batch: Batch) -> Tensor:
    """All inputs in one tensor [B, n + 2], so that one copy moves them to the device."""
    return torch.tensor([[*block, committed, index] for block, committed, index in zip(*batch, strict=True)])


class SlotCache:
    """The KV cache that is passed to the decoder, with static buffers [B, K, C, D].

    Each update writes a block [B, K, n, D] at the slots' positions and returns rows 0..S-1.
    """

    is_compileable = False

    def __init__(self, geometry: Geometry, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (num_slots, geometry.num_kv_heads, geometry.cache_length, geometry.head_dim)
        self._buffers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * geometry.num_layers)]
        """Key and value of layer 0, of layer 1, ... They start at zero: a NaN in an unused row would leak (0 * NaN)."""
        self._slots = torch.arange(num_slots, device=device)[:, None]
        self._positions = self._slots
        self._kv_length = 0

    def aim(self, positions: Tensor, kv_length: int) -> None:
        """Set the positions [B, n] that the next forward writes to, and the KV length S that it attends to."""
        self._positions, self._kv_length = positions, kv_length

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the block of one layer, and return the layer's keys and values [B, K, S, D]."""
        return self._write(2 * layer, key), self._write(2 * layer + 1, value)

    def read(self, slot: int, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of one slot, [2L, K, rows, D]."""
        return torch.stack([buffer[slot, :, start:stop] for buffer in self._buffers])

    def write(self, slot: int, start: int, stop: int, rows: Tensor) -> None:
        """Write rows [2L, K, rows, D] to rows ``start`` to ``stop`` of one slot."""
        for buffer, tensor_rows in zip(self._buffers, rows, strict=True):
            buffer[slot, :, start:stop] = tensor_rows

    def get_seq_length(self, *_: Any) -> int:
        """Always 0: the decoder must not count cached rows, because it is given positions and mask."""
        return 0

    def _write(self, index: int, block: Tensor) -> Tensor:
        if self._buffers[index].dtype != block.dtype:  # under autocast, or after the model's dtype changed
            self._buffers[index] = self._buffers[index].to(block.dtype)
        buffer = self._buffers[index]
        buffer.transpose(1, 2)[self._slots, self._positions] = block.transpose(1, 2)
        return buffer[:, :, : self._kv_length]


def load_checkpoint(
    path: str | Path,
    *,
    max_length: int | None = None,
    block_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a checkpoint for generation, as ``runtime.load`` loads a bundle built from it.

    Args:
        path: a Hugging Face directory.
        max_length: largest number of prompt and new tokens; by default the model's, capped at 2048.
        block_size: default n; by default the n that the model was trained with, else 16.
        device: device of the model.
        dtype: dtype of weights and KV cache.

    Raises:
        CheckpointError: the checkpoint is missing, partial, damaged or unsupported, as for ``build``.
        OptionError: an option is out of range for this model.
    """
    checkpoint = open_checkpoint(path, max_length=max_length)
    settings = settle(BuildOptions(max_length=max_length, block_size=block_size), checkpoint)
    weights = load_weights(checkpoint, max_length=max_length, device=device, dtype=dtype)
    return _model(weights, checkpoint, settings, num_slots=1)


def model_around(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    *,
    max_length: int | None = None,
    trained_with: TrainedWith | None = None,
    num_slots: int = 1,
) -> Model:
    """Wrap a live model, with the tokenizer and special tokens of its checkpoint.

    Each request uses the current weights of the model.

    Args:
        model: the model made from the checkpoint; with LoRA the base model (``get_base_model()``) with its adapters.
        checkpoint: the checkpoint that the model was loaded from.
        max_length: largest number of prompt and new tokens; by default the model's, capped at 2048.
        trained_with: block size, proposer and loop of its training, which become the defaults for decoding.
        num_slots: slots of its engine; ``Model.generate`` uses one, ``decode_requests`` all.

    Raises:
        OptionError: an option is out of range for this model.
        EngineError: the model's attention does not take a boolean mask.
    """
    settings = settle(BuildOptions(max_length=max_length, trained_with=trained_with), checkpoint)
    return _model(model, checkpoint, settings, num_slots=num_slots)


def load_weights(
    checkpoint: Checkpoint,
    *,
    max_length: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The stock transformers model of an opened checkpoint, in evaluation mode.

    transformers recomputes some rotary frequencies for every length (longrope). Here they are fixed to those of
    ``max_length``, as in a bundle.

    Raises:
        CheckpointError: a tensor is missing or has another shape; transformers would fill it with random numbers. Or
            transformers does not load the checkpoint.
        UnsupportedError: the model can be built into a bundle, but not run in PyTorch, see ``refuse_in_torch``.
        EngineError: the model cannot run on the device.
    """
    max_length = max_length or default_max_length(checkpoint.config)
    refuse_in_torch(checkpoint, max_length)
    check_tensors(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    transformers_logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # transformers raises many unrelated types for a bad checkpoint
        raise CheckpointError(f"transformers does not load {checkpoint.path}: {error}") from None
    settle_rope(model.model.rotary_emb, max_length)
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # from PyTorch: no such device, or too little memory on it
        raise EngineError(f"the model cannot run on device {str(device)!r}: {error}") from None


def _model(model: PreTrainedModel, checkpoint: Checkpoint, settings: Settings, *, num_slots: int) -> Model:
    facts = CheckpointFacts(
        block_size=settings.block_size,
        max_length=settings.max_length,
        eos_token_ids=checkpoint.eos_token_ids,
        pad_token_id=checkpoint.pad_token_id,
        trained_with=settings.trained_with,
    )
    codec = TextCodec(
        checkpoint.path,
        chat_template=checkpoint.chat_template,
        special_tokens=checkpoint.special_tokens,
        tokenizer_json=checkpoint.tokenizer_json,
    )
    return Model(facts, TorchEngine(model, settings.geometry, num_slots=num_slots), codec)


def _greedy(packed: Tensor, logits: Tensor) -> Tensor:
    """Greedy ids and the number of leading rows that are right, [B, n + 1], from packed blocks [B, n + 2] and logits.

    A row is right if it is committed, or equals the prediction of the row before. An idle slot has no right row.
    """
    input_ids, num_committed = packed[:, :-2], packed[:, -2:-1]
    block_size = input_ids.shape[1]
    next_ids = logits.argmax(-1)
    rows = torch.arange(block_size, device=input_ids.device)
    before = nn.functional.pad(next_ids, (1, -1), value=-1)
    right = (rows < num_committed) | (input_ids == before)
    num_accepted = torch.where(right, block_size, rows).amin(-1, keepdim=True)
    return torch.cat((next_ids, num_accepted), 1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block; afterwards, modules that were in training mode return to it."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
