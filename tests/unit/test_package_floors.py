"""An installed package that is too old is named, with its floor, before it can fail in a way that blames another."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from cllm_export import extras
from cllm_export.errors import CllmExportError, OutdatedPackageError
from cllm_export.extras import declared_floors, needs_extra, require_floors
from cllm_export.runtime.decoding.constraint import GrammarCompiler
from tests.conftest import Workshop

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def marked(requirement: str, extra: str) -> str:
    """A requirement of an extra, as the metadata of an installed package spells it."""
    name, _, marker = requirement.partition(";")
    return f'{name}; ({marker.strip()}) and extra == "{extra}"' if marker else f'{name}; extra == "{extra}"'


REQUIREMENTS = [
    *PYPROJECT["dependencies"],
    *(
        marked(requirement, extra)
        for extra, listed in PYPROJECT["optional-dependencies"].items()
        for requirement in listed
    ),
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that are told to be installed instead of the true ones; the project is told to be installed as it is."""
    versions: dict[str, str] = {}
    true = metadata.version
    monkeypatch.setattr(extras.metadata, "version", lambda name: versions.get(name) or true(name))
    monkeypatch.setattr(extras.metadata, "requires", lambda name: REQUIREMENTS)
    monkeypatch.setattr(extras, "declared_floors", declared_floors.__wrapped__)
    return versions


def test_every_requirement_has_a_floor_that_is_understood(installed: dict[str, str]):
    stated = [Requirement(text) for text in REQUIREMENTS if not text.startswith("cllm-export")]
    newest_first = sorted(stated, key=lambda found: Version(str(found.specifier)[2:]), reverse=True)
    floors = {found.name: str(found.specifier).removeprefix(">=") for found in newest_first}
    assert extras.declared_floors() == floors
    for floor in floors.values():
        assert extras._release(floor) <= Version(floor).release


def test_the_environment_of_the_tests_is_new_enough(installed: dict[str, str]):
    require_floors(*extras.declared_floors())


@pytest.mark.parametrize(
    ("version", "is_old"),
    [("4.57.6", True), ("5.0.0", True), ("5.4.9", True), ("5.5.0", False), ("5.5", False), ("5.10.1+cpu", False)],
)
def test_versions_compare_as_numbers(installed: dict[str, str], version: str, is_old: bool):
    installed["transformers"] = version
    if not is_old:
        require_floors("transformers")
        return
    with pytest.raises(OutdatedPackageError, match=rf"transformers 5.5 or newer, and {version} .*'transformers>=5.5'"):
        require_floors("transformers")


@pytest.mark.parametrize(
    ("name", "extra"),
    [("transformers", "export"), ("onnx-ir", "export"), ("peft", "train"), ("protobuf", "sentencepiece")],
)
def test_what_needs_an_extra_does_not_begin_with_an_old_package(installed: dict[str, str], name: str, extra):
    installed[name] = "0.0.1"
    with pytest.raises(CllmExportError, match=f"{name} .* or newer, and 0.0.1 is installed"), needs_extra(extra):
        pytest.fail("the work began")


def test_an_extra_may_ask_for_a_newer_version_than_others(installed: dict[str, str]):
    """An older transformers gives the tokenizer of a GGUF file another end of sequence."""
    installed["transformers"] = "5.22.2"
    with needs_extra("export"):
        pass
    with pytest.raises(OutdatedPackageError, match=r"transformers 5.23 or newer"), needs_extra("gguf"):
        pytest.fail("the work began")


def test_an_old_grammar_engine_is_named_and_not_the_tokenizer(workshop: Workshop, installed: dict[str, str]):
    codec = workshop.model("small").codec
    installed["llguidance"] = "1.6.1"
    with pytest.raises(OutdatedPackageError, match=r"llguidance 1\.7 or newer, and 1\.6\.1 is installed"):
        GrammarCompiler(codec, vocab_size=287, eos_token_ids=(2,))


def test_without_metadata_nothing_is_checked(monkeypatch: pytest.MonkeyPatch):
    """Of a copy of the sources that was never installed."""
    monkeypatch.setattr(extras, "PROJECT", "not-installed")
    assert declared_floors.__wrapped__() == {}
