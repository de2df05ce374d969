"""``verify`` on a plan: it runs on TensorRT's engine, and its certificate is for that engine alone.

Nothing here ran on a GPU: the engine runs over the simulated one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cllm_export.bundle.inspect import describe
from cllm_export.bundle.manifest import PARITY_NAME, Bundle
from cllm_export.runtime.decoding.block_size.exact_sizes import ExactSizes
from cllm_export.runtime.load import load
from cllm_export.runtime.model import Model
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.plan_options import PlanOptions
from cllm_export.verification.report import VerifyOptions
from cllm_export.verification.verify import verify
from tests.conftest import THREADS, Workshop
from tests.tensorrt.simulation import SimulatedGpu

SIZES = (8, 16)
CHOSEN = [8, 16]
"""The sizes of the plan that ``auto`` chooses among."""


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return workshop.copy(workshop.bundle("small", max_length=96), tmp_path / "bundle")


@pytest.fixture
def machine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    simulated = SimulatedGpu()
    options = PlanOptions(batch_size=2, block_sizes=SIZES, prefill_chunk=16, kv_lengths=(32, 64, 159))
    build_plan(bundle, options, gpu=simulated.gpu)
    monkeypatch.setattr("cllm_export.tensorrt.library.open_gpu", lambda _: simulated.gpu)
    return simulated


def auto_sizes_without_comparison(model: Model, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the certificate spares the comparison of the first request."""
    asked: list[object] = []
    compare = "cllm_export.runtime.decoding.block_size.auto_sizes.compare_sizes"
    monkeypatch.setattr(compare, lambda *given: asked.append(given) or ExactSizes())
    model.generate([5, 6], max_new_tokens=2, ignore_eos=True)
    return not asked


def test_a_certificate_of_a_plan_names_its_gpu_and_counts_for_it_alone(
    machine: SimulatedGpu, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    parity = verify(bundle, options=VerifyOptions(provider="tensorrt", threads=THREADS, max_new_tokens=6))
    assert parity.passed, [check for check in parity.checks if check.passed is False]
    assert machine.cuda.is_empty(), "verify left something on the device"
    facts = machine.gpu.facts
    report = json.loads((bundle.path / PARITY_NAME).read_text())
    expected = {"provider": "tensorrt", "device": facts.name, "driver": facts.driver, "tensorrt": machine.gpu.version}
    expected["plan"] = next(path.parent.name for path in bundle.path.glob("plans/*/plan.json"))
    assert {name: report["conditions"][name] for name in expected} == expected
    assert "onnxruntime" not in report["conditions"]
    assert report["exact_sizes"] == {"equal": CHOSEN, "different": [], "num_slots": [2]}
    assert f"provider tensorrt on {facts.name}, fp32, TensorRT {machine.gpu.version}" in describe(bundle)["parity"]
    with load(bundle.path, provider="tensorrt") as model:
        assert auto_sizes_without_comparison(model, monkeypatch)
        assert model.auto_sizes == tuple(CHOSEN)
    with load(bundle.path, threads=THREADS, num_slots=2) as model:
        assert not auto_sizes_without_comparison(model, monkeypatch)


def test_the_sizes_of_the_plan_that_was_asked_for_are_compared(machine: SimulatedGpu, bundle: Bundle):
    """A newer plan beside it has other sizes."""
    (key,) = (path.parent.name for path in bundle.path.glob("plans/*/plan.json"))
    build_plan(bundle, PlanOptions(batch_size=1, block_sizes=(4,), kv_lengths=(159,)), gpu=machine.gpu)
    options = VerifyOptions(provider="tensorrt", plan=key, threads=THREADS, max_new_tokens=6)
    assert verify(bundle, options=options).exact_sizes == {"equal": CHOSEN, "different": [], "num_slots": [2]}
