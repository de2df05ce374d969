"""A bundle's graph as TensorRT's parser and refitter read it: from its file, with linked weights handed over in memory.

The parser looks for external data by plain name in the graph's own directory. What a bundle is linked to lies in the
checkpoint, so such weights are handed over one by one, as maps of the checkpoint's files, and nothing is copied here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import EngineError


class GraphSource:
    """Gives a graph to a parser or refitter, and must be kept for as long as that is."""

    def __init__(self, bundle: Bundle) -> None:
        self.path = bundle.graph_path()
        self._weights = bundle.manifest.linked_weights
        self._maps: dict[str, Any] = {}
        for name, file in bundle.manifest.linked_files.items():
            try:
                self._maps[name] = np.memmap(Path(file.path), np.uint8, "r")
            except (OSError, ValueError) as error:
                raise EngineError(f"{file.path} cannot be mapped into memory: {error}") from None

    def parse(self, parser: Any) -> bool:
        """Whether an ``OnnxParser`` takes it."""
        if not self._maps:
            return bool(parser.parse_from_file(str(self.path)))
        return self._hand_over(parser) and bool(parser.parse_model_proto())

    def refit(self, refitter: Any) -> bool:
        """Whether an ``OnnxParserRefitter`` takes it."""
        if not self._maps:
            return bool(refitter.refit_from_file(str(self.path)))
        return self._hand_over(refitter) and bool(refitter.refit_model_proto())

    def _hand_over(self, reader: Any) -> bool:
        if not reader.load_model_proto(self.path.read_bytes(), str(self.path)):
            return False
        for name, weight in self._weights.items():
            address = self._maps[weight.file].ctypes.data + weight.offset
            if not reader.load_initializer(name, address, weight.length):
                return False
        return True


def errors_of(reader: Any) -> str:
    """What a parser or refitter complains of."""
    return "; ".join(str(reader.get_error(index)) for index in range(reader.num_errors))
