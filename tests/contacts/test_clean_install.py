"""A clean environment that pip fills with the runtime alone: what a production image holds.

The development environment has torch, so it cannot see a dependency that the package forgot to state, nor one that the
runtime must not have.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cllm_export.bundle.manifest import Bundle
from tests.conftest import Workshop
from tests.contacts.environments import ROOT, copy_source, install, new_environment, run

PROMPT = "The SQL database has table city with columns name, population. Question: how many cities are there?"
GENERATE = ("generate", "--max-new-tokens", "24", "--threads", "1", "--block-size", "8", "--json")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment into which pip installed ``cllm-export[cpu]``, from a copy of the sources."""
    directory = tmp_path_factory.mktemp("clean")
    source, python = copy_source(directory), new_environment(Path(sys.executable), directory / "venv")
    install(python, "--constraint", source / "constraints.txt", f"{source}[cpu]")
    return python


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Bundle:
    return workshop.bundle("demo")


@pytest.mark.parametrize("package", ["torch", "transformers", "onnx", "onnxscript", "pyarrow", "matplotlib"])
def test_the_runtime_installs_nothing_heavy(python: Path, tmp_path: Path, package: str):
    outcome = run(python, "-c", f"import {package}", cwd=tmp_path)
    assert "ModuleNotFoundError" in outcome.stderr


def test_every_module_of_the_runtime_imports(python: Path, tmp_path: Path):
    """A dependency that nobody stated is missing here, and nowhere else."""
    walk = (
        "import importlib, pkgutil, cllm_export.runtime as top\n"
        "for found in pkgutil.walk_packages(top.__path__, 'cllm_export.runtime.'):\n"
        "    importlib.import_module(found.name)\n"
    )
    outcome = run(python, "-c", walk, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


def test_it_decodes_what_the_development_environment_decodes(python: Path, tmp_path: Path, bundle: Bundle):
    here, there = (
        run(Path(interpreter), "-m", "cllm_export", *GENERATE, bundle.path, PROMPT, cwd=directory)
        for interpreter, directory in ((sys.executable, ROOT), (python, tmp_path))
    )
    assert here.returncode == there.returncode == 0, there.stderr
    assert json.loads(there.stdout)["token_ids"] == json.loads(here.stdout)["token_ids"]


@pytest.mark.parametrize("command", ["inspect", "plan-memory"])
def test_commands_of_the_runtime_work(python: Path, tmp_path: Path, bundle: Bundle, command: str):
    outcome = run(python, "-m", "cllm_export", command, bundle.path, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr


def test_help_of_every_command_is_shown(python: Path, tmp_path: Path):
    """The command line imports nothing that an extra installs before it is asked for something."""
    listed = run(python, "-c", "from cllm_export.cli.app import ORDER; print(*ORDER)", cwd=tmp_path).stdout.split()
    for command in listed:
        outcome = run(python, "-m", "cllm_export", command, "--help", cwd=tmp_path)
        assert outcome.returncode == 0, (command, outcome.stderr)


def test_a_build_says_which_extra_is_missing(python: Path, tmp_path: Path):
    checkpoint = ROOT / "examples" / "text_to_sql" / "checkpoint"
    outcome = run(python, "-m", "cllm_export", "build", checkpoint, "--output", tmp_path / "bundle", cwd=tmp_path)
    assert outcome.returncode == 2
    assert f"pip install '{python.parents[2] / 'source'}[export]'" in " ".join(outcome.stderr.split())
    assert not (tmp_path / "bundle").exists()


def test_the_line_of_a_missing_extra_installs_it(python: Path, tmp_path: Path, bundle: Bundle):
    """A wheel without extras cannot decode. Its message is run as it stands, and it decodes."""
    source = python.parents[2] / "source"
    wheel = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "dist", source]
    subprocess.run(wheel, check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    lean = tmp_path / "venv" / "bin" / "python"
    [file] = (tmp_path / "dist").iterdir()
    subprocess.run([lean, "-m", "pip", "install", "--quiet", file], check=True)
    outcome = run(lean, "-m", "cllm_export", *GENERATE, bundle.path, PROMPT, cwd=tmp_path)
    assert outcome.returncode == 2
    line = " ".join(outcome.stderr.split()).partition("install it with: ")[2]
    assert shlex.split(line) == ["pip", "install", f"{file}[cpu]"]
    path = f"{lean.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(line, shell=True, check=True, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)
    outcome = run(lean, "-m", "cllm_export", *GENERATE, bundle.path, PROMPT, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
