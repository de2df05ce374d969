"""An engine that runs an edited copy of a bundle's graph: internal values become outputs, or weights are replaced.

The bundle's files are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import CalibrationError
from cllm_export.extras import needs_extra
from cllm_export.runtime.engines.onnxruntime import OrtEngine, bindable, make_session

if TYPE_CHECKING:
    import onnxruntime
    from onnx import ModelProto

FOLDER_KEY = "session.model_external_initializers_file_folder_path"


def read_graph(bundle: Bundle) -> ModelProto:
    """The greedy graph of a bundle. Its weights are not read."""
    with needs_extra("export"):
        import onnx

    return onnx.load(bundle.graph_path(), load_external_data=False)


def require_unquantised(bundle: Bundle) -> None:
    """Refuse a quantised bundle.

    Raises:
        CalibrationError: the bundle is quantised.
    """
    if bundle.manifest.quantization is not None:
        raise CalibrationError(
            f"{bundle.path} is quantised ({bundle.manifest.quantization.scheme}) already: give the fp32 bundle of the "
            "same checkpoint, which cllm-export build makes with precision='fp32'"
        )


class EditedEngine(OrtEngine):
    """Runs a graph that is in memory. Weights that the graph does not hold are read from the bundle.

    Args:
        model: an edited copy of the bundle's graph, with the same inputs and outputs.
        weights: values that replace the initializers of these names.
        observed: values of the graph that each forward returns besides the outputs.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: ModelProto,
        *,
        weights: Mapping[str, NDArray[np.float32]] | None = None,
        observed: Sequence[str] = (),
        threads: int | None = None,
    ) -> None:
        self._weights = {name: bindable(np.ascontiguousarray(value)) for name, value in (weights or {}).items()}
        self._bytes = _with_outputs(model, observed)
        self._folder = bundle.path
        self._observed = tuple(observed)
        self._last: Any = None
        pinned = bundle.manifest.graphs["greedy"].fixed_shapes
        super().__init__(bundle, num_slots=None if pinned else 1, threads=threads)

    def values(self) -> dict[str, NDArray[np.float32]]:
        """The observed values of slot 0 in the last forward, [n, channels] each. Later forwards do not change them."""
        outputs = self._last.get_outputs()[-len(self._observed) :] if self._observed else []
        return {
            name: _rows_of_slot(output.numpy(), self.num_slots)
            for name, output in zip(self._observed, outputs, strict=True)
        }

    def _open_session(self, path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        options.add_session_config_entry(FOLDER_KEY, str(self._folder.absolute()))
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        session = make_session(self._bytes, options, name=path)
        self._bytes = b""
        return session

    def _bind(self, key: Any) -> Any:
        binding = super()._bind(key)
        for name in self._observed:
            binding.io.bind_output(name)
        return binding

    def _run_binding(self, binding: Any) -> None:
        super()._run_binding(binding)
        self._last = binding.io


def _with_outputs(model: ModelProto, names: Sequence[str]) -> bytes:
    from onnx import ModelProto, helper

    copy = ModelProto()
    copy.CopyFrom(model)
    own = {value.name for value in copy.graph.output}
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in own)
    return bytes(copy.SerializeToString())


def _rows_of_slot(values: NDArray[Any], num_slots: int) -> NDArray[np.float32]:
    """[B, n, E] or [B n, E] -> [n, E] of slot 0."""
    rows = values.reshape(-1, values.shape[-1])
    return rows[: len(rows) // num_slots].astype(np.float32, copy=False)
