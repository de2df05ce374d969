"""Damaged, foreign and lossy bundles: what ``load`` refuses, what ``verify`` finds, and the verdict it leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from cllm_export.bundle.manifest import Bundle, describe_files, open_bundle, write_manifest
from tests.checkpoints import edit_json
from tests.conftest import PINNED, Workshop
from tests.e2e.conftest import Cli, assert_refused, snapshot

QUICK = ("--max-new-tokens", 8, "--threads", 1)


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    """A sound bundle that a test may damage."""
    return workshop.copy(workshop.bundle("llama"), tmp_path / "bundle")


def manifest(**changes: Any) -> Callable[[Path], object]:
    return lambda path: edit_json(path / "bundle.json", **changes)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(content, encoding="utf-8")


def without(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def listing(name: str) -> Callable[[Path], object]:
    """A manifest that lists one more file."""

    def damage(path: Path) -> None:
        files = json.loads((path / "bundle.json").read_text())["files"]
        edit_json(path / "bundle.json", files={**files, name: {"size": 0, "sha256": "0"}})

    return damage


def linked_away(path: Path) -> None:
    outside = path.parent / "weights.bin"
    (path / "weights.bin").rename(outside)
    (path / "weights.bin").symlink_to(outside)


def flip(name: str) -> Callable[[Path], object]:
    """One bit of a file changed, which its size does not tell."""

    def damage(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return damage


def longer(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes() + b"x")


def without_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    refresh(path)


def refresh(path: Path) -> Bundle:
    """Make the manifest true again after a change: what an attacker, or a faulty exporter, would hand over."""
    raw = json.loads((path / "bundle.json").read_text())
    files = {name: vars(entry) for name, entry in describe_files(path).items()}
    (path / "bundle.json").write_text(json.dumps({**raw, "files": files}))
    opened = open_bundle(path)
    write_manifest(path, replace(opened.manifest))
    return open_bundle(path)


REFUSED_BY_LOAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no manifest": (without("bundle.json"), ("not a bundle", "no bundle.json")),
    "manifest cut short": (text("bundle.json", '{"schema_version": 1,'), ("bundle.json", "not valid JSON", "rebuild")),
    "manifest a list": (text("bundle.json", "[]"), ("not a bundle manifest", "schema_version")),
    "manifest of something else": (text("bundle.json", '{"name": "x"}'), ("not a bundle manifest", "schema_version")),
    "manifest not UTF-8": (
        lambda path: (path / "bundle.json").write_bytes(b"\xff\xfe"),
        ("bundle.json", "cannot be read"),
    ),
    "newer schema": (manifest(schema_version=99), ("schema_version 99", "reads 3", "upgrade cllm-export")),
    "older schema": (
        manifest(schema_version=2),
        ("schema_version 2", "cllm-export build CHECKPOINT --output", "--force"),
    ),
    "newer contract": (manifest(contract_version=99), ("contract_version 99", "upgrade cllm-export")),
    "older contract": (manifest(contract_version=0), ("contract_version 0", "cllm-export build CHECKPOINT")),
    "unknown key": (manifest(surprise=1), ("damaged", "surprise")),
    "missing key": (
        lambda path: edit_json(path / "bundle.json", drop=("geometry",)),
        ("damaged", "geometry", "rebuild"),
    ),
    "value of a wrong type": (manifest(max_length="long"), ("damaged", "max_length", "'long'")),
    "no weights": (without("weights.bin"), ("weights.bin is missing",)),
    "no tokenizer file": (without("tokenizer.json"), ("tokenizer.json is missing",)),
    "no tokenizer at all": (without_tokenizer, ("has no tokenizer.json", "rebuild")),
    "weights cut short": (
        lambda path: os.truncate(path / "weights.bin", 1000),
        ("weights.bin has 1000 bytes", "rebuild"),
    ),
    "graph with a byte more": (longer("model.onnx"), ("model.onnx has", "the manifest says")),
    "file outside": (listing("../weights.bin"), ("'../weights.bin'", "not a plain name")),
    "file at an absolute path": (listing("/etc/passwd"), ("'/etc/passwd'", "not a plain name")),
    "link to the outside": (linked_away, ("weights.bin", "link that leaves the bundle")),
}


@pytest.mark.parametrize(("damage", "phrases"), REFUSED_BY_LOAD.values(), ids=REFUSED_BY_LOAD)
def test_a_damaged_bundle_is_refused_before_the_first_forward(
    cli: Cli, bundle: Bundle, damage: Callable[[Path], object], phrases: tuple[str, ...]
):
    damage(bundle.path)
    before = snapshot(bundle.path)
    assert_refused(cli("generate", bundle.path, "hello"), *phrases)
    assert snapshot(bundle.path) == before


@pytest.mark.parametrize("command", ["generate", "inspect", "verify", "bench"])
def test_every_command_refuses_what_is_no_bundle(cli: Cli, workshop: Workshop, tmp_path: Path, command: str):
    file = tmp_path / "file"
    file.write_text("hello")
    (tmp_path / "empty").mkdir()
    for path, phrase in (
        (tmp_path / "nowhere", "no such directory"),
        (file, "not a bundle"),
        (tmp_path / "empty", "no bundle.json"),
        (workshop.checkpoint("llama"), "looks like a checkpoint: run cllm-export build"),
    ):
        assert_refused(cli(command, path, stdin=b"hello"), str(path), "not a bundle", phrase)


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json", "generation_config.json"])
def test_verify_names_a_file_whose_checksum_differs(cli: Cli, bundle: Bundle, name: str):
    flip(name)(bundle.path)
    assert_refused(cli("verify", bundle.path, *QUICK), str(bundle.path / name), "corrupted", "sha256", "rebuild")
    assert verdict(bundle)["passed"] is False, "an earlier proof must not outlive the bundle it proved"


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_generate_names_a_file_that_is_garbage_of_the_right_size(cli: Cli, bundle: Bundle, name: str):
    size = bundle.manifest.files[name].size
    (bundle.path / name).write_bytes(b"\xff" * size)
    assert_refused(cli("generate", bundle.path, "hello"), str(bundle.path / name))


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content + 1 }}", "{% for %}", "{{ raise_exception('no system turn') }}"]
)
def test_a_chat_template_that_fails_is_refused(cli: Cli, bundle: Bundle, template: str):
    (bundle.path / "chat_template.jinja").write_text(template)
    refresh(bundle.path)
    messages = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    assert_refused(cli("generate", bundle.path, stdin=messages), "template")


def test_verify_refuses_a_checkpoint_the_bundle_was_not_built_from(cli: Cli, workshop: Workshop, bundle: Bundle):
    other = workshop.checkpoint("mistral")
    assert_refused(cli("verify", bundle.path, "--checkpoint", other, *QUICK), str(other), "not built from")
    assert not (bundle.path / "parity.json").exists()


def test_verify_refuses_an_option_it_would_have_to_ignore(cli: Cli, workshop: Workshop, tmp_path: Path):
    pinned = workshop.bundle("llama", **PINNED)
    copy = workshop.copy(pinned, tmp_path / "pinned")
    assert_refused(cli("verify", copy.path, "--block-size", 4, *QUICK), "pinned", "8", "--block-size")


def verdict(bundle: Bundle) -> dict[str, Any]:
    """What ``parity.json`` says: fingerprint, verdict, and the names of the checks that failed."""
    report = json.loads((bundle.path / "parity.json").read_text())
    failed = [check["name"] for check in report["checks"] if check["passed"] is False]
    return {"fingerprint": report["bundle_fingerprint"], "passed": report["passed"], "failed": failed}


def assert_fails_verification(cli: Cli, bundle: Bundle, *arguments: object, check: str) -> None:
    outcome = cli("verify", bundle.path, *arguments, *QUICK)
    assert outcome.code == 1, outcome
    assert "FAIL" in outcome.out
    assert "not verified" in outcome.out
    found = verdict(bundle)
    assert found["passed"] is False
    assert found["fingerprint"] == bundle.fingerprint
    assert any(name.startswith(check) for name in found["failed"]), found
    assert "verification failed" in json.loads(cli("inspect", bundle.path, "--json").out)["parity"]


def test_verify_fails_weights_that_are_not_the_checkpoints_under_a_true_manifest(
    cli: Cli, workshop: Workshop, bundle: Bundle
):
    """Checksums match, both loops agree, and still the tokens are not the model's: the reference alone can tell."""
    weights = np.fromfile(bundle.path / "weights.bin", dtype=np.float32)
    weights[: len(weights) // 2] *= np.float32(0.7)
    weights.tofile(bundle.path / "weights.bin")
    changed = refresh(bundle.path)
    checkpoint = workshop.checkpoint("llama")
    assert_fails_verification(cli, changed, "--checkpoint", checkpoint, check="against the PyTorch checkpoint")
    assert not any("autoregressive" in name for name in verdict(changed)["failed"])


def test_verify_fails_a_graph_that_accepts_wrong_drafts(cli: Cli, bundle: Bundle):
    edit_graph(bundle, lambda node: node.op_type == "Equal", op_type="LessOrEqual")
    assert_fails_verification(cli, refresh(bundle.path), check="jacobi == autoregressive")


def test_verify_fails_a_graph_whose_rows_see_later_rows(cli: Cli, bundle: Bundle):
    edit_graph(bundle, lambda node: node.op_type == "LessOrEqual", op_type="GreaterOrEqual")
    assert_fails_verification(cli, refresh(bundle.path), check="rows see each other only through attention")


def edit_graph(bundle: Bundle, is_meant: Callable[[onnx.NodeProto], bool], *, op_type: str) -> None:
    """Give the nodes that are meant another operator."""
    model = onnx.load(bundle.graph_path(), load_external_data=False)
    nodes = [node for node in model.graph.node if is_meant(node)]
    assert nodes, "the graph has no such node any more"
    for node in nodes:
        node.op_type = op_type
    onnx.save(model, bundle.graph_path())


def test_a_verdict_is_stale_once_the_bundle_is_built_again(cli: Cli, workshop: Workshop, tmp_path: Path):
    path = workshop.copy(workshop.bundle("llama"), tmp_path / "bundle").path
    assert cli("verify", path, *QUICK).code == 0
    kept = tmp_path / "parity.json"
    shutil.copy(path / "parity.json", kept)
    shutil.rmtree(path)
    workshop.copy(workshop.bundle("qwen2"), path)
    assert "not verified" in json.loads(cli("inspect", path, "--json").out)["parity"]
    shutil.copy(kept, path / "parity.json")
    assert "verified before it was rebuilt" in json.loads(cli("inspect", path, "--json").out)["parity"]
