"""Read a weight of a bundle's graph from ``weights.bin``, or from the checkpoint that the bundle is linked to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cllm_export.bundle.manifest import Bundle

if TYPE_CHECKING:
    from onnx import TensorProto


def read_weight(bundle: Bundle, tensor: TensorProto) -> NDArray[np.float32]:
    """An initializer that is stored outside the graph's file, as fp32."""
    from onnx import helper

    place = {entry.key: entry.value for entry in tensor.external_data}
    linked = bundle.manifest.linked_files.get(place["location"])
    path = Path(linked.path) if linked else bundle.file(place["location"])
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = np.memmap(path, dtype, "r", offset=int(place.get("offset", 0)), shape=tuple(tensor.dims))
    return np.asarray(values, np.float32)
