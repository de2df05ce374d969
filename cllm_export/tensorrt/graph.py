"""A bundle's graph for TensorRT's parser and refitter: read from its file, with linked weights passed in memory.

The parser looks for external data by plain name in the graph's directory. But linked weights lie in the checkpoint. So
they are passed one by one, from memory maps of the checkpoint's files. Nothing is copied here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cllm_export.bundle.manifest import Bundle
from cllm_export.errors import EngineError


class GraphSource:
    """Passes a graph to a parser or refitter, and must be kept as long as that parser or refitter."""

    def __init__(self, bundle: Bundle) -> None:
        self.path = bundle.graph_path(bundle.tensorrt_graph)
        self._weights = bundle.manifest.linked_weights
        self._maps: dict[str, Any] = {}
        for name, file in bundle.manifest.linked_files.items():
            try:
                self._maps[name] = np.memmap(Path(file.path), np.uint8, "r")
            except (OSError, ValueError) as error:
                raise EngineError(f"{file.path} cannot be mapped into memory: {error}") from None

    def parse(self, parser: Any) -> bool:
        """Parse the graph with an ``OnnxParser``. Returns whether it succeeded."""
        if not self._maps:
            return bool(parser.parse_from_file(str(self.path)))
        return self._hand_over(parser) and bool(parser.parse_model_proto())

    def refit(self, refitter: Any) -> bool:
        """Refit from the graph with an ``OnnxParserRefitter``. Returns whether it succeeded."""
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
    """The errors of a parser or refitter, joined."""
    return "; ".join(str(reader.get_error(index)) for index in range(reader.num_errors))
