"""What `inspect` says about the agreement of a quantised bundle with its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cllm_export.bundle.inspect import describe
from cllm_export.bundle.manifest import Manifest
from cllm_export.bundle.quantization import Agreement, Quantization
from cllm_export.cli.show.bundle import show_description
from tests.fakes import with_manifest, write_bundle

RECORD = Quantization(
    scheme="int4", method="GPTQ", group_size=32, engines=("onnxruntime",), weights=("w",), kept={}, scales_sha256=None
)
MEASURED = replace(RECORD, agreement=Agreement(equal=187, of=256))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (MEASURED, "the model's own token for 73.0% of 256 tokens of general text"),
        (RECORD, "not measured: build the bundle again"),
    ],
)
def test_inspect_shows_the_agreement_of_a_quantised_bundle(tmp_path: Path, capsys, record, text):
    bundle = with_manifest(write_bundle(tmp_path / "bundle"), quantization=record)
    show_description(describe(bundle) | {"plans": []})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"agreement {text}" in lines


@pytest.mark.parametrize("record", [MEASURED, RECORD])
def test_a_manifest_keeps_the_agreement(tmp_path: Path, record):
    manifest = replace(write_bundle(tmp_path / "bundle").manifest, quantization=record)
    assert Manifest.from_json(manifest.to_json(), source=tmp_path) == manifest
