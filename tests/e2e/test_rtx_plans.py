"""`plan --engine tensorrt-rtx`: what is inside a plan. What is refused ends in one sentence, with nothing written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from cllm_export.bundle.manifest import Bundle, describe_files, open_bundle, write_manifest
from cllm_export.extras import install_line
from cllm_export.tensorrt import memory
from cllm_export.tensorrt.build_plan import build_plan
from cllm_export.tensorrt.library import TENSORRT_RTX
from cllm_export.tensorrt.plan_options import PlanOptions
from tests.conftest import Workshop
from tests.e2e.conftest import Cli
from tests.tensorrt.rtx.plans import require_library

NO_REASON = r"Int64 binding|logger passed into|--- (Begin|End) node"
FOR_SM89 = ("--engine", "tensorrt-rtx", "--for", "sm89", "--block-size", "4")


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return workshop.copy(workshop.bundle("small"), tmp_path / "bundle")


@pytest.fixture
def refused(cli: Cli, bundle: Bundle) -> Callable[..., str]:
    """Run `plan`, and give its one sentence. Nothing of the bundle's directory may have changed."""

    def run(*arguments: str) -> str:
        before = {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}
        outcome = cli("plan", bundle.path, *(arguments or FOR_SM89))
        assert outcome.code == 2, outcome.err
        sentences = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1
        assert outcome.err.splitlines()[-1] == sentences[0], "the sentence is one line, and the last"
        assert {path: path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()} == before
        return sentences[0]

    return run


def test_without_the_wheel_the_line_that_installs_it_is_named(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, TENSORRT_RTX.module, None)  # type: ignore[arg-type]
    assert install_line("tensorrt-rtx") in refused()


def test_an_older_library_is_refused(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, TENSORRT_RTX.module, SimpleNamespace(__version__="1.6.0.12"))  # type: ignore[arg-type]
    assert "TensorRT for RTX 1.6.0.12 is too old: the graphs need 1.7 or newer" in refused()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "tensorrt-rtx", "--for", "sm99"), "--for must be one of sm75, sm80, sm86, sm89, sm120, sm121"),
        (("--engine", "tensorrt-rtx"), "builds for named generations: give --for"),
        (("--for", "sm89"), "--for is for tensorrt-rtx, leave it out"),
        ((*FOR_SM89, "--strip-weights"), "takes no --strip-weights"),
        ((*FOR_SM89, "--version-compatible"), "takes no --version-compatible"),
        ((*FOR_SM89, "--hardware", "ampere+"), "takes no --hardware"),
    ],
    ids=["no such target", "no target", "a target for the other library", "stripped", "compatible", "hardware"],
)
def test_what_the_library_cannot_build_is_refused_by_name(
    refused: Callable[..., str], arguments: tuple[str, ...], said: str
):
    assert said in refused(*arguments)


def test_fp32_is_refused_for_cards_whose_kernels_have_none(refused: Callable[..., str]):
    """The builder says so too, but after it has parsed and in words of its own."""
    require_library()
    said = refused("--engine", "tensorrt-rtx", "--for", "sm89", "--for", "sm75")
    assert "is a bundle with fp32, which sm75 does not have: build the bundle with --precision fp16" in said


def test_a_build_that_would_run_out_of_memory_is_refused_before_it_starts(
    refused: Callable[..., str], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    require_library()
    needed = memory.BUILDER_BYTES + round((memory.WEIGHT_COPIES - memory.PAGES) * bundle.weight_bytes)
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 10)
    assert f"needs about {needed:,} bytes of this machine's memory, and {needed - 10:,} are free" in refused()


def test_a_directory_that_cannot_hold_plans_is_refused(refused: Callable[..., str], bundle: Bundle):
    require_library()
    (bundle.path / "plans").write_text("a file, where a directory should be")
    assert f"cannot write beside {bundle.path / 'plans'}" in refused()


def test_a_truncated_plan_is_refused_and_replaced_by_force(refused: Callable[..., str], bundle: Bundle, cli: Cli):
    require_library()
    assert cli("plan", bundle.path, *FOR_SM89).code == 0
    [path] = bundle.path.glob("plans/*/model.plan")
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1000])
    advice = "build it again: cllm-export plan with the same options and --force"
    assert refused().endswith(f"has 1000 bytes, its manifest says {whole}; {advice}")
    [described] = json.loads(cli("inspect", bundle.path, "--json").out)["plans"]
    assert "has 1000 bytes" in described["error"]
    assert cli("plan", bundle.path, *FOR_SM89, "--force").code == 0
    assert path.stat().st_size > 1000


