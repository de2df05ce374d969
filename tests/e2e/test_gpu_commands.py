"""The commands for a GPU on a machine that has none, and those about GPUs that run anywhere."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from cllm_export.runtime.engines.cuda import DRIVER_LIBRARY
from tests.conftest import DEMO
from tests.e2e.conftest import Cli
from tests.fakes import write_bundle


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without NVIDIA's driver, whatever this one has."""
    load = ctypes.CDLL

    def load_but_the_driver(name: Any, *arguments: Any, **options: Any) -> Any:
        if name == DRIVER_LIBRARY:
            raise OSError(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(ctypes, "CDLL", load_but_the_driver)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "BUNDLE"],
        ["generate", "BUNDLE", "--provider", "tensorrt", "a prompt"],
        ["generate", "BUNDLE", "--provider", "tensorrt-rtx", "a prompt"],
        ["generate", "BUNDLE", "--provider", "cuda", "a prompt"],
        ["build", str(DEMO / "checkpoint"), "--output", "OUTPUT", "--target", "tensorrt"],
    ],
    ids=["plan", "generate by TensorRT", "generate by TensorRT for RTX", "generate by CUDA", "build"],
)
def test_without_a_gpu_a_command_for_one_ends_in_one_sentence_and_writes_nothing(
    cli: Cli, tmp_path: Path, arguments: list[str]
):
    write_bundle(tmp_path / "BUNDLE")
    before = sorted(tmp_path.rglob("*"))
    outcome = cli(*(tmp_path / word if word.isupper() else word for word in arguments))
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line == (
        f"error: this needs an NVIDIA GPU, and the driver's library {DRIVER_LIBRARY} is not on this machine; "
        "see what this machine has with: cllm-export doctor"
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["generate", "bench", "verify"])
def test_a_plan_is_refused_for_a_provider_that_runs_none_and_if_there_is_none(cli: Cli, tmp_path: Path, command: str):
    bundle = write_bundle(tmp_path / "bundle")
    given = (command, bundle.path, *(["a prompt"] if command == "generate" else []), "--plan", "0123")
    outcome = cli(*given)
    assert outcome.code == 2
    said = "error: --plan is for --provider tensorrt and tensorrt-rtx, got '0123' and --provider cpu: leave --plan out"
    assert outcome.err.splitlines() == [said]
    outcome = cli(*given, "--provider", "tensorrt-rtx")
    assert outcome.code == 2
    assert "has no plan, so none of key '0123'; build one with: cllm-export plan BUNDLE" in outcome.err


def test_doctor_reports_on_a_machine_without_a_gpu(cli: Cli):
    outcome = cli("doctor")
    assert outcome.code == 0
    assert "driver" in outcome.out
    assert "fix: install NVIDIA's driver" in outcome.out
    report = json.loads(cli("doctor", "--json").out)
    assert report["engines"] == {"cpu": True, "tensorrt": False, "tensorrt-rtx": False}
    assert {finding["name"] for finding in report["findings"]} >= {"driver", "GPU", "TensorRT", "ONNX Runtime", "cuDNN"}


def test_plan_memory_shows_each_figure_and_how_it_comes_about(cli: Cli, tmp_path: Path):
    write_bundle(tmp_path / "bundle")
    shown = cli("plan-memory", tmp_path / "bundle", "--precision", "fp16", "--workspace", "512MB")
    assert shown.code == 0
    assert "x 2 / 4 for fp16" in shown.out
    found = json.loads(cli("plan-memory", tmp_path / "bundle", "--json").out)
    assert [figure["name"] for figure in found["figures"]][:2] == ["weights", "KV cache"]
    assert found["verdict"]["fits"] is True
    small = cli("plan-memory", tmp_path / "bundle", "--device-memory", "1KB")
    assert (small.code, "does not fit: " in small.out) == (1, True)
    assert "--device-memory must be a size" in cli("plan-memory", tmp_path / "bundle", "--device-memory", "much").err
    assert cli("plan-memory", tmp_path / "bundle", "--block-size", "99").code == 2
    assert "--workspace must be a size" in cli("plan-memory", tmp_path / "bundle", "--workspace", "much").err
