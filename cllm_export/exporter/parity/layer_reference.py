"""The checkpoint in PyTorch, with one layer in memory at a time: the reference for bundles too large for memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from cllm_export.bundle.contract import Precision
from cllm_export.exporter.checkpoint.adapter import Adapter
from cllm_export.exporter.checkpoint.families import truncated_config
from cllm_export.exporter.checkpoint.read import Checkpoint
from cllm_export.exporter.checkpoint.stream import Piece, rows_of
from cllm_export.exporter.graph.rotary import settle_rope
from cllm_export.exporter.graph.trace import TORCH_DTYPE, checkpoint_names, decoder_from

Float32Array = NDArray[np.float32]


class LayerRecord(NamedTuple):
    """The input and the output of one layer, [T, hidden size] each."""

    layer: int
    before: Float32Array
    after: Float32Array


class Visitor(Protocol):
    """Receives each layer's record before the next layer is read."""

    def __call__(self, record: LayerRecord) -> None: ...


class LayerReference:
    """The stock transformers decoder. Each module loads its weights when a forward reaches it and drops them after.

    Weights and rotary tables are rounded to ``precision``, and the computation is in fp32. Any difference from an
    engine that does the same then comes from the graph, not from the precision. ``max_length`` and ``num_layers`` are
    the bundle's. An ``adapter`` is merged into each layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision,
        *,
        max_length: int,
        num_layers: int | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._adapter = adapter
        self._dtype = TORCH_DTYPE[precision]
        with _parameters_on_meta():
            config = truncated_config(checkpoint.config, num_layers or checkpoint.config.num_hidden_layers)
            self._decoder: PreTrainedModel = decoder_from(config).eval()
        self._decoder.requires_grad_(False)
        settle_rope(self._decoder.model.rotary_emb, max_length)
        self._names = {id(parameter): name for parameter, name in _named(self._decoder)}
        self._visit: Visitor | None = None
        self._before: Tensor | None = None
        self._empty_ones: list[tuple[nn.Module, str, nn.Parameter]] = []
        """Parameters that have data now: owner, name, and the parameter without data to put back."""
        self._hook()

    @torch.inference_mode()
    def run(self, token_ids: Sequence[int], visit: Visitor) -> Float32Array:
        """Logits [T, V] of one sequence. Calls ``visit`` with each layer's record as soon as it is computed.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        self._visit = visit
        output = self._decoder(input_ids=torch.tensor([list(token_ids)]), use_cache=False)
        logits: Float32Array = output.logits[0].float().numpy()
        return logits

    def _hook(self) -> None:
        layers = self._decoder.model.layers
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._remember)
            layer.register_forward_hook(self._report(index))
        inside = {id(module) for layer in layers for module in layer.modules()}
        outside = [
            module
            for module in self._decoder.modules()
            if id(module) not in inside and any(True for _ in module.parameters(recurse=False))
        ]
        for module in (*layers, *outside):
            module.register_forward_pre_hook(self._load_weights)
            module.register_forward_hook(self._empty)
        self._decoder.model.rotary_emb.register_forward_hook(self._round)

    def _load_weights(self, module: nn.Module, _: Any) -> None:
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                value = self._read(self._names[id(parameter)]).to(self._dtype).float()
                self._empty_ones.append((owner, name, parameter))
                owner._parameters[name] = nn.Parameter(value, requires_grad=False)

    def _read(self, name: str) -> Tensor:
        values = self._checkpoint.read(name)
        if self._adapter is None:
            return values
        info = self._checkpoint.tensors[name]
        return self._adapter.merge(Piece(name, info, 0, rows_of(info), memoryview(b"")), values)

    def _empty(self, *_: Any) -> None:
        for owner, name, parameter in self._empty_ones:
            owner._parameters[name] = parameter
        self._empty_ones.clear()

    def _remember(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._before = inputs[0]

    def _report(self, index: int) -> Any:
        def report(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            assert self._before is not None and self._visit is not None
            self._visit(LayerRecord(index, self._before[0].numpy(), after[0].numpy()))

        return report

    def _round(self, _: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(table.to(self._dtype).float() for table in output)


def _named(decoder: PreTrainedModel) -> Iterator[tuple[nn.Parameter, str]]:
    names = checkpoint_names(decoder)
    for name, parameter in decoder.named_parameters(remove_duplicate=False):
        yield parameter, names[f"decoder.{name}"]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create parameters without data inside the context, but buffers with data.

    Rotary frequencies and scales are buffers, and no checkpoint holds them.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one on meta already is being tied
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
