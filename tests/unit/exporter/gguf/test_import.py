"""What an import writes beside the weights, and what users of a GGUF file are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cllm_export.errors import CheckpointError, MissingExtraError, OptionError, OutputError
from cllm_export.evaluation.sources import kind_of
from cllm_export.exporter.checkpoint.adapter_files import check_checkpoint
from cllm_export.exporter.gguf import header
from cllm_export.exporter.gguf.convert import import_gguf, imported
from cllm_export.exporter.gguf.options import ImportOptions
from cllm_export.progress import Voice
from tests.conftest import Workshop
from tests.unit.exporter.gguf.made import write_gguf


@pytest.fixture(scope="module")
def file(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(
        tmp_path_factory.mktemp("import") / "tiny model.gguf",
        workshop.checkpoint("small"),
        general__name="Tiny",
        general__license="apache-2.0",
    )


def test_where_the_checkpoint_comes_from_is_written_down(file: Path, tmp_path: Path):
    made = import_gguf(file, tmp_path / "out").path
    origin = json.loads((made / "import.json").read_text())
    assert origin["source"] == "tiny model.gguf"
    assert origin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert origin["bytes"] == file.stat().st_size
    assert (origin["architecture"], origin["name"], origin["license"]) == ("llama", "Tiny", "apache-2.0")
    assert origin["types"] == {"F32": 11}
    assert origin["dtype"] == "fp32"
    assert set(origin["tool_versions"]) == {"gguf", "transformers"}


def test_equal_files_give_equal_checkpoints(file: Path, tmp_path: Path):
    """So a checkpoint that was imported again has the same fingerprint."""
    first, second = (import_gguf(file, tmp_path / name).path for name in ("a", "b"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_checkpoint_is_what_is_written(file: Path, tmp_path: Path):
    check_checkpoint(import_gguf(file, tmp_path / "out").path)


@pytest.mark.parametrize("spell", [str.lower, str.upper])
def test_the_right_checksum_is_taken(file: Path, tmp_path: Path, spell):
    sha256 = spell(hashlib.sha256(file.read_bytes()).hexdigest())
    import_gguf(file, tmp_path / "out", ImportOptions(sha256=sha256))


def test_an_import_is_replaced_by_force_alone(file: Path, tmp_path: Path):
    import_gguf(file, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        import_gguf(file, tmp_path / "out")
    import_gguf(file, tmp_path / "out", ImportOptions(dtype="bf16"), force=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_progress_names_the_tensors_and_counts_the_bytes_of_the_file(file: Path, tmp_path: Path):
    seen: list[tuple[str, int, int, str]] = []
    import_gguf(file, tmp_path / "out", voice=Voice(progress=lambda *report: seen.append(report)))
    assert list(dict.fromkeys(report[0] for report in seen)) == ["checksum", "weights", "tokenizer"]
    weights = [report for report in seen if report[0] == "weights"]
    total = sum(tensor.length for tensor in header.read_gguf(file).tensors.values())
    assert weights[-1][1:3] == (total, total)
    assert {report[3] for report in weights} == set(header.read_gguf(file).tensors)


def test_the_checkpoint_of_a_build_is_gone_after_it(file: Path, tmp_path: Path):
    """Whatever happens in it, and an error names the file instead of it."""
    with (
        pytest.raises(CheckpointError, match=r"^.*tiny model\.gguf is no good$"),
        imported(file, tmp_path / "b") as path,
    ):
        assert (path / "config.json").is_file()
        raise CheckpointError(f"{path} is no good")
    assert list(tmp_path.iterdir()) == []


def test_whatever_needs_a_checkpoint_says_how_to_import(file: Path, tmp_path: Path):
    """Of the file itself, and of a directory that holds one."""
    directory = tmp_path / "downloaded"
    directory.mkdir()
    (directory / "model.gguf").write_bytes(file.read_bytes())
    for path, source in ((file, f"'{file}'"), (directory, str(directory / "model.gguf"))):
        for judge in (check_checkpoint, kind_of):
            with pytest.raises(CheckpointError) as caught:
                judge(path)
            assert str(caught.value).endswith(f"import it with: cllm-export import {source} --output my-checkpoint")


def test_a_gguf_file_that_is_missing_is_called_a_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent\.gguf is not a checkpoint: there is no such file"):
        check_checkpoint(tmp_path / "absent.gguf")


def test_a_file_that_is_no_gguf_is_called_a_file(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match=r"model\.bin is not a checkpoint: it is a file"):
        check_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize("sha256", ["", "12", "g" * 64, "0" * 63])
def test_a_checksum_that_is_none_is_refused(sha256: str):
    with pytest.raises(OptionError, match="sha256 must be 64 hexadecimal digits, got"):
        ImportOptions(sha256=sha256)


def test_without_the_extra_its_install_line_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    header.readable_types.cache_clear()
    for name in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingExtraError, match=r"'gguf.*pip install .*\[gguf\]"):
        import_gguf(file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
