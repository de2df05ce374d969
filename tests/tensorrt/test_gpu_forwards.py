"""The benchmark for the first GPU runs over what there is without one: every figure is measured or says why not.

Its times mean nothing here. What is checked is that each is there and positive, that shares follow from them, and that
what crosses the bus is what the engine's buffers come to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cllm_export.bundle.manifest import Bundle
from cllm_export.runtime.engines.onnxruntime import OrtEngine
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.plan_options import PlanOptions
from tests.conftest import THREADS, Workshop
from tests.tensorrt.simulation import SimulatedGpu

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
SIZES = (1, 8, 32)
"""The plan has profiles for the first two."""
PROMPTS = ("select a", "where b")
REPORTS = ["on_cpu", "on_device_cpu", "simulated"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark, which finds its own modules beside it."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import gpu_forwards

        yield gpu_forwards
    for name in set(sys.modules) - before:
        if name.startswith("gpu_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def bundle(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return workshop.copy(workshop.bundle("small", max_length=96), tmp_path_factory.mktemp("forwards") / "bundle")


@pytest.fixture(scope="module")
def settings(script: ModuleType) -> Any:
    return script.Settings(
        rounds=2,
        past=20,
        tokens=8,
        sizes=SIZES,
        block_size=8,
        forwards_per_sync=(1, 4),
        product_size=16,
        copy_bytes=1 << 16,
        prompts=PROMPTS,
        max_new_tokens=8,
    )


@pytest.fixture(scope="module")
def on_cpu(script: ModuleType, bundle: Bundle, settings: Any) -> dict[str, Any]:
    with ExitStack() as owned:
        return script.measure(script.open_subject(bundle, "cpu", owned, slots=1, threads=THREADS), settings)


@pytest.fixture(scope="module")
def on_device_cpu(script: ModuleType, bundle: Bundle, settings: Any) -> dict[str, Any]:
    """What the provider ``cuda`` runs, without CUDA: an engine of ONNX Runtime's device, and one that there is not."""
    with ExitStack() as owned:
        subject = script.open_subject(bundle, "cpu", owned, slots=1, threads=THREADS)
        subject.engines = {False: OrtEngine(bundle, copies=True), True: "it was refused"}
        return script.measure(subject, settings)


