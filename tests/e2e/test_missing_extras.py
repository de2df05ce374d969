"""Without an extra: what needs it prints its install line, and everything else works."""

from __future__ import annotations

import json

import pytest

from cllm_export.extras import install_line
from tests.conftest import PINNED, Workshop
from tests.e2e.conftest import assert_refused, run_process

EXPORT_INSTALL = install_line("export")
CPU_INSTALL = install_line("cpu")
FEW = ("--max-new-tokens", 4, "--threads", 1)


def without(*packages: str) -> str:
    """Python that hides packages, as if they had never been installed."""
    return f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize("package", ["torch", "transformers", "onnx", "onnx_ir", "onnxscript"])
def test_build_without_the_export_extra_prints_its_install_line(workshop: Workshop, tmp_path, package: str):
    """Hidden are this package and what comes heavily after it, which nothing may import first."""
    hidden = (package, "torch") if package != "transformers" else ("transformers",)
    outcome = run_process("build", workshop.checkpoint("llama"), "--output", tmp_path / "b", prelude=without(*hidden))
    assert_refused(outcome, EXPORT_INSTALL, "not installed")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_comparison_with_the_checkpoint_without_torch_prints_the_install_line(workshop: Workshop, command: str):
    arguments = (workshop.bundle("llama", **PINNED).path, "--checkpoint", workshop.checkpoint("llama"), *FEW)
    assert_refused(run_process(command, *arguments, prelude=without("torch", "transformers")), EXPORT_INSTALL)


def test_quantize_without_torch_prints_the_install_line(workshop: Workshop, tmp_path):
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out" / "bundle"
    prompts.write_text('{"prompt": "hello"}')
    options = ("--against", workshop.bundle("llama").path, "--prompts", prompts, "--output", output)
    outcome = run_process(
        *("quantize", workshop.checkpoint("llama"), *options, "--precision", "int8-dynamic"), prelude=without("torch")
    )
    assert_refused(outcome, EXPORT_INSTALL)
    assert not output.parent.exists()


@pytest.mark.parametrize("command", ["generate", "verify", "bench"])
def test_an_engine_command_without_onnxruntime_prints_the_install_line(workshop: Workshop, command: str):
    outcome = run_process(command, workshop.bundle("llama").path, stdin=b"hello", prelude=without("onnxruntime"))
    assert_refused(outcome, "onnxruntime", CPU_INSTALL)


def test_the_runtime_extra_alone_generates_inspects_verifies_and_times(workshop: Workshop, tmp_path):
    bundle = workshop.copy(workshop.bundle("llama"), tmp_path / "bundle").path
    lean = without("torch", "transformers", "onnx", "onnx_ir", "onnxscript")
    [line] = run_process("generate", bundle, "hello", "--json", *FEW, prelude=lean, check=True).out.splitlines()
    assert json.loads(line)["token_ids"]
    run_process("verify", bundle, *FEW, prelude=lean, check=True)
    run_process("bench", workshop.bundle("llama", **PINNED).path, "--repeats", 1, *FEW, prelude=lean, check=True)
    assert "verified" in run_process("inspect", bundle, prelude=lean + without("onnxruntime"), check=True).out
