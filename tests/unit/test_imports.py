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

FLOORS = """
errors
checks  extras  progress  prompts
bundle
runtime.engines
runtime.decoding.block_size  runtime.decoding.drafts  runtime.decoding.prefix
runtime.decoding
runtime.decoding.lookahead  tensorrt
tensorrt.loop
runtime
exporter.checkpoint  exporter.lint
exporter.graph
exporter.quantize  exporter.weights  exporter.parity
exporter
training.data
training.model
training.collection
training
evaluation.sandbox  evaluation.sql
evaluation.tasks
verification
measure
evaluation
calibration
calibration.search
cli.show  cli.before
cli
__init__  __main__
"""
"""The house, from the ground up: every folder of the package, and every module beside its root.

A file imports from its own folder and from floors below; folders on one floor know nothing of each other. ``__init__``
is the package's face and may name anything.
"""
FLOOR_OF = {place: floor for floor, line in enumerate(FLOORS.strip().splitlines()) for place in line.split()}
MOST_FILES = 16
"""Modules of a folder, ``__init__`` included."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in modules()}


def place_of(module: str) -> str:
    """The folder that a module belongs to; of a module beside the package's root, itself."""
    module = module.removesuffix(".__init__") if module != "__init__" else module
    if (PACKAGE / module.replace(".", "/")).is_dir():
        return module
    return module.rpartition(".")[0] or module


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


def own_imports(names: Iterator[str]) -> set[str]:
    """The package's modules among imported names."""
    inside = (name.removeprefix("cllm_export.") for name in names if name.startswith("cllm_export."))
    found = (name if name in MODULES or f"{name}.__init__" in MODULES else name.rpartition(".")[0] for name in inside)
    return {module for module in found if module}


def loaded_by(code: str, packages: set[str]) -> list[str]:
    """Which of these packages a new process has loaded after some code."""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sorted({packages} & set(sys.modules)))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


@pytest.mark.parametrize("module", ["cllm_export", "cllm_export.runtime.service", "cllm_export.bundle.manifest"])
def test_importing_the_runtime_loads_nothing_heavy(module):
    assert loaded_by(f"import {module}", HEAVY) == []


def test_a_signal_is_understood_before_anything_that_takes_long_is_imported():
    """The entry point sets its handlers, and imports the commands after that."""
    assert loaded_by("import cllm_export.cli", HEAVY | {"numpy", "tokenizers", "typer", "rich"}) == []


def test_safetensors_brings_no_framework():
    """The runtime depends on it, and opens files with it as numpy arrays."""
    frameworks = {"torch", "tensorflow", "jax", "mlx", "paddle"}
    code = "import safetensors.numpy, cllm_export.bundle.scales, cllm_export.runtime.decoding.prefix.prefix_snapshot"
    assert loaded_by(code, frameworks | HEAVY | {"safetensors"}) == ["safetensors"]


def test_the_command_line_loads_nothing_heavy():
    """Its help, and its refusal of an argument, need no torch."""
    assert loaded_by("import cllm_export.cli.entry", HEAVY) == []


def test_every_folder_stands_on_a_floor():
    assert {place_of(module) for module in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    here = place_of(module)
    for imported in own_imports(imports_of(MODULES[module])):
        there = place_of(imported)
        assert there == here or FLOOR_OF[there] < FLOOR_OF[here], f"{module} imports {imported}"


def test_no_module_imports_itself_in_a_circle():
    """Within a folder as well, at load: a circle breaks whoever is imported first."""
    arrows = {module: own_imports(imports_at_load(path)) & set(MODULES) for module, path in MODULES.items()}
    waiting, done = list(arrows), set()
    while waiting:
        ready = [module for module in waiting if arrows[module] - {module} <= done]
        assert ready, f"these import each other in a circle: {waiting}"
        done.update(ready)
        waiting = [module for module in waiting if module not in done]


def test_no_folder_is_a_heap():
    """Five modules beside the package's root, and few enough in a folder to be read at a glance."""
    beside = {module for module in MODULES if "." not in module} - {"__init__", "__main__"}
    assert len(beside) <= 5
    for folder in {path.parent for path in MODULES.values()}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def test_unit_tests_mirror_the_tree():
    for folder in (path for path in (ROOT / "tests" / "unit").rglob("*") if path.is_dir() and path.name[0] != "_"):
        assert (PACKAGE / folder.relative_to(ROOT / "tests" / "unit")).is_dir(), folder


def test_plans_are_built_without_torch_or_onnx():
    assert loaded_by("import cllm_export.tensorrt.build_plan", {"torch", "onnx", "tensorrt"}) == []


def test_only_exporter_and_training_load_torch_transformers_or_onnx():
    for module, path in MODULES.items():
        if module.split(".")[0] not in ("exporter", "training"):
            loaded = {name.split(".")[0] for name in imports_at_load(path)}
            assert not loaded & EXPORT_ONLY, module


def test_training_is_loaded_only_by_itself():
    """Others import it where they need it. Its ``__init__`` loads nothing, and may be imported by any of them.

    So may its classes of options, which the command line is made of: see that it loads nothing heavy.
    """
    options = {module for module in MODULES if module.startswith("training.") and module.endswith(".options")}
    for module, path in MODULES.items():
        if module.split(".")[0] != "training":
            loaded = own_imports(imports_at_load(path)) - {"training", *options}
            assert not any(name.split(".")[0] == "training" for name in loaded), module


def test_the_face_loads_its_errors_alone():
    """A signal in the first second of a command is understood, as nothing that takes long is imported before."""
    assert own_imports(imports_at_load(PACKAGE / "__init__.py")) == {"errors"}


def test_every_public_name_can_be_imported():
    """Those that need torch are imported when they are named, not before."""
    pytest.importorskip("torch")
    for name in cllm_export.__all__:
        assert getattr(cllm_export, name) is not None
    assert set(cllm_export.__all__) <= set(dir(cllm_export))


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        cllm_export.nothing  # noqa: B018


def test_every_error_a_caller_may_catch_is_public():
    """Those of the runtime, of a build and of a verification; other commands' errors are caught by their base."""
    for name in ("OptionError", "PromptError", "QueueFullError", "EngineError", "BundleError", "CheckpointError"):
        assert issubclass(getattr(cllm_export, name), cllm_export.CllmExportError)
