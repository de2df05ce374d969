"""General text: that of the package has four kinds, and a user's own file takes its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm_export.errors import OptionError
from cllm_export.runtime.general_text import KINDS, general_passages


def test_the_package_has_text_of_four_kinds():
    passages = general_passages()
    assert [passage.kind for passage in passages] == list(KINDS) and len(KINDS) == 4
    assert all(1500 < len(passage.text) < 3000 for passage in passages)


def test_a_file_takes_the_place_of_the_packages_text(tmp_path: Path):
    (tmp_path / "own.txt").write_text("Mein eigener Text, schön wie der Tag.", encoding="utf-8")
    [passage] = general_passages(tmp_path / "own.txt")
    assert passage.kind == "own.txt" and passage.text.startswith("Mein eigener Text, schön")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read .*: No such file"), (b" \n", "is blank"), (b"caf\xe9", "not valid UTF-8 at byte 3")],
)
def test_a_file_without_text_is_refused(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        general_passages(path)
