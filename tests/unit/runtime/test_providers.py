"""Engines on a device: what is refused and why. That their tokens are right is shown in tests/acceptance."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from onnxruntime import InferenceSession as RealSession

from cllm_export.bundle.contract import Batch
from cllm_export.errors import EngineError, GpuError, OptionError
from cllm_export.extras import install_line
from cllm_export.runtime.decoding.block_size.certificate import differences
from cllm_export.runtime.engines import cuda
from cllm_export.runtime.engines import onnxruntime as ort_engine
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.runtime.load import Provider, load, open_engine
from tests.conftest import PINNED, THREADS, Workshop
from tests.fakes import write_bundle


def test_an_unknown_provider_is_refused_by_name(tmp_path: Path):
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(OptionError, match="provider must be one of cpu, cuda, tensorrt, tensorrt-rtx, got 'gpu'"):
        load(bundle.path, provider="gpu")  # type: ignore[arg-type]


def test_onnx_runtime_for_the_cpu_is_refused_with_the_line_that_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ort_engine, "require_gpu", lambda: None)
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(GpuError, match=f"has no CUDAExecutionProvider.*{re.escape(install_line('cuda'))}"):
        open_engine(bundle, "cuda")


def test_a_provider_that_did_not_start_is_no_silent_fall_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime goes on with the CPU where CUDA's libraries are missing."""
    import onnxruntime

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort_engine, "require_gpu", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(GpuError, match="did not start its CUDAExecutionProvider"):
        OrtEngine(write_bundle(tmp_path / "bundle"), device="cuda")


