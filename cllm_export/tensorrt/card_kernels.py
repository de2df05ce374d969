"""Kernels that TensorRT for RTX compiles on the card that runs a plan, kept beside the plan for the next load.

A plan of TensorRT for RTX holds code for generations of cards. The card's own kernels are compiled when a shape runs
first. The library keeps them in a runtime cache, which is valid for one GPU, driver and version of the library.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cllm_export.bundle.storage import write_bytes
from cllm_export.errors import OutputError
from cllm_export.tensorrt.plan_files import Plan, Platform, file_name_of

log = logging.getLogger(__name__)


class CardKernels:
    """The compiled kernels of one loaded plan. Drop it before the engine that it was made of.

    Args:
        tensorrt: the Python module of TensorRT for RTX.
        engine: its loaded plan.
        plan: the plan on disk.
        here: this machine.
    """

    def __init__(self, tensorrt: Any, engine: Any, plan: Plan, here: Platform) -> None:
        self._tensorrt, self._engine = tensorrt, engine
        self.path: Path = plan.path / f"cache-{file_name_of(here.gpu)}-{file_name_of(here.driver)}.bin"
        self._cache = engine.create_runtime_config().create_runtime_cache()
        self.were_kept = self._take()
        """Whether kernels of an earlier load were taken. If not, no forward of the plan has run on this card yet."""

    def _take(self) -> bool:
        try:
            kept = self.path.read_bytes()
        except OSError:
            return False
        return bool(kept) and bool(self._cache.deserialize(kept))  # it refuses those of another GPU, driver or version

    def make_context(self, *, has_few_shapes: bool) -> Any:
        """A new execution context, which has no scratch memory yet. None if TensorRT makes none.

        Args:
            has_few_shapes: compile kernels for each shape before its first forward, since a CUDA graph keeps the
                kernels that it was recorded with. If not, kernels for any shape are used: chunks of prompts have many
                lengths, and each would be compiled anew.
        """
        trt, config = self._tensorrt, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if has_few_shapes else kinds.NONE
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the engine records its own
        if not config.set_runtime_cache(self._cache):
            return None
        return self._engine.create_execution_context(config)

    def keep(self) -> None:
        """Write the kernels beside the plan. If that is not possible, say so and go on without."""
        try:
            write_bytes(self.path, bytes(self._cache.serialize()))
        except OutputError as error:
            log.warning(
                "kernels that were compiled for this card are not kept, so each load compiles them again: %s", error
            )
