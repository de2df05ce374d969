"""Engines on a device: what is refused and why. That their tokens are right is shown in tests/acceptance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from onnxruntime import InferenceSession as RealSession

from cllm_export.errors import EngineError, GpuError, OptionError
from cllm_export.runtime.engines import onnxruntime_device as ort_device_engine
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.engines.onnxruntime_device import OrtDeviceEngine
from cllm_export.runtime.load import Provider, load, open_engine
from tests.conftest import PINNED, THREADS, Workshop
from tests.fakes import write_bundle


def test_an_unknown_provider_is_refused_by_name(tmp_path: Path):
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(OptionError, match="provider must be one of cpu, cuda, tensorrt, got 'gpu'"):
        load(bundle.path, provider="gpu")  # type: ignore[arg-type]


def test_onnx_runtime_for_the_cpu_is_refused_with_the_line_that_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ort_device_engine, "require_gpu", lambda: None)
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(GpuError, match=r"has no CUDAExecutionProvider.*pip install 'cllm-export\[cuda\]'"):
        open_engine(bundle, "cuda")


def test_a_provider_that_did_not_start_is_no_silent_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime goes on with the CPU where CUDA's libraries are missing."""
    import onnxruntime

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort_device_engine, "require_gpu", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(GpuError, match="did not start its CUDAExecutionProvider"):
        OrtDeviceEngine(write_bundle(tmp_path / "bundle"))


