"""Imports point one way, the runtime stays light, and the public names are the ones promised."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cllm_export

PACKAGE = Path(cllm_export.__file__).parent
ROOT = PACKAGE.parent
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "tensorrt", "cuda"}
EXPORT_ONLY = {"torch", "transformers", "onnx"}
ALLOWED = {
    "errors": set(),
    "contract": {"errors"},
    "linked": {"errors"},
    "quantization": {"contract", "errors"},
    "bundle": {"contract", "errors", "linked", "quantization"},
    "extras": {"errors"},
    "prompts": {"errors"},
    "sizes": {"errors"},
    "cuda": {"errors"},
    "tensorrt_library": {"cuda", "errors"},
    "plans": {"bundle", "contract", "errors"},
    "device_memory": {"bundle", "contract", "errors"},
    "traces": {"bundle", "contract", "errors", "prompts", "runtime"},
    "doctor": {"cuda", "errors", "tensorrt_library"},
    "runtime": {"bundle", "contract", "cuda", "errors", "plans", "prompts", "runtime", "tensorrt_library"},
    "scales": {"bundle", "contract", "errors", "linked"},
    "calibration": {
        "__version__",
        "bundle",
        "calibration",
        "contract",
        "display",
        "errors",
        "evaluation",
        "exporter",
        "extras",
        "linked",
        "prompts",
        "quantization",
        "runtime",
        "scales",
        "verify",
    },
    "evaluation": {
        "bench",
        "bundle",
        "contract",
        "errors",
        "evaluation",
        "exporter",
        "extras",
        "prompts",
        "runtime",
        "training",
    },
}
"""Module or folder of the package -> what of the package it may import."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place_of(path: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        yield from _names(node)


def imports_at_load(path: Path) -> Iterator[str]:
    """Full names of what a file imports when it is itself imported."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        yield from _names(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute, so that this test can read them"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def places_imported(path: Path) -> set[str]:
    """Modules and folders of the package that a file imports."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("cllm_export.")}


@pytest.mark.parametrize("module", ["cllm_export", "cllm_export.runtime", "cllm_export.bundle"])
def test_importing_the_runtime_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({HEAVY} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_point_one_way(place):
    files = [path for path in modules() if place_of(path) == place]
    assert files
    for path in files:
        assert places_imported(path) <= ALLOWED[place], path


def test_plans_are_built_without_torch_or_onnx():
    code = "import sys, cllm_export.exporter.plan; print(*sorted({'torch', 'onnx', 'tensorrt'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_the_exporter_never_imports_the_command_line():
    for path in modules():
        if place_of(path) == "exporter":
            assert "cli" not in places_imported(path), path


def test_only_the_exporter_and_the_training_load_torch_transformers_or_onnx():
    for path in modules():
        if place_of(path) not in ("exporter", "training"):
            loaded = {name.split(".")[0] for name in imports_at_load(path)}
            assert not loaded & EXPORT_ONLY, path


def test_only_the_command_line_and_the_evaluation_import_the_training_and_only_when_they_need_it():
    """What stands in its ``__init__`` loads nothing, and may be imported by any of them."""
    training = {f"cllm_export.training.{path.stem}" for path in modules() if place_of(path) == "training"}
    for path in modules():
        place = place_of(path)
        if place not in ("training", "cli", "evaluation"):
            assert "training" not in places_imported(path), path
        if place != "training":
            loaded = {".".join(name.split(".")[:3]) for name in imports_at_load(path)}
            assert not loaded & training, path


def test_the_package_loads_neither_exporter_nor_command_line():
    assert places_imported(PACKAGE / "__init__.py") <= {"errors", "runtime"}


def test_the_public_names_are_the_ones_promised():
    promised = ["CllmExportError", "Generation", "Handle", "Model", "Service", "__version__", "load"]
    assert sorted(cllm_export.__all__) == promised
    assert all(hasattr(cllm_export, name) for name in cllm_export.__all__)
