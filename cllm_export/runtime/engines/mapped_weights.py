"""Linked weights for ONNX Runtime: memory maps of the checkpoint's files, without a copy.

ONNX Runtime refuses external data outside the model's directory, by absolute path and by link. It refuses it even if
the weights are passed in memory, unless the whole file is passed too. So it gets both. The map of the file satisfies
its check of the graph, which records the file's plain name. A tensor over the same map becomes the weight. With the map
alone, it would copy every weight that it does not repack. ``benchmarks/export_size.py`` measures this.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from cllm_export.bundle.manifest import WEIGHTS_NAME, Bundle
from cllm_export.errors import EngineError
from cllm_export.runtime.engines.resident_memory import trim_heap

if TYPE_CHECKING:
    import onnxruntime

RELEASE_SECONDS = 0.01
"""Pause between two releases. A session reads some ten megabytes in it."""

NUMPY_DTYPE = {"F32": np.float32, "F16": np.float16}


class MappedWeights:
    """Read-only maps of the linked files, kept for as long as a session reads from them."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._weights = manifest.linked_weights
        self._maps: dict[str, Any] = {}
        self._values: dict[str, onnxruntime.OrtValue] = {}
        """Tensors over the maps. The session owns neither tensors nor maps."""
        paths = {name: Path(file.path) for name, file in manifest.linked_files.items()}
        if paths:  # a session that gets one file in memory needs every file that its graph records
            paths[WEIGHTS_NAME] = bundle.file(WEIGHTS_NAME)
        for name, path in paths.items():
            try:
                self._maps[name] = np.memmap(path, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise EngineError(f"{path} cannot be mapped into memory: {error}") from None

    def hand_to(self, options: onnxruntime.SessionOptions) -> None:
        """Make a session use these weights instead of reading files. Any number of sessions can share them."""
        if not self._maps:
            return
        import onnxruntime

        maps = list(self._maps.values())
        options.add_external_initializers_from_files_in_memory(list(self._maps), maps, [each.nbytes for each in maps])
        for name, weight in self._weights.items():
            if name not in self._values:
                place = self._maps[weight.file][weight.offset : weight.offset + weight.length]
                array = place.view(NUMPY_DTYPE[weight.dtype]).reshape(weight.shape)
                self._values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            options.add_initializer(name, self._values[name])

    @contextmanager
    def releasing_pages(self) -> Iterator[None]:
        """While a session loads, let the system drop the pages of the files again and again.

        A session packs its matrices one by one. Without this, weights lie in memory twice when it has packed the last
        one. Afterwards it reads only a few rows of the embedding table.
        """
        if not self._maps:
            yield
            return
        is_loaded = Event()
        thread = Thread(target=self._release_until, args=(is_loaded,), name="release pages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_loaded.set()
            thread.join()
            self._release()

    def _release_until(self, is_loaded: Event) -> None:
        while not is_loaded.wait(RELEASE_SECONDS):
            self._release()
            trim_heap()  # a session frees what it has read and packed

    def _release(self) -> None:
        for each in self._maps.values():
            each._mmap.madvise(mmap.MADV_DONTNEED)
