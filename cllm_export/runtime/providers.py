"""Which engine a device's name stands for. A GPU's is imported only where it is asked for."""

from __future__ import annotations

from typing import Literal, get_args

from cllm_export.bundle import Bundle, require_one_of
from cllm_export.errors import OptionError
from cllm_export.runtime.engine import Engine
from cllm_export.runtime.ort_engine import OrtEngine

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)


def open_engine(
    bundle: Bundle,
    provider: Provider,
    *,
    num_slots: int | None = None,
    threads: int | None = None,
    cuda_graphs: bool = False,
) -> Engine:
    """A bundle's engine on a device, with as many slots as the bundle or the plan was built for unless told otherwise.

    Raises:
        OptionError: no such provider, slots that the plan has not, or ONNX Runtime's CUDA graphs elsewhere.
        GpuError, PlanError, EngineError, MissingExtraError: see the engine.
    """
    require_one_of("provider", provider, PROVIDERS)
    if cuda_graphs and provider != "cuda":
        raise OptionError(
            f"cuda_graphs is for the provider cuda, got {provider}: leave it out (tensorrt records graphs without)"
        )
    if provider == "cpu":
        return OrtEngine(bundle, num_slots=num_slots, threads=threads)
    if provider == "cuda":
        from cllm_export.runtime.ort_device_engine import OrtDeviceEngine

        return OrtDeviceEngine(bundle, num_slots=num_slots, cuda_graphs=cuda_graphs)
    from cllm_export.runtime.trt_engine import TrtEngine

    engine = TrtEngine(bundle)
    if num_slots not in (None, engine.num_slots):
        slots = engine.num_slots
        engine.close()
        raise OptionError(
            f"the plan was built for {slots} slots, got num_slots={num_slots}: build one with --batch-size"
        )
    return engine