def test_a_forward_that_cannot_be_right_is_refused(workshop: Workshop):
    engine = OrtDeviceEngine(workshop.bundle("small"), device="cpu", num_slots=2)
    for blocks, committed, write_index, message in (
        ([[1]], [1], [0], "each of 2 slots"),
        ([[1], [1]], [1, 1], [0, 10_000], "cache rows"),
        ([[1, 2], [1]], [1, 1], [0, 0], "failed in a forward on cpu"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.forward(blocks, committed, write_index)
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.forward([[1], [1]], [1, 1], [0, 0])


def test_a_pinned_graph_takes_its_own_shapes_alone(workshop: Workshop):
    bundle = workshop.bundle("small", **PINNED)
    engine = OrtDeviceEngine(bundle, device="cpu")
    size = PINNED["block_size"]
    engine.prefill([[1] * size], [size], [0])
    assert len(engine.forward([[1] * size], [1], [size]).next_ids[0]) == size
    with pytest.raises(EngineError, match=f"pinned to blocks of {size}, got 4"):
        engine.forward([[1] * 4], [1], [0])
    with pytest.raises(EngineError, match="pinned to 1 slots"):
        OrtDeviceEngine(bundle, device="cpu", num_slots=2)


def test_onnx_runtime_says_nothing_of_a_copy_of_the_cache(workshop: Workshop, capfd: pytest.CaptureFixture[str]):
    engine = OrtDeviceEngine(workshop.bundle("small"), device="cpu", num_slots=1, log_severity=2)
    engine.forward([[1] * 8], [1], [0])
    engine.forward([[1] * 8], [1], [8])
    assert "in-place" not in capfd.readouterr().err


class GraphSession:
    """ONNX Runtime with a CUDA provider that records graphs, as far as its API shows: it computes on the CPU.

    A run whose graph is new runs several times over, as the real one does before it records; a graph that comes with
    another binding than it was recorded with would be replayed over the wrong addresses.
    """

    made: ClassVar[list[Any]] = []
    breaks: ClassVar[set[str]] = set()

    def __init__(self, path: str, options: Any, *, providers: list[Any]) -> None:
        if "load" in self.breaks:
            raise RuntimeError("nodes have not been partitioned to the CUDAExecutionProvider")
        self.providers = providers
        self.graphs: dict[str, Any] = {}
        self.runs: list[str | None] = []
        self._session = RealSession(path, options, providers=["CPUExecutionProvider"])
        if providers != ["CPUExecutionProvider"]:  # which the engine that it is compared with has
            self.made.append(self)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, io: Any, run_options: Any = None) -> None:
        if "run" in self.breaks:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        graph = run_options.get_run_config_entry("gpu_graph_id") if run_options else None
        self.runs.append(graph)
        is_new = graph not in (None, "-1", *self.graphs)
        assert self.graphs.setdefault(str(graph), io) is io or graph in (None, "-1")
        for _ in range(3 if is_new else 1):
            self._session.run_with_iobinding(io, run_options)


@pytest.fixture
def graph_session(monkeypatch: pytest.MonkeyPatch) -> type[GraphSession]:
    import onnxruntime

    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    monkeypatch.setattr(ort_device_engine, "require_gpu", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", GraphSession)
    monkeypatch.setattr(
        onnxruntime.OrtValue,
        "ortvalue_from_shape_and_type",
        lambda shape, kind, device, number: allocate(shape, kind, {"cuda": "cpu"}[device], number),
    )
    monkeypatch.setattr(GraphSession, "made", [])
    monkeypatch.setattr(GraphSession, "breaks", set())
    return GraphSession


def test_cuda_graphs_are_asked_for_with_a_graph_for_each_shape_and_none_for_chunks_of_the_prompt(
    workshop: Workshop, graph_session: type[GraphSession]
):
    bundle = workshop.bundle("small")
    expected, engine = OrtEngine(bundle, threads=THREADS), open_engine(bundle, "cuda", cuda_graphs=True)
    (session,) = graph_session.made
    assert session.providers == [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
    engine.prefill([[*range(3, 14)]], [11], [0])
    expected.prefill([[*range(3, 14)]], [11], [0])
    for size, with_logits in ((8, False), (8, False), (8, True), (1, False), (8, False), (8, True)):
        asked: dict[str, Any] = {"with_logits": with_logits}
        given = engine.forward([[5] * size], [1], [11], **asked)
        assert given[:2] == expected.forward([[5] * size], [1], [11], **asked)[:2]
    engine.forward([[5] * 8], [1], [250])  # a larger extent
    assert session.runs == ["-1", "1", "1", "2", "3", "1", "2", "4"]
    engine.close()


def test_tokens_are_the_cpu_engines_whatever_runs_a_forward_several_times(
    workshop: Workshop, graph_session: type[GraphSession]
):
    bundle = workshop.bundle("small")
    prompt = [*range(3, 40)]
    with load(bundle.path, provider="cuda", cuda_graphs=True, draft_model=bundle.path) as model:
        for method in ("jacobi", "jacobi-block", "speculative"):
            options: dict[str, Any] = {"method": method, "max_new_tokens": 30, "block_size": 8, "ignore_eos": True}
            found = model.generate(prompt, **options)
            plain = {"method": method if method != "speculative" else "jacobi"}
            assert found.token_ids == workshop.model("small").generate(prompt, **options | plain).token_ids  # type: ignore[arg-type]
    assert [session.providers for session in graph_session.made] == [
        [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
    ] * 2


def test_without_the_option_nothing_is_recorded(workshop: Workshop, graph_session: type[GraphSession]):
    engine = open_engine(workshop.bundle("small"), "cuda")
    engine.forward([[5] * 8], [1], [0])
    (session,) = graph_session.made
    assert session.providers == ["CUDAExecutionProvider"]
    assert session.runs == [None]


def test_a_failure_says_to_leave_graphs_out_where_they_were_asked_for(
    workshop: Workshop, graph_session: type[GraphSession]
):
    bundle, advice = workshop.bundle("small"), "leave cuda_graphs out"
    with_graphs, without = open_engine(bundle, "cuda", cuda_graphs=True), open_engine(bundle, "cuda")
    graph_session.breaks.add("run")
    with pytest.raises(EngineError, match=f"operation not permitted when stream is capturing.*{advice}"):
        with_graphs.forward([[5] * 8], [1], [0])
    with pytest.raises(EngineError, match=r"operation not permitted when stream is capturing$"):
        without.forward([[5] * 8], [1], [0])
    graph_session.breaks.add("load")
    with pytest.raises(EngineError, match=f"have not been partitioned.*{advice}"):
        open_engine(bundle, "cuda", cuda_graphs=True)


@pytest.mark.parametrize("provider", ["cpu", "tensorrt"])
def test_graphs_of_onnx_runtime_are_refused_beside_other_providers(tmp_path: Path, provider: Provider):
    with pytest.raises(OptionError, match=f"cuda_graphs is for the provider cuda, got {provider}"):
        load(write_bundle(tmp_path / "bundle").path, provider=provider, cuda_graphs=True)
    with pytest.raises(OptionError, match="for the device cuda, got 'cpu'"):
        OrtDeviceEngine(write_bundle(tmp_path / "other"), device="cpu", cuda_graphs=True)
