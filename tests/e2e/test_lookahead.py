"""Lookahead from the command line: built when asked for, decoded, timed, and held to its tokens by ``verify``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from cllm_export.bundle.manifest import Bundle, describe_files, write_manifest
from tests.conftest import Workshop
from tests.e2e.conftest import Cli, assert_refused

FEW = ("--max-new-tokens", 6, "--threads", 1)
SHAPE = ("--window", 3, "--ngram", 4, "--guesses", 2)


@pytest.fixture
def bundle(workshop: Workshop) -> Bundle:
    return workshop.bundle("llama", lookahead=True)


def lines_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_build_adds_the_graph_and_generate_decodes_with_it(cli: Cli, workshop: Workshop, output: Path):
    options = ("--weights", "copy", "--lookahead", "--json")
    built = cli("build", workshop.checkpoint("llama"), "--output", output, *options)
    assert built.code == 0
    assert json.loads(built.out)["graphs"] == ["greedy", "lookahead", "tensorrt"]
    assert json.loads(built.out)["lookahead_refused"] is None
    assert "lookahead" in cli("inspect", output).out

    [plain] = lines_of(cli("generate", output, "the cat", "--json", "--method", "autoregressive", *FEW).out)
    for shape in ((), SHAPE):
        [line] = lines_of(cli("generate", output, "the cat", "--json", "--method", "lookahead", *shape, *FEW).out)
        assert line["token_ids"] == plain["token_ids"]
    shown = cli("generate", output, "the cat", "--method", "lookahead", "--show-blocks", *FEW)
    assert shown.code == 0
    assert shown.out.startswith("block:")


def test_bench_times_it_beside_the_baseline(cli: Cli, bundle: Bundle, tmp_path: Path):
    options = ("--method", "lookahead", *SHAPE, "--repeats", 1, "--output", tmp_path / "r.json")
    assert cli("bench", bundle.path, *options, *FEW).code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert {entry["method"] for entry in report["settings"]} == {"autoregressive", "lookahead"}
    assert report["lookahead"] == {"window": 3, "ngram": 4, "guesses": 2}


@pytest.mark.parametrize(
    ("command", "options", "phrase"),
    [
        ("generate", ("--window", 3), "--window is for the --method lookahead"),
        ("generate", ("--method", "lookahead", "--temperature", 1), "lookahead is for greedy requests"),
        ("generate", ("--method", "lookahead", "--window", 40), "choose smaller ones"),
        ("bench", ("--guesses", 3), "--guesses is for lookahead"),
        ("bench", ("--method", "lookahead", "--block-size", 4), "--block-size is for the Jacobi loops"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    cli: Cli, bundle: Bundle, command: str, options: tuple[object, ...], phrase: str
):
    prompt = ("the cat",) if command == "generate" else ()
    assert_refused(cli(command, bundle.path, *prompt, *options), phrase)


def test_a_bundle_without_the_graph_says_how_to_build_one(cli: Cli, workshop: Workshop):
    path = workshop.bundle("llama").path
    assert_refused(
        cli("generate", path, "the cat", "--method", "lookahead"), "has no lookahead graph", "--lookahead --force"
    )


def test_verify_holds_it_to_the_tokens_of_autoregressive_decoding(
    cli: Cli, workshop: Workshop, bundle: Bundle, tmp_path: Path
):
    copy = workshop.copy(bundle, tmp_path / "bundle")
    assert cli("verify", copy.path, *FEW).code == 0
    assert checks(copy)["lookahead == autoregressive"] is True
    model = onnx.load(copy.graph_path("lookahead"), load_external_data=False)
    [add] = [node for node in model.graph.node if "row_offsets" in node.input and node.op_type == "Add"]
    add.op_type = "Sub"  # rows rotated to other places
    onnx.save(model, copy.graph_path("lookahead"))
    (copy.path / "parity.json").unlink()
    write_manifest(copy.path, replace(copy.manifest, files=describe_files(copy.path)))
    assert cli("verify", copy.path, *FEW).code == 1
    assert checks(copy)["lookahead == autoregressive"] is False
    assert checks(copy)["jacobi == autoregressive, n = 8"] is not False


def checks(bundle: Bundle) -> dict[str, bool | None]:
    parity = json.loads((bundle.path / "parity.json").read_text())
    return {check["name"]: check["passed"] for check in parity["checks"]}
