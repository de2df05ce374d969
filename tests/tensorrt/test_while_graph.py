"""The calls that make a WHILE node, against doubles of both cuda-pythons, with mistakes that must be found.

What the loop computes is tested in ``tests/acceptance/test_device_loop.py``. Nothing here ran on a GPU.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_export.errors import WhileGraphError
from cllm_export.runtime.engines import cuda as cuda_module
from cllm_export.tensorrt.loop.condition_kernel import KINDS, SOURCE
from cllm_export.tensorrt.loop.while_graph import ALLOWED, WhileGraph
from tests.fakes import properties
from tests.tensorrt.doubles import CudaDouble, Nonconforming, describe
from tests.tensorrt.install import CUDA
from tests.tensorrt.simulation import SET_CONDITIONAL, Node, SimulatedCuda, compile_for_cpu

TURNS = 5

MISTAKES = [
    ("self.versions()[1] >= CUDA_13", "True"),
    ("self.versions()[1] >= CUDA_13", "False"),
    ("graph, [], [], 0, node", "graph, [], 0, node"),
    ("int(runtime.cudaGraphConditionalHandleFlags.cudaGraphCondAssignDefault)", "0"),
    ("cudaGraphConditionalHandleFlags", "cudaGraphConditionalFlags"),
    ('"cudaGraphConditionalHandleCreate", graph, 1, at_launch', '"cudaGraphConditionalHandleCreate", graph, 1'),
    ('"cudaGraphConditionalHandleCreate", graph, 1, at_launch', '"cudaGraphConditionalHandleCreate", graph, 0, 1'),
    ("cudaGraphCondTypeWhile", "cudaGraphCondTypeIf"),
    ("cudaGraphNodeTypeConditional", "cudaGraphNodeTypeGraph"),
    ("node.conditional.handle = handle", "node.handle = handle"),
    ("node.conditional.size = 1", "pass"),
    ("node.conditional.phGraph_out[0]", "node.conditional.graph_out[0]"),
    ("stream, graph, [], [], 0, self._capture_mode", "stream, graph, [], 0, self._capture_mode"),
    ("stream, graph, [], [], 0, self._capture_mode", "stream, graph, [], [], 0, 1"),
    ('"cudaStreamBeginCaptureToGraph"', '"cudaStreamBeginCaptureInGraph"'),
    ('            yield\n        except BaseException:\n            self.runtime.cudaStreamEndCapture(stream)\n'
     '            raise\n        self._call("cudaStreamEndCapture", stream)',
     "            yield\n        finally:\n            pass"),
    ('self._call("cudaGraphGetNodes", graph, count) if count', 'self._call("cudaGraphGetNodes", graph) if count'),
    ('"cudaGraphNodeGetType", node', '"cudaGraphNodeGetKind", node'),
    ('self._call("cudaGraphDestroy", graph)', "pass"),
]  # fmt: skip


def use(cuda_class: Any, version: str) -> int:
    """How often a body runs that ends after so many turns; everything must be gone afterwards."""
    simulated = SimulatedCuda()
    cuda = cuda_class(CudaDouble(describe("cuda", version)["runtime"], simulated))
    stream, turns = cuda.make_stream(), []

    def enqueue(handle: int) -> None:
        def run() -> None:
            turns.append(handle)
            simulated.set_conditional(handle, len(turns) < TURNS)

        simulated.enqueue(stream, run)

    graph = WhileGraph(cuda, stream, enqueue)
    graph.launch()
    cuda.synchronize(stream)
    graph.close()
    cuda.destroy_stream(stream)
    assert simulated.is_empty(), "something was left"
    return len(turns)


@pytest.mark.parametrize("version", CUDA)
def test_without_a_mistake_the_body_runs_until_it_ends(version: str):
    assert use(cuda_module.Cuda, version) == TURNS


@pytest.mark.parametrize(("right", "wrong"), MISTAKES, ids=[wrong[:50] for _, wrong in MISTAKES])
def test_a_mistake_is_found_by_one_of_the_versions(right: str, wrong: str):
    path = Path(str(cuda_module.__file__))
    source = path.read_text(encoding="utf-8")
    assert right in source, f"{path.name} no longer holds {right!r}: this tests nothing"
    mistaken = ModuleType(cuda_module.__name__)
    exec(compile(source.replace(right, wrong), str(path), "exec"), vars(mistaken))
    seen = []
    for version in CUDA:
        try:
            seen.append(use(vars(mistaken)["Cuda"], version))
        except (Nonconforming, Exception):
            return
    assert seen != [TURNS] * len(CUDA), "the mistake went unseen"


def record(kinds: list[str], *, inside_child: bool) -> None:
    """A body of these kinds of nodes, or of a child graph that holds them."""
    simulated = SimulatedCuda()
    cuda = cuda_module.Cuda(CudaDouble(describe("cuda", CUDA[-1])["runtime"], simulated))
    stream, child = cuda.make_stream(), 77

    def enqueue(handle: int) -> None:
        if inside_child:
            simulated.graphs[child] = [Node(kind, lambda: None) for kind in kinds]
            simulated.enqueue(stream, lambda: None, "Graph", child)
        else:
            for kind in kinds:
                simulated.enqueue(stream, lambda: None, kind)

    try:
        WhileGraph(cuda, stream, enqueue).close()
    finally:
        simulated.graphs.pop(child, None)
        cuda.destroy_stream(stream)
        assert simulated.is_empty(), "something was left"


FORBIDDEN = ["Host", "EventRecord", "WaitEvent", "MemAlloc", "MemFree", "ExtSemaphoreSignal", "ExtSemaphoreWait"]


@pytest.mark.parametrize("inside_child", [False, True], ids=["in the body", "in a child graph"])
@pytest.mark.parametrize("kind", FORBIDDEN)
def test_a_body_with_a_node_that_none_may_hold_is_refused_by_name(kind: str, inside_child: bool):
    with pytest.raises(WhileGraphError, match=f"may not hold nodes of kind {kind}$"):
        record(["Kernel", kind], inside_child=inside_child)


def test_a_body_of_allowed_nodes_is_taken():
    record(sorted(ALLOWED - {"Graph"}), inside_child=False)
    record(["Kernel", "Memcpy"], inside_child=True)


@pytest.fixture(scope="module")
def condition(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel that sets the handle, as a function of the CPU that gives (handle, value)."""
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    assert compile_for_cpu(SOURCE, path)
    library, calls = ctypes.CDLL(str(path)), []
    callback = SET_CONDITIONAL(lambda handle, value: calls.append((handle, value)))
    ctypes.c_void_p.in_dll(library, "cudaGraphSetConditional").value = ctypes.cast(callback, ctypes.c_void_p).value

    def call(*arguments: Any) -> tuple[int, int]:
        calls.clear()
        library.repeat_or_end(0, *(kind(value) for kind, value in zip(KINDS, arguments, strict=True)))
        (call,) = calls
        assert callback
        return call

    return call


