"""``doctor``: what it says of a machine with nothing, with everything, and with what does not fit together."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from cllm_export.errors import GpuError
from cllm_export.runtime.engines import cuda
from cllm_export.runtime.engines.cuda import GpuFacts, probe_driver
from cllm_export.tensorrt import doctor
from cllm_export.tensorrt.library import TENSORRT, Library, open_gpu

FACTS = GpuFacts(name="A GPU", compute_capability="9.0", memory=80_000_000_000, driver="12.9")


class Driver:
    """The driver's library, as ctypes gives it."""

    def __init__(self, *, status: int = 0, devices: int = 1) -> None:
        self._status, self._devices = status, devices

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._devices
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12090
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with these packages, and with a driver and a GPU if ``driver`` is given."""

    def make(packages: dict[str, str], driver: Driver | None = None, providers: tuple[str, ...] = ()) -> dict[str, Any]:
        def load(name: str, **_: Any) -> Any:
            if driver is None or name != cuda.DRIVER_LIBRARY:
                raise OSError(name)
            return driver

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(doctor, "_version", packages.get)
        monkeypatch.setattr(doctor, "_providers", lambda: list(providers))
        monkeypatch.setattr(doctor, "_facts", lambda: FACTS if "cuda-bindings" in packages else None)
        monkeypatch.setattr("cllm_export.tensorrt.library.import_library", lambda library: None)
        return doctor.report(doctor.examine())

    return make


def states(report: dict[str, Any]) -> dict[str, str]:
    return {finding["name"]: finding["state"] for finding in report["findings"]}


def test_a_machine_with_nothing_is_told_what_to_install(machine: Any):
    report = machine({})
    assert states(report) == {
        "driver": "missing",
        "GPU": "missing",
        "cuda-python": "missing",
        "TensorRT": "missing",
        "TensorRT for RTX": "not needed",
        "ONNX Runtime": "missing",
        "cuDNN": "not needed",
    }
    assert report["engines"] == {"cpu": False, "tensorrt": False, "tensorrt-rtx": False}
    missing = [each for each in report["findings"] if each["state"] == "missing" and each["name"] != "GPU"]
    assert all(each["fix"] for each in missing)


def test_a_machine_with_everything_needs_nothing(machine: Any):
    packages = {
        "cuda-bindings": "12.9.1",
        "tensorrt": "11.4.0.106",
        "tensorrt-rtx-cu13-bindings": "1.7.1.116",
        "onnxruntime-gpu": "1.32.0",
        "nvidia-cudnn-cu12": "9.9",
    }
    report = machine(packages, Driver(), ("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert set(states(report).values()) == {"ok"}
    assert not any(finding["fix"] for finding in report["findings"])
    assert report["engines"] == {"cpu": True, "tensorrt": True, "tensorrt-rtx": True}


@pytest.mark.parametrize(
    ("package", "version", "name", "detail", "fix"),
    [
        ("tensorrt", "10.14.1.48", "TensorRT", "older than 10.15", "tensorrt>=10.15"),
        ("tensorrt-rtx-cu13-bindings", "1.6.0", "TensorRT for RTX", "older than 1.7", "tensorrt-rtx-cu13-libs>=1.7"),
        ("cuda-bindings", "12.6.0", "cuda-python", "older than 12.8", "cuda-python>=12.8"),
        ("cuda-bindings", "13.0.0", "cuda-python", "the driver takes up to 12.9", "cuda-python==12.*"),
        ("onnxruntime-gpu", "1.27.0", "ONNX Runtime", "older than 1.28", "onnxruntime-gpu>=1.28"),
        ("onnxruntime", "1.32.0", "ONNX Runtime", "overwrite each other", "pip uninstall"),
    ],
)
def test_what_does_not_fit_is_named_with_the_line_that_mends_it(
    machine: Any, package: str, version: str, name: str, detail: str, fix: str
):
    packages = {"cuda-bindings": "12.9.1", "tensorrt": "11.4.0.106", "onnxruntime-gpu": "1.32.0"} | {package: version}
    report = machine(packages, Driver())
    [finding] = [finding for finding in report["findings"] if finding["name"] == name]
    assert finding["state"] == "mismatch"
    assert detail in finding["detail"]
    assert fix in finding["fix"]


def test_tensorrt_for_rtx_is_loaded_without_a_gpu(machine: Any, monkeypatch: pytest.MonkeyPatch):
    """A build server has none. The library for data-centre cards would crash there, and is only looked up."""
    packages, loaded = {"tensorrt": "11.4.0.106", "tensorrt-rtx-cu13-bindings": "1.7.1.116"}, []
    report = machine(packages)
    [finding] = [each for each in report["findings"] if each["name"] == "TensorRT for RTX"]
    assert (finding["state"], finding["detail"]) == ("ok", "1.7.1.116, loads, without a GPU too")
    assert report["engines"]["tensorrt-rtx"] is False, "there is no card to run a plan on"

    def fail(library: Library) -> None:
        loaded.append(library.name)
        raise GpuError("it does not load: libtensorrt_rtx.so.1 is not there")

    monkeypatch.setattr("cllm_export.tensorrt.library.import_library", fail)
    [finding] = [each for each in map(vars, doctor.examine()) if each["name"] == "TensorRT for RTX"]
    assert (finding["state"], loaded) == ("mismatch", ["tensorrt-rtx"])
    assert "tensorrt-rtx-cu13-libs==1.7.1.116" in finding["fix"]


def test_cudnn_is_missed_only_where_onnx_runtimes_cuda_provider_is(machine: Any):
    assert states(machine({"onnxruntime": "1.32.0"}))["cuDNN"] == "not needed"
    assert states(machine({"onnxruntime-gpu": "1.32.0"}))["cuDNN"] == "missing"


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(status=100), r"does not start \(CUDA error 100\)"),
        (Driver(devices=0), "finds no GPU"),
        (None, "libcuda.so.1 is not on this machine"),
    ],
)
def test_without_a_gpu_everything_for_one_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, driver: Driver | None, reason: str
):
    def load(name: str, **_: Any) -> Any:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(GpuError, match=f"needs an NVIDIA GPU, and .*{reason}; see what"):
        open_gpu()
    assert probe_driver()


def test_an_older_tensorrt_is_refused():
    TENSORRT.require_version("10.15.1.29")
    with pytest.raises(GpuError, match=r"TensorRT 10.14.1.48 is too old.*pip install 'tensorrt>=10.15'"):
        TENSORRT.require_version("10.14.1.48")