@pytest.fixture(scope="module")
def simulated(
    script: ModuleType, bundle: Bundle, settings: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    from gpu_probes import open_tensorrt

    device = SimulatedGpu()
    gpu = replace(device.gpu, compiler=device.compiler(tmp_path_factory.mktemp("kernels")))
    build_plan(bundle, PlanOptions(batch_size=2, block_sizes=(1, 8), prefill_chunk=16, kv_lengths=(64,)), gpu=gpu)
    with ExitStack() as owned:
        yield script.measure(open_tensorrt(bundle, gpu, owned), settings)
    assert device.cuda.is_empty(), "something was left on the device"


def figures(report: Any) -> Iterator[dict[str, Any]]:
    """Every figure of a report: what has a median, or a reason instead."""
    children = report.values() if isinstance(report, dict) else report if isinstance(report, list) else ()
    if isinstance(report, dict) and {"median", "not_measured"} & set(report):
        yield report
    for child in children:
        yield from figures(child)


def row(report: dict[str, Any], part: str, **labels: Any) -> dict[str, Any]:
    (found,) = (each for each in report[part] if all(each[name] == value for name, value in labels.items()))
    return found


@pytest.mark.parametrize("name", REPORTS)
def test_every_figure_is_ordered_quartiles_or_has_a_reason(name: str, request: pytest.FixtureRequest) -> None:
    found = list(figures(request.getfixturevalue(name)))
    assert len(found) > 30
    for each in found:
        if "not_measured" in each:
            assert each["not_measured"].strip()
        else:
            assert each["low"] <= each["median"] <= each["high"]


@pytest.mark.parametrize("name", REPORTS)
def test_forwards_are_shares_of_the_ceilings_of_their_round(name: str, request: pytest.FixtureRequest) -> None:
    report = request.getfixturevalue(name)
    assert all(ceiling["median"] > 0 for ceiling in report["ceilings"].values())
    for form in {each["cuda_graphs"] for each in report["forwards"] if "median" in each["seconds"]}:
        one, eight = (row(report, "forwards", cuda_graphs=form, block_size=size) for size in (1, 8))
        assert one["over_one"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert eight["operations"] > 7 * one["operations"] > 0
        assert eight["bytes"] > one["bytes"] > report["bundle"]["weight_bytes"]
        for each in (one, eight):
            assert all(each[key]["median"] > 0 for key in ("seconds", "bandwidth_share", "matrix_share"))


def test_a_forward_reads_weights_and_rows_in_sight_and_each_row_sees_those_before_it(
    script: ModuleType, bundle: Bundle
) -> None:
    of_bundle, manifest = bundle.manifest.geometry, bundle.manifest
    geometry = replace(of_bundle, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
    work = script.Work(parameters=1000, weight_bytes=5000)
    read, done = script.forward_work(replace(manifest, geometry=geometry), work, slots=2, size=2, past=10)
    assert read == 5000 + 2 * 12 * (2 * 3 * 2 * 8 * 4)
    assert done == 2 * (2 * 1000 * 2 + 3 * 4 * (2 * 2 * 8) * (11 + 12))


def test_a_table_that_rows_are_looked_up_in_is_not_read_by_every_forward(script: ModuleType, tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    def stored(name: str, *dims: int) -> Any:
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=dims, data_location=1)
        tensor.external_data.add(key="location", value="weights.bin")
        tensor.external_data.add(key="length", value=str(4 * dims[0] * (dims[1] if len(dims) > 1 else 1)))
        return tensor

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("RMSNormalization", ["rows", "norm"], ["normed"]),
        helper.make_node("MatMul", ["normed", "matrix"], ["out"]),
    ]
    weights = [stored("table", 9, 4), stored("norm", 4), stored("matrix", 4, 6)]
    graph = helper.make_graph(nodes, "untied", [], [], initializer=weights)
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    work = script.read_work(SimpleNamespace(graph_path=lambda: tmp_path / "model.onnx"))
    assert work == script.Work(parameters=4 * 6, weight_bytes=4 * (4 * 6 + 4))


def test_what_a_provider_lacks_is_named(on_cpu: dict[str, Any], simulated: dict[str, Any]) -> None:
    assert "no profile" in row(simulated, "forwards", cuda_graphs=True, block_size=32)["seconds"]["not_measured"]
    loop = row(on_cpu, "loops", block_size=8, forwards_per_sync=4)
    assert "forwards_per_sync is for TensorRT" in loop["wall_seconds"]["not_measured"]
    assert "over a bus" in row(on_cpu, "bus", block_size=8, forwards_per_sync=None)["not_measured"]


def test_a_loop_on_the_device_waits_less_often(simulated: dict[str, Any]) -> None:
    host = row(simulated, "loops", block_size=1, forwards_per_sync=None, cuda_graphs=True)
    assert host["syncs_per_token"]["median"] == 1.0, "a wait for each forward, and a forward for each token"
    four = row(simulated, "loops", block_size=1, forwards_per_sync=4)
    assert 0 < four["syncs_per_token"]["median"] < 1.0
    for each in simulated["loops"]:
        assert each["wall_seconds"]["median"] > 0
        assert "median" in each["overhead_seconds"]


@pytest.mark.parametrize("form", [True, False])
def test_what_crosses_the_bus_is_the_block_and_two_numbers_in_and_the_predictions_and_one_out(
    simulated: dict[str, Any], form: bool
) -> None:
    found = row(simulated, "bus", block_size=8, forwards_per_sync=None, cuda_graphs=form)
    assert found["to_device"] == 2 * 8 * (8 + 2)
    assert found["to_host"] == 2 * 8 * (8 + 1)


def test_a_loop_on_the_device_is_told_nothing_between_launches(simulated: dict[str, Any]) -> None:
    one, four = (row(simulated, "bus", block_size=8, forwards_per_sync=k) for k in (1, 4))
    assert 0 < four["to_host"] <= one["to_host"] + 4 * 2 * (8 + 1), "a launch copies its ring, full or not"


def test_onnx_runtime_s_copies_are_counted_where_the_engine_makes_them(on_device_cpu: dict[str, Any]) -> None:
    found = row(on_device_cpu, "bus", block_size=8, forwards_per_sync=None, cuda_graphs=False)
    assert (found["to_device"], found["to_host"]) == (8 * (8 + 2), 8 * (8 + 1))


def test_an_engine_that_is_refused_leaves_its_reason_everywhere_and_the_other_s_figures(
    on_device_cpu: dict[str, Any],
) -> None:
    for part in ("forwards", "loops", "decoding"):
        refused = [each for each in on_device_cpu[part] if each["cuda_graphs"]]
        assert {figure["not_measured"] for figure in figures(refused)} == {"it was refused"}
        assert any("median" in figure for figure in figures(on_device_cpu[part]))


def test_jacobi_decoding_is_compared_with_autoregressive_and_loses_nothing(simulated: dict[str, Any]) -> None:
    for each in simulated["decoding"]:
        assert each["tokens_per_second"]["median"] > 0
        assert each["differing_sequences"] == 0
    assert row(simulated, "decoding", cuda_graphs=True, method="autoregressive")["tokens_per_forward"]["median"] == 1.0


def test_without_prompts_decoding_says_so(script: ModuleType, bundle: Bundle, settings: Any) -> None:
    few = replace(settings, prompts=(), sizes=(1,), forwards_per_sync=(1,), rounds=1)
    with ExitStack() as owned:
        report = script.measure(script.open_subject(bundle, "cpu", owned, slots=1, threads=THREADS), few)
    for each in report["decoding"]:
        assert each["tokens_per_second"] == each["differing_sequences"] == {
            "not_measured": "no --prompts were given"
        }  # fmt: skip


def test_the_text_has_a_line_for_what_was_not_measured(
    script: ModuleType, on_cpu: dict[str, Any], simulated: dict[str, Any]
) -> None:
    assert "not measured: form graphs, n 32; form no graphs, n 32: the plan has no profile" in script.show(simulated)
    text = script.show(on_cpu)
    assert "not measured: n 1; n 8" not in text.split("loops")[0]
    assert "forwards_per_sync is for TensorRT" in text
    assert "for 1 B parameters" in text.splitlines()[-1]


def test_where_the_provider_is_not_there_it_ends_in_one_sentence(
    script: ModuleType, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cllm_export.runtime.engines import cuda

    monkeypatch.setattr(cuda, "probe_driver", lambda: "the NVIDIA driver finds no GPU")
    for provider in ("cuda", "tensorrt"):
        monkeypatch.setattr(sys, "argv", ["gpu_forwards.py", str(bundle.path), "--provider", provider])
        with pytest.raises(SystemExit, match="needs an NVIDIA GPU, and the NVIDIA driver finds no GPU"):
            script.main()