@properties
@given(data=st.data())
def test_the_loop_goes_on_while_a_request_runs_fits_and_may_take_another_forward(condition: Any, data: st.DataObject):
    slots, n, kv_length, most = (data.draw(st.integers(low, high)) for low, high in ((1, 4), (1, 6), (6, 12), (1, 4)))
    write_index = np.array(data.draw(st.lists(st.integers(0, 12), min_size=slots, max_size=slots)), np.int64)
    left = np.array(data.draw(st.lists(st.integers(0, 2), min_size=slots, max_size=slots)), np.int32)
    forwards = np.array([data.draw(st.integers(0, 4))], np.int32)
    taken, handle = int(forwards[0]), data.draw(st.integers(1, 2**64 - 1))
    addresses = (array.ctypes.data for array in (write_index, left, forwards))
    running = [slot for slot in range(slots) if left[slot]]
    fits = all(write_index[slot] + n <= kv_length for slot in running)
    expected = bool(running) and fits and taken + 1 < most
    assert condition(*addresses, n, kv_length, most, slots, handle) == (handle, expected)
    assert forwards[0] == taken + 1


@pytest.mark.parametrize("version", CUDA)
def test_every_kind_that_is_told_apart_is_the_bindings_own(version: str):
    known = describe("cuda", version)["runtime"]["enums"]["cudaGraphNodeType"]
    assert {f"cudaGraphNodeType{kind}" for kind in (*ALLOWED, *FORBIDDEN)} <= set(known)
