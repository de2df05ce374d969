"""Compares a bundle with its checkpoint layer by layer, so that neither has to fit in memory as a whole.

The graph is split at the values between its layers. Each part runs on the input that the reference's layer had, with
the bundle's stored weights, and always in fp32. So errors do not add up through the depth, and the result names a wrong
layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from cllm_export.bundle.contract import cache_names, hidden_name
from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import EngineError, GraphError
from cllm_export.exporter.graph.rotation import Rotation
from cllm_export.exporter.parity.layer_reference import Float32Array, LayerRecord, LayerReference
from cllm_export.progress import Progress
from cllm_export.runtime.engines.onnxruntime import QDQ_AS_WRITTEN

NUM_TOKENS = 24
"""Largest number of tokens to compare. Two forwards take them or, if shapes are fixed, as many as they need."""

TOLERANCE = 1e-3
"""Largest accepted error of a layer's output, relative to the value or the row's root mean square (the larger one).

Both sides compute in fp32 from the same rounded weights and differ only in the order of sums: by 1e-6 to 1e-5 for a
layer of width 4096. A wrong layer (a rotation, a mask, a transposed square matrix) has an error of 0.1 or more.
"""

TIE = 1e-3
"""Margin, in standard deviations of the logits, up to which a token that differs from the reference's is a tie."""

WIDENED = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """The error of one part of the graph, compared with the checkpoint."""

    part: str
    """``embedding``, ``layer 3``, ``head``."""
    error: float
    """Largest error, see ``TOLERANCE``. For the head: the largest margin of a differing token, see ``TIE``."""

    @property
    def passed(self) -> bool:
        return self.error <= (TIE if self.part == "head" else TOLERANCE)