def test_a_forward_that_cannot_be_right_is_refused(workshop: Workshop):
    engine = OrtEngine(workshop.bundle("small"), copies=True, num_slots=2)
    for blocks, committed, write_index, message in (
        ([[1]], [1], [0], "each of 2 slots"),
        ([[1], [1]], [1, 1], [0, 10_000], "cache rows"),
        ([[1, 2], [1]], [1, 1], [0, 0], "must all have 2 tokens"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.forward(Batch(blocks, committed, write_index))
    engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.forward(Batch([[1], [1]], [1, 1], [0, 0]))


def test_a_pinned_graph_takes_its_own_shapes_alone(workshop: Workshop):
    bundle = workshop.bundle("small", **PINNED)
    engine = OrtEngine(bundle, copies=True)
    size = PINNED["block_size"]
    engine.prefill(Batch([[1] * size], [size], [0]))
    assert len(engine.forward(Batch([[1] * size], [1], [size])).next_ids[0]) == size
    with pytest.raises(EngineError, match=f"pinned to blocks of {size}, got 4"):
        engine.forward(Batch([[1] * 4], [1], [0]))
    with pytest.raises(EngineError, match="pinned to 1 slots"):
        OrtEngine(bundle, copies=True, num_slots=2)


def test_onnx_runtime_says_nothing_of_a_copy_of_the_cache(workshop: Workshop, capfd: pytest.CaptureFixture[str]):
    engine = OrtEngine(workshop.bundle("small"), copies=True, num_slots=1, log_severity=2)
    engine.forward(Batch([[1] * 8], [1], [0]))
    engine.forward(Batch([[1] * 8], [1], [8]))
    assert "in-place" not in capfd.readouterr().err


class GraphSession:
    """ONNX Runtime with a CUDA provider that records graphs, as far as its API shows: it computes on the CPU.

    A run whose graph is new runs several times over, as the real one does before it records; a graph that comes with
    another binding than it was recorded with would be replayed over the wrong addresses.
    """

    made: ClassVar[list[Any]] = []
    options: ClassVar[list[Any]] = []
    """What every session was made with."""
    breaks: ClassVar[set[str]] = set()

    def __init__(self, path: str, options: Any, *, providers: list[Any]) -> None:
        if "load" in self.breaks:
            raise RuntimeError("nodes have not been partitioned to the CUDAExecutionProvider")
        self.options.append(options)
        self.providers = providers
        self.graphs: dict[str, Any] = {}
        self.runs: list[str | None] = []
        self._session = RealSession(path, options, providers=["CPUExecutionProvider"])
        if providers != ["CPUExecutionProvider"]:  # which the engine that it is compared with has
            self.made.append(self)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """As the real one: every option of the provider, those that nobody gave included."""
        given = dict(self.providers[0][1]) if isinstance(self.providers[0], tuple) else {}
        return {
            "CUDAExecutionProvider": {"use_tf32": "1", "enable_cuda_graph": "0"} | given,
            "CPUExecutionProvider": {},
        }

    def io_binding(self) -> Any:
        io = self._session.io_binding()
        io.owner = self  # as a binding keeps its session
        return io

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
    monkeypatch.setattr(ort_engine, "require_gpu", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", GraphSession)
    monkeypatch.setattr(
        onnxruntime.OrtValue,
        "ortvalue_from_shape_and_type",
        lambda shape, kind, device, number: allocate(shape, kind, "cpu", number),
    )
    monkeypatch.setattr(GraphSession, "made", [])
    monkeypatch.setattr(GraphSession, "options", [])
    monkeypatch.setattr(GraphSession, "breaks", set())
    return GraphSession


def test_cuda_graphs_are_asked_for_with_a_graph_for_each_shape_and_none_for_chunks_of_the_prompt(
    workshop: Workshop, graph_session: type[GraphSession]
):
    bundle = workshop.bundle("small")
    expected, engine = OrtEngine(bundle, threads=THREADS), open_engine(bundle, "cuda", cuda_graphs=True)
    (session,) = graph_session.made
    assert session.providers == [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
    engine.prefill(Batch([[*range(3, 14)]], [11], [0]))
    expected.prefill(Batch([[*range(3, 14)]], [11], [0]))
    for size, with_logits in ((8, False), (8, False), (8, True), (1, False), (8, False), (8, True)):
        asked: dict[str, Any] = {"with_logits": with_logits}
        given = engine.forward(Batch([[5] * size], [1], [11]), **asked)
        assert given[:2] == expected.forward(Batch([[5] * size], [1], [11]), **asked)[:2]
    engine.forward(Batch([[5] * 8], [1], [250]))  # a larger KV length
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


@pytest.mark.parametrize("options", [{}, {"copies": True}, {"device": "cuda"}], ids=["cpu", "copies", "cuda"])
def test_sessions_of_every_device_have_the_same_options(
    workshop: Workshop, graph_session: type[GraphSession], options: dict[str, Any]
):
    """Threads as asked for, and Q/DQ as written."""
    OrtEngine(workshop.bundle("small"), threads=3, **options)
    (found,) = graph_session.options
    assert found.intra_op_num_threads == 3
    assert found.get_session_config_entry("session.disable_quant_qdq") == "1"


def test_an_engine_says_all_that_its_kernels_are_chosen_by(
    workshop: Workshop, graph_session: type[GraphSession], monkeypatch: pytest.MonkeyPatch
):
    """A certificate of other settings must not count."""
    bundle = workshop.bundle("small")
    facts = OrtEngine(bundle, threads=2).describe()
    assert set(facts) == {"device", "features", "threads", "onnxruntime", "session_options", "provider_options"}
    assert facts["session_options"] == {
        "graph_optimization_level": "ORT_ENABLE_ALL",
        "session.disable_quant_qdq": "1",
    }
    assert {options.graph_optimization_level.name for options in graph_session.options} == {"ORT_ENABLE_ALL"}
    plain, recorded = (open_engine(bundle, "cuda", cuda_graphs=graphs).describe() for graphs in (False, True))
    assert differences(plain, recorded | {"device": "a GPU"}) == ["cuda_graphs", "device", "provider_options"]
    assert plain["provider_options"]["use_tf32"] == "1"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    other = open_engine(bundle, "cuda").describe() | {"device": "a GPU"}
    assert differences(plain | {"device": "a GPU"}, other) == ["environment"]


def test_packages_of_kernels_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch):
    class Package(NamedTuple):
        metadata: dict[str, str]
        version: str

    names = ("nvidia_cublas_cu12", "nvidia-cudnn-cu13", "nvidia-ml-py", "numpy")
    monkeypatch.setattr(cuda, "distributions", lambda: [Package({"Name": name}, "9.1") for name in names])
    assert cuda.describe_cuda()["libraries"] == {"nvidia-cublas-cu12": "9.1", "nvidia-cudnn-cu13": "9.1"}


def test_threads_reach_the_engine_of_every_provider(workshop: Workshop, graph_session: type[GraphSession]):
    for provider in ("cpu", "cuda"):
        open_engine(workshop.bundle("small"), provider, threads=3)
    assert [options.intra_op_num_threads for options in graph_session.options] == [3, 3]


def test_rows_that_were_written_are_read_and_no_others_change(workshop: Workshop):
    """Through a device's buffers as through the host's, in a slot and at a row that are not the first."""
    bundle, found = workshop.bundle("small"), []
    for copies in (False, True):
        engine = OrtEngine(bundle, num_slots=3, threads=THREADS, copies=copies)
        engine.prefill(Batch([[*range(start, start + 20)] for start in (3, 40, 70)], [20] * 3, [0] * 3))
        before = {past: engine.read_cache(past) for past in engine.cache_addresses}
        rows = engine.read_rows(1, 4, 15)
        engine.write_rows(2, 4, 15, rows)
        assert np.array_equal(engine.read_rows(2, 4, 15), rows)
        for index, (past, array) in enumerate(before.items()):
            array[2, :, 4:15] = rows[index]
            assert np.array_equal(engine.read_cache(past), array)
        assert engine.read_rows(0, 7, 7).shape[2] == 0
        found.append(rows)
    assert found[0].any()
    assert np.array_equal(*found)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_prompt_that_was_read_is_not_read_again_on_a_device(
    workshop: Workshop, graph_session: type[GraphSession], cuda_graphs: bool
):
    bundle, prompt = workshop.bundle("small"), [*range(3, 40)]
    options: dict[str, Any] = {"max_new_tokens": 20, "block_size": 8, "ignore_eos": True}
    with load(bundle.path, provider="cuda", cuda_graphs=cuda_graphs) as model:
        first, again = model.generate(prompt, **options), model.generate(prompt, **options)
    assert (first.statistics.reused_tokens, again.statistics.reused_tokens) == (0, len(prompt) - 1)
    assert first.token_ids == again.token_ids == workshop.model("small").generate(prompt, **options).token_ids


def test_a_kv_length_costs_a_graph_only_where_graphs_are_recorded(
    workshop: Workshop, graph_session: type[GraphSession]
):
    bundle, numbers = workshop.bundle("small"), {}
    for cuda_graphs in (False, True):
        engine = OrtEngine(bundle, device="cuda", cuda_graphs=cuda_graphs)
        for start in range(0, 200, 8):
            engine.forward(Batch([[5] * 8], [1], [start]))
        numbers[cuda_graphs] = set(graph_session.made[-1].runs)
    assert numbers == {False: {None}, True: {"1"}}


def test_a_closed_engine_holds_no_session(workshop: Workshop, graph_session: type[GraphSession]):
    engine = OrtEngine(workshop.bundle("small"), device="cuda")
    engine.forward(Batch([[5] * 8], [1], [0]))
    session = weakref.ref(graph_session.made.pop())
    engine.close()
    gc.collect()
    assert session() is None


def test_without_the_option_nothing_is_recorded(workshop: Workshop, graph_session: type[GraphSession]):
    engine = open_engine(workshop.bundle("small"), "cuda")
    engine.forward(Batch([[5] * 8], [1], [0]))
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
        with_graphs.forward(Batch([[5] * 8], [1], [0]))
    with pytest.raises(EngineError, match=r"operation not permitted when stream is capturing$"):
        without.forward(Batch([[5] * 8], [1], [0]))
    graph_session.breaks.add("load")
    with pytest.raises(EngineError, match=f"have not been partitioned.*{advice}"):
        open_engine(bundle, "cuda", cuda_graphs=True)


@pytest.mark.parametrize("provider", ["cpu", "tensorrt"])
def test_graphs_of_onnx_runtime_are_refused_beside_other_providers(tmp_path: Path, provider: Provider):
    with pytest.raises(OptionError, match=f"cuda_graphs is for the provider cuda, got {provider}"):
        load(write_bundle(tmp_path / "bundle").path, provider=provider, cuda_graphs=True)
    with pytest.raises(OptionError, match="for the device cuda, got 'cpu'"):
        OrtEngine(write_bundle(tmp_path / "other"), cuda_graphs=True)
