"""Each decoder is traced once a run: tracing is most of a build's time, and many tests build the same small decoders.

What is remembered is the trace alone, by everything it is made from; passes, weights and all that follows run anew in
every build. What a build takes is always read back, by the first that asks as well, so that no order of tests changes
what they see. Builds in processes of their own trace for themselves, and tests compare their bundles with these.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cllm_export.bundle.contract import Geometry, Precision
    from cllm_export.exporter.graph.trace import Trace


def remember_traces(directory: Path) -> None:
    """Let builds of this process take traces from this directory, and leave new ones there."""
    from cllm_export.exporter import pipeline
    from cllm_export.exporter.graph import trace

    def remembered(config: PretrainedConfig, geometry: Geometry, precision: Precision) -> Trace:
        settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        made_from = (type(config).__name__, sorted(settings.items()), str(config.dtype), geometry, precision)
        place = directory / hashlib.sha256(repr(made_from).encode()).hexdigest()[:24]
        place.mkdir(parents=True, exist_ok=True)
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "names.json").exists():
                _write(trace.trace_greedy(config, geometry, precision), place)
        return _read(place)

    pipeline.trace_greedy = remembered


def _write(trace: Trace, place: Path) -> None:
    import onnx_ir as ir
    from safetensors.torch import save_file

    (place / "model.onnx").write_bytes(ir.serde.serialize_model(trace.model).SerializeToString())
    save_file({name: value.contiguous() for name, value in trace.constants.items()}, place / "constants.safetensors")
    names = {"checkpoint_tensors": trace.checkpoint_tensors, "constants": list(trace.constants)}
    (place / "names.json").write_text(json.dumps(names), encoding="utf-8")


def _read(place: Path) -> Trace:
    import onnx
    import onnx_ir as ir
    from safetensors.torch import load_file

    from cllm_export.exporter.graph.trace import Trace

    names = json.loads((place / "names.json").read_text(encoding="utf-8"))
    constants = load_file(place / "constants.safetensors")
    return Trace(
        model=ir.serde.deserialize_model(onnx.ModelProto.FromString((place / "model.onnx").read_bytes())),
        checkpoint_tensors=tuple(names["checkpoint_tensors"]),
        constants={name: constants[name] for name in names["constants"]},
    )