def break_graph(bundle: Bundle, change: Callable[[onnx.NodeProto], None]) -> Bundle:
    """The bundle with its graph for TensorRT changed, as if it had been exported so."""
    name = bundle.manifest.graphs[bundle.tensorrt_graph].file
    graph = onnx.load(bundle.path / name, load_external_data=False)
    change(next(node for node in graph.graph.node if node.op_type == "Attention"))
    onnx.save(graph, bundle.path / name)
    write_manifest(bundle.path, replace(bundle.manifest, files=describe_files(bundle.path)))
    return open_bundle(bundle.path)


def test_a_graph_with_an_operator_that_there_is_not_is_refused_in_the_parsers_words(
    refused: Callable[..., str], bundle: Bundle
):
    require_library()
    break_graph(bundle, lambda node: setattr(node, "op_type", "Attenshun"))
    said = refused()
    assert "does not take" in said
    assert "Attenshun" in said
    assert not re.search(NO_REASON, said), "what every graph gets is no reason"


def test_a_plan_that_cannot_be_built_says_why_in_the_builders_words(refused: Callable[..., str]):
    require_library()
    said = refused(*FOR_SM89, "--workspace", "1000")
    assert "could not build a plan" in said
    assert "workspace" in said
    assert not re.search(NO_REASON, said)


def test_a_plan_is_described_with_what_its_builder_measured(bundle: Bundle, cli: Cli):
    require_library()
    plan = build_plan(bundle, PlanOptions(engine="tensorrt-rtx", targets=("sm89", "sm120"), block_sizes=(1, 4)))
    contents = plan.manifest.contents
    assert contents is not None
    shown = cli("inspect", bundle.path).out
    assert f"built by                     TensorRT for RTX {plan.manifest.platform.tensorrt}" in shown
    assert "sm89, sm120 on Linux x86_64" in shown
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith(("prefill ", "n = "))]
    kernels = [row[3 if row[0] == "n" else 1] for row in rows]
    assert kernels == [str(profile.kernels) for profile in contents.profiles]
    figures = json.loads(cli("plan-memory", bundle.path, "--json").out)["figures"]
    measured = {each["name"]: each["bytes"] for each in figures if each["name"].startswith("plan ")}
    assert measured == {
        f"plan {plan.path.name}: weights": contents.weight_bytes,
        f"plan {plan.path.name}: scratch": max(profile.device_bytes for profile in contents.profiles),
    }


def test_build_makes_the_plan_of_its_bundle_too(cli: Cli, workshop: Workshop, tmp_path: Path):
    require_library()
    built = cli(
        "build", workshop.checkpoint("small"), "--output", tmp_path / "new", "--target", "tensorrt-rtx", "--for", "sm89"
    )
    assert built.code == 0, built.err
    [plan] = json.loads(cli("inspect", tmp_path / "new", "--json").out)["plans"]
    assert plan["built_for"] == "sm89 on Linux x86_64"
    assert f"wrote {tmp_path / 'new' / 'plans' / plan['key']}" in built.out


@pytest.mark.parametrize(
    ("precision", "target", "lacked"),
    [
        (["fp32"], "sm75", "fp32"),
        (["bf16"], "sm75", "bf16"),
        (["int4", "--compute", "bf16", "--quantize-for", "tensorrt"], "sm75", "bf16"),
        (["int4", "--compute", "fp16", "--quantize-for", "tensorrt"], "sm75", "int4"),
    ],
    ids=["fp32", "bf16", "int4 in bf16", "int4"],
)
def test_a_number_format_that_a_target_lacks_is_refused_before_anything_is_imported_or_built(
    cli: Cli,
    workshop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: list[str],
    target: str,
    lacked: str,
):
    for module in ("torch", TENSORRT_RTX.module, "cllm_export.exporter.pipeline"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    checkpoint, output = workshop.checkpoint("small"), tmp_path / "new"
    asked = ("--precision", *precision, "--target", "tensorrt-rtx", "--for", "sm120", "--for", target)
    outcome = cli("build", checkpoint, "--output", output, *asked)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {output} would be a bundle with {lacked}, which {target} does not have: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--for", "sm89"), "--for names the cards of a plan: give --target tensorrt-rtx too"),
        (("--target", "tensorrt-rtx"), "builds for named generations: give --for"),
        (("--target", "tensorrt-rtx", "--for", "sm99"), "--for must be one of sm75"),
        (
            ("--target", "tensorrt", "--for", "sm89"),
            "--for is for tensorrt-rtx, leave it out",
        ),
    ],
    ids=["no plan", "no target", "no such target", "the other library"],
)
def test_a_plan_that_cannot_be_is_refused_before_the_bundle_is_built(
    cli: Cli, workshop: Workshop, tmp_path: Path, arguments: tuple[str, ...], said: str
):
    outcome = cli("build", workshop.checkpoint("small"), "--output", tmp_path / "new", *arguments)
    assert (outcome.code, said in outcome.err) == (2, True)
    assert list(tmp_path.iterdir()) == []
