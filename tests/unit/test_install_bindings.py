"""Bindings that pip cannot get: said and gone without on a developer's machine, an error where they are required."""

from __future__ import annotations

import pytest

from tests.tensorrt import install


@pytest.mark.parametrize(
    ("required", "code", "fate"), [(False, 0, "will be skipped"), (True, 1, "--required asks for")]
)
def test_a_missing_binding_is_an_error_where_required(tmp_path, monkeypatch, capsys, required, code, fate):
    packages = {tmp_path / "there": ("one==1",), tmp_path / "missing": ("two==2",)}
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(install, "PACKAGES", packages)
    monkeypatch.setattr(install, "install", lambda target, packages: "no matching distribution")
    assert install.main(required=required) == code
    said = capsys.readouterr().err
    assert said.startswith("two==2 was not installed") and fate in said and "one==1" not in said


@pytest.mark.parametrize("required", [False, True])
def test_with_every_binding_there_nothing_fails(tmp_path, monkeypatch, required):
    monkeypatch.setattr(install, "PACKAGES", {tmp_path: ("one==1",)})
    assert install.main(required=required) == 0