class LayeredGraph:
    """The greedy graph of a bundle, run part by part in fp32. Shapes are those of ``contract.py``, B = 1 shown.

    Hidden states are those of the checkpoint: where the graph's own are rotated, they are rotated back.

    Args:
        num_tokens: largest number of tokens to run; ``block_sizes`` says how many it will be.

    Raises:
        GraphError: the graph has no named values between layers, because an older version made it.
    """

    def __init__(self, bundle: Bundle, *, threads: int, num_tokens: int = NUM_TOKENS) -> None:
        self._manifest = bundle.manifest
        self._directory = bundle.path
        self._threads = threads
        self._model = onnx.load(bundle.graph_path(), load_external_data=False)
        self._stored = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._producers = {name: node for node in self._model.graph.node for name in node.output}
        layers = self._manifest.geometry.num_layers
        if missing := [name for name in map(hidden_name, range(layers + 1)) if name not in self._producers]:
            raise GraphError(f"{bundle.path} has no value {missing[0]} between its layers: rebuild the bundle")
        fixed = self._manifest.graphs["greedy"].fixed_shapes
        self._num_slots = fixed.batch_size if fixed else 1
        self._kv_length = fixed.kv_length if fixed else None
        made = self._manifest.quantization
        is_rotated = made is not None and "residual" in made.rotated
        self._rotation = Rotation(self._manifest.geometry.hidden_size) if is_rotated else None
        longest = min(num_tokens, self._manifest.max_length)
        size = fixed.block_size if fixed else longest // 2
        self.block_sizes = (size,) * max(2, longest // size)
        """The tokens of each forward. At least two run, and all but the first use the cache of those before."""

    def embed(self, token_ids: Sequence[int]) -> Float32Array:
        """The input of the first layer, [T, hidden size]."""
        embedded: Float32Array = self._run([hidden_name(0)], token_ids, {})
        return self._rotated_back(embedded)

    def layer(self, index: int, token_ids: Sequence[int], before: Float32Array) -> Float32Array:
        """The output of one layer for the input ``before`` [T, hidden size]."""
        caches = list(cache_names(self._manifest.geometry.num_layers))[2 * index : 2 * index + 2]
        outputs = [hidden_name(index + 1), *(present for _, present in caches)]
        hidden = {hidden_name(index): self._rotated(before)}
        after: Float32Array = self._run(outputs, token_ids, hidden, caches)
        return self._rotated_back(after)

    def head(self, token_ids: Sequence[int], before: Float32Array) -> NDArray[np.int64]:
        """Greedy tokens [T] for ``before``, the output of the last layer."""
        last = hidden_name(self._manifest.geometry.num_layers)
        tokens: NDArray[np.int64] = self._run(["next_ids"], token_ids, {last: self._rotated(before)})
        return tokens

    def _rotated(self, hidden: Float32Array) -> Float32Array:
        """Hidden states [T, hidden size] of the checkpoint, as the graph takes them."""
        return hidden if self._rotation is None else self._rotation(torch.tensor(hidden)).numpy()

    def _rotated_back(self, hidden: Float32Array) -> Float32Array:
        return hidden if self._rotation is None else self._rotation.inverse(torch.tensor(hidden)).numpy()

    def _run(
        self,
        outputs: list[str],
        token_ids: Sequence[int],
        hidden: dict[str, Float32Array],
        caches: Sequence[tuple[str, str]] = (),
    ) -> Any:
        """The rows of the first output, from one forward for each block size."""
        part, stored = self._part(outputs, list(hidden))
        session = self._session(part)
        names = {value.name for value in part.graph.input}
        weights = {name: self._feedable(name) for name in stored}
        geometry = self._manifest.geometry
        rows = (self._num_slots, geometry.num_kv_heads, geometry.cache_length, geometry.head_dim)
        past = {name: np.zeros(rows, np.float32) for name, _ in caches}
        results, start = [], 0
        for size in self.block_sizes:
            feeds: dict[str, Any] = self._feeds(token_ids, start, size) | past | weights
            feeds |= {name: self._slots(value[start : start + size]) for name, value in hidden.items()}
            first, *present = session.run(outputs, {name: feed for name, feed in feeds.items() if name in names})
            past = {name: value for (name, _), value in zip(caches, present, strict=True)}
            results.append(first[0])
            start += size
        return np.concatenate(results)

    def _session(self, part: ModelProto) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        options.add_session_config_entry(*QDQ_AS_WRITTEN)
        try:
            return onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises several unrelated types of its own
            raise EngineError(f"ONNX Runtime does not take a part of {self._directory}: {error}") from error

    def _feeds(self, token_ids: Sequence[int], start: int, size: int) -> dict[str, NDArray[np.int64]]:
        ids = np.array(token_ids[start : start + size], np.int64)
        return {
            "input_ids": self._slots(ids),
            "num_committed": np.full(self._num_slots, size, np.int64),
            "write_index": np.full(self._num_slots, start, np.int64),
            "kv_positions": np.arange(self._kv_length or start + size, dtype=np.int64),
            "head_rows": np.arange(size, dtype=np.int64),
        }

    def _slots(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The same rows in every slot."""
        return np.repeat(rows[None], self._num_slots, axis=0)

    def _part(self, outputs: list[str], cut: list[str]) -> tuple[ModelProto, list[str]]:
        """The nodes between ``cut`` and ``outputs`` as an fp32 model, and the names of stored tensors to feed it."""
        nodes, read = self._between(outputs, cut)
        graph = self._model.graph
        given = [value for value in graph.input if value.name in read]
        small = [widened_tensor(self._stored[name]) for name in read if self._is_inline(name)]
        small += [self._packed(name) for name in read if self._is_packed(name)]
        stored = [name for name in read if name in self._stored and not self._is_inline(name)]
        stored = [name for name in stored if not self._is_packed(name)]
        shape = ["B", "n", self._manifest.geometry.hidden_size]
        inputs = [widened_value(value) for value in given]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in cut if name in read]
        inputs += [
            helper.make_tensor_value_info(name, widened_type(self._stored[name].data_type), self._stored[name].dims)
            for name in stored
        ]
        kinds = {value.name: widened_value(value) for value in graph.output}
        results = [kinds.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs]
        part = helper.make_graph([widened_node(node) for node in nodes], "part", inputs, results, initializer=small)
        model = helper.make_model(part, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        return model, stored

    def _between(self, outputs: list[str], cut: list[str]) -> tuple[list[NodeProto], list[str]]:
        """The nodes in graph order, and every name that they read but do not produce."""
        wanted, seen, ids = list(outputs), set(cut), set()
        read = dict.fromkeys(cut)
        while wanted:
            name = wanted.pop()
            if not name or name in seen:
                continue
            seen.add(name)
            node = self._producers.get(name)
            if node is None:
                read[name] = None
            elif id(node) not in ids:
                ids.add(id(node))
                wanted += node.input
        return [node for node in self._model.graph.node if id(node) in ids], list(read)

    def _is_inline(self, name: str) -> bool:
        return name in self._stored and self._stored[name].data_location != TensorProto.EXTERNAL

    def _is_packed(self, name: str) -> bool:
        return name in self._stored and self._stored[name].data_type == TensorProto.INT4

    def _packed(self, name: str) -> TensorProto:
        """A tensor of 4-bit integers that contains its bytes: a session cannot take an array of them as an input."""
        tensor = self._stored[name]
        path, offset = self._place(tensor)
        data = np.memmap(path, np.uint8, mode="r", offset=offset, shape=(math.prod(tensor.dims) // 2,))
        return TensorProto(name=name, dims=tensor.dims, data_type=tensor.data_type, raw_data=data.tobytes())

    def _feedable(self, name: str) -> Any:
        """A stored tensor as a session takes it. numpy has no 8-bit floats, so they go as bytes with their type."""
        import onnxruntime

        values, data_type = widened(self._read(name)), self._stored[name].data_type
        if data_type != TensorProto.FLOAT8E4M3FN:
            return values
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values.view(np.uint8), data_type)

    def _read(self, name: str) -> NDArray[Any]:
        """A stored tensor, memory-mapped; bf16 values as their bits in uint16."""
        tensor = self._stored[name]
        is_bf16 = tensor.data_type == TensorProto.BFLOAT16
        kind = np.dtype(np.uint16) if is_bf16 else helper.tensor_dtype_to_np_dtype(tensor.data_type)
        path, offset = self._place(tensor)
        return np.memmap(path, kind, mode="r", offset=offset, shape=tuple(tensor.dims))

    def _place(self, tensor: TensorProto) -> tuple[Path, int]:
        """The file of a stored tensor, and the tensor's offset in it."""
        where = {entry.key: entry.value for entry in tensor.external_data}
        linked = self._manifest.linked_files.get(where["location"])
        path = Path(linked.path) if linked else self._directory / where["location"]
        return path, int(where["offset"])


def compare_layers(
    bundle: Bundle,
    reference: LayerReference,
    token_ids: Sequence[int],
    *,
    threads: int,
    progress: Progress = lambda *_: None,
) -> list[LayerError]:
    """The error of every part of the bundle's graph, in order.

    Args:
        token_ids: the tokens to compare on; repeated or cut to the sum of ``LayeredGraph.block_sizes``.

    Raises:
        GraphError: the graph cannot be split into parts.
        EngineError: ONNX Runtime does not take a part.
        CheckpointError: the checkpoint cannot be read.
    """
    graph = LayeredGraph(bundle, threads=threads)
    token_ids = list(islice(cycle(token_ids), sum(graph.block_sizes)))
    num_layers = bundle.manifest.geometry.num_layers
    errors: list[LayerError] = []
    last: list[Float32Array] = []

    def visit(record: LayerRecord) -> None:
        if record.layer == 0:
            errors.append(LayerError(part="embedding", error=largest_error(graph.embed(token_ids), record.before)))
        after = graph.layer(record.layer, token_ids, record.before)
        errors.append(LayerError(part=f"layer {record.layer}", error=largest_error(after, record.after)))
        last[:] = [record.after]
        progress("layers", record.layer + 1, num_layers)

    logits = reference.run(token_ids, visit)
    errors.append(LayerError(part="head", error=largest_margin(graph.head(token_ids, last[0]), logits)))
    return errors


def largest_error(actual: Float32Array, expected: Float32Array) -> float:
    """The largest error as in ``TOLERANCE``; infinite if any value of ``actual`` is not finite."""
    if not np.isfinite(actual).all():
        return float("inf")
    scale = np.sqrt(np.mean(np.square(expected), axis=-1, keepdims=True))
    return float(np.max(np.abs(actual - expected) / np.maximum(np.maximum(scale, np.abs(expected)), 1e-30)))


def largest_margin(tokens: NDArray[np.int64], logits: Float32Array) -> float:
    """The largest gap in logits [T, V] between the best token and the given one [T], in standard deviations."""
    margins = logits.max(axis=-1) - np.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return float(np.max(margins / logits.std(axis=-1)))


def describe(errors: Sequence[LayerError]) -> tuple[str, list[dict[str, Any]]]:
    """A sentence that sums up the errors, and the table of all errors."""
    wrong = [entry for entry in errors if not entry.passed]
    worst = max(errors[:-1], key=lambda entry: entry.error)
    detail = f"{len(errors)} parts, largest error {worst.error:.1e} ({worst.part})"
    if wrong:
        detail = f"{wrong[0].part} differs: error {wrong[0].error:.2g}; {len(wrong)} of {len(errors)} parts differ"
    return detail, [asdict(entry) for entry in errors]


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """The array in fp32 if it holds fp16, or bf16 as bits in uint16. Other arrays are returned unchanged."""
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def widened_type(data_type: int) -> int:
    return TensorProto.FLOAT if data_type in WIDENED else data_type


def widened_value(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.type.tensor_type.elem_type = widened_type(value.type.tensor_type.elem_type)
    return copy


def widened_tensor(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in WIDENED:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def widened_node(node: NodeProto) -> NodeProto:
    """The node with fp32 in place of fp16 and bf16 in a Cast's target and in tensor attributes."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if attribute.name == "to" and node.op_type == "Cast":
            attribute.i = widened_type(attribute.i)
        if attribute.type == onnx.AttributeProto.TENSOR:
            attribute.t.CopyFrom(widened_tensor(attribute.t))
    return copy
