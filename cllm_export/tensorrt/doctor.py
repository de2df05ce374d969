"""Report which parts of the GPU stack this machine has, which are missing or mismatched, and how to fix each.

It works on a machine without any of them: before the driver is found, packages are looked up, not imported. Only
TensorRT for RTX is imported anywhere, because it loads anywhere. Nothing is built or run: only a plan that runs shows
that plans run here.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cllm_export.errors import CllmExportError
from cllm_export.extras import install_line
from cllm_export.runtime.engines.cuda import DRIVER_LIBRARY, GpuFacts, open_cuda, probe_driver, version_text
from cllm_export.tensorrt.library import TENSORRT, TENSORRT_RTX, Library, version_numbers

State = Literal["ok", "missing", "mismatch", "not needed"]

OLDEST_CUDA_PYTHON = (12, 8)
OLDEST_ORT = (1, 28)
TENSORRT_PACKAGES = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
RTX_LIBRARIES = "tensorrt-rtx-cu13-libs"
"""What the bindings of TensorRT for RTX load, and do not depend on."""
CUDNN = "libcudnn.so.9"
PIP = "pip install '{}'"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One part of the stack."""

    name: str
    state: State
    detail: str
    fix: str | None = None
    """The command or instruction that fixes it."""


def examine() -> list[Finding]:
    """All findings, starting with the driver."""
    driver = _driver()
    facts = _facts() if driver.state == "ok" else None
    findings = [driver, _gpu(driver, facts), _cuda_python(facts), _tensorrt(facts), _tensorrt_rtx()]
    return [*findings, _onnxruntime(driver.state == "ok"), _cudnn()]


def report(findings: list[Finding]) -> dict[str, Any]:
    """The findings in JSON form, and which engines can run."""
    state = {finding.name: finding.state for finding in findings}
    gpu = state["driver"] == "ok" and state["GPU"] == "ok"
    device = gpu and state["cuda-python"] == "ok"
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "findings": [asdict(finding) for finding in findings],
        "engines": {
            "cpu": state["ONNX Runtime"] in ("ok", "not needed"),
            "tensorrt": device and state["TensorRT"] == "ok",
            "tensorrt-rtx": device and state["TensorRT for RTX"] == "ok",
        },
    }


def _driver() -> Finding:
    if reason := probe_driver():
        fix = (
            "install NVIDIA's driver for this system, or start the container with --gpus all (Jetson: --runtime nvidia)"
        )
        return Finding(name="driver", state="missing", detail=reason, fix=fix)
    number = ctypes.c_int(0)
    ctypes.CDLL(DRIVER_LIBRARY).cuDriverGetVersion(ctypes.byref(number))
    return Finding(name="driver", state="ok", detail=f"takes CUDA up to {version_text(number.value)}")


def _facts() -> GpuFacts | None:
    try:
        return open_cuda().facts()
    except (CllmExportError, RuntimeError, OSError):
        return None


def _gpu(driver: Finding, facts: GpuFacts | None) -> Finding:
    if driver.state != "ok":
        return Finding(name="GPU", state="missing", detail="none without a driver")
    if facts is None:
        return Finding(name="GPU", state="missing", detail="there is one; cuda-python is needed to ask it more")
    memory = f"{facts.memory / 1e9:.1f} GB"
    return Finding(
        name="GPU", state="ok", detail=f"{facts.name}, compute capability {facts.compute_capability}, {memory}"
    )


def _cuda_python(facts: GpuFacts | None) -> Finding:
    version, fix = _version("cuda-bindings"), PIP.format("cuda-python>=12.8")
    if version is None:
        return Finding(name="cuda-python", state="missing", detail="not installed", fix=fix)
    numbers = version_numbers(version)
    if numbers[:2] < OLDEST_CUDA_PYTHON:
        return Finding(name="cuda-python", state="mismatch", detail=f"{version} is older than 12.8", fix=fix)
    if facts and numbers[0] > version_numbers(facts.driver)[0]:
        major = version_numbers(facts.driver)[0]
        return Finding(
            name="cuda-python",
            state="mismatch",
            detail=f"{version} is for CUDA {numbers[0]}, the driver takes up to {facts.driver}",
            fix=PIP.format(f"cuda-python=={major}.*"),
        )
    return Finding(name="cuda-python", state="ok", detail=version)


def _tensorrt(facts: GpuFacts | None) -> Finding:
    found = next((version for version in map(_version, TENSORRT_PACKAGES) if version), None)
    oldest = TENSORRT.oldest_text
    if found is None:
        fix = PIP.format(f"tensorrt>={oldest}") + "; on a Jetson it comes with JetPack: see docs/tensorrt.md"
        return Finding(name="TensorRT", state="missing", detail="not installed", fix=fix)
    if version_numbers(found)[:2] < TENSORRT.oldest:
        fix = PIP.format(f"tensorrt>={oldest}")
        return Finding(name="TensorRT", state="mismatch", detail=f"{found} is older than {oldest}", fix=fix)
    if facts is None:
        return Finding(name="TensorRT", state="ok", detail=f"{found}, not loaded: there is no GPU to load it for")
    return _loaded(TENSORRT, found)


def _tensorrt_rtx() -> Finding:
    """TensorRT for RTX builds plans on any machine, so it is loaded without a GPU too."""
    name, package, found = TENSORRT_RTX.title, TENSORRT_RTX.package, _version(TENSORRT_RTX.package)
    if found is None:
        fix = install_line("tensorrt-rtx")
        return Finding(name=name, state="not needed", detail="not installed; for plans for RTX cards", fix=fix)
    if version_numbers(found)[:2] < TENSORRT_RTX.oldest:
        oldest = TENSORRT_RTX.oldest_text
        fix = PIP.format(f"{package}>={oldest}") + f" '{RTX_LIBRARIES}>={oldest}'"
        return Finding(name=name, state="mismatch", detail=f"{found} is older than {oldest}", fix=fix)
    return _loaded(TENSORRT_RTX, found)


def _loaded(library: Library, version: str) -> Finding:
    from cllm_export.tensorrt.library import import_library

    try:
        import_library(library)
    except CllmExportError as error:
        fix = f"pip install --force-reinstall '{library.package}=={version}'"
        fix += f" '{RTX_LIBRARIES}=={version}'" if library is TENSORRT_RTX else ""
        return Finding(name=library.title, state="mismatch", detail=str(error), fix=fix)
    without = ", without a GPU too" if library.targets else ""
    return Finding(name=library.title, state="ok", detail=f"{version}, loads{without}")


def _onnxruntime(has_driver: bool) -> Finding:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if not both:
        fix = f"{install_line('cpu')}, or on a GPU: {install_line('cuda')}"
        return Finding(name="ONNX Runtime", state="missing", detail="not installed", fix=fix)
    if len(both) == 2:
        fix = "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one that is wanted"
        return Finding(
            name="ONNX Runtime",
            state="mismatch",
            detail="onnxruntime and onnxruntime-gpu overwrite each other",
            fix=fix,
        )
    version = _version(both[0]) or ""
    if version_numbers(version)[:2] < OLDEST_ORT:
        fix = PIP.format(f"{both[0]}>=1.28")
        return Finding(name="ONNX Runtime", state="mismatch", detail=f"{version} is older than 1.28", fix=fix)
    providers = _providers()
    detail = f"{both[0]} {version}, providers {', '.join(providers)}"
    if has_driver and "CUDAExecutionProvider" not in providers:
        fix = f"pip uninstall -y onnxruntime; {install_line('cuda')}"
        return Finding(name="ONNX Runtime", state="ok", detail=detail + "; for the CPU alone", fix=fix)
    return Finding(name="ONNX Runtime", state="ok", detail=detail)


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _cudnn() -> Finding:
    """cuDNN is needed only by ONNX Runtime's CUDA provider. TensorRT would use it for convolutions, of which this
    project's graphs have none."""
    version = _version("nvidia-cudnn-cu13") or _version("nvidia-cudnn-cu12")
    if version is None and _loads(CUDNN):
        version = "of the system"
    if version is not None:
        return Finding(name="cuDNN", state="ok", detail=version)
    if _version("onnxruntime-gpu") is None:
        return Finding(name="cuDNN", state="not needed", detail="only ONNX Runtime's CUDA provider needs it")
    fix = PIP.format("nvidia-cudnn-cu13")
    return Finding(name="cuDNN", state="missing", detail=f"{CUDNN} is not there, and onnxruntime-gpu needs it", fix=fix)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _version(package: str, lookup: Callable[[str], str] = importlib.metadata.version) -> str | None:
    try:
        return lookup(package)
    except importlib.metadata.PackageNotFoundError:
        return None
