"""The line that installs an extra names what is there: a clone, a wheel, a repository, or the packages themselves."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cllm_export import extras
from cllm_export.extras import install_line, missing_extra

ROOT = Path(__file__).parents[2]
METADATA = """\
Metadata-Version: 2.4
Name: cllm-export
Version: 0.1.0
Requires-Dist: numpy>=2.0
Provides-Extra: cpu
Requires-Dist: onnxruntime>=1.28; extra == "cpu"
Provides-Extra: export
Requires-Dist: torch>=2.9; extra == "export"
Requires-Dist: onnx>=1.20; extra == "export"
Provides-Extra: train
Requires-Dist: cllm-export[export]; extra == "train"
Requires-Dist: peft>=0.18; extra == "train"
"""
"""As setuptools writes it."""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install the package from a place, as pip would write it down; None stands for an index."""

    def install(origin: dict[str, Any] | None) -> None:
        directory = tmp_path / "site-packages" / "cllm_export-0.1.0.dist-info"
        directory.mkdir(parents=True)
        (directory / "METADATA").write_text(METADATA, encoding="utf-8")
        if origin is not None:
            (directory / "direct_url.json").write_text(json.dumps(origin), encoding="utf-8")
        distribution = importlib.metadata.Distribution.at(directory)
        monkeypatch.setattr(extras, "_distribution", lambda: distribution)
        monkeypatch.setattr(extras, "SOURCES", tmp_path / "site-packages")

    return install


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    return clone


def name_of(requirement: str) -> str:
    return re.split(r"[<>=~! ]", requirement)[0]


def test_an_editable_clone_is_named_as_editable(installed: Any, clone: Path):
    installed({"url": clone.as_uri(), "dir_info": {"editable": True}})
    assert shlex.split(install_line("cpu")) == ["pip", "install", "--editable", f"{clone}[cpu]"]


def test_a_clone_is_named(installed: Any, clone: Path):
    installed({"url": clone.as_uri(), "dir_info": {}})
    assert shlex.split(install_line("train")) == ["pip", "install", f"{clone}[train]"]


def test_a_wheel_is_named(installed: Any, tmp_path: Path):
    wheel = tmp_path / "cllm_export-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert shlex.split(install_line("cpu")) == ["pip", "install", f"{wheel}[cpu]"]


def test_a_wheel_on_a_server_and_a_repository_are_named(installed: Any):
    installed({"url": "https://host/cllm_export.whl", "archive_info": {}})
    assert shlex.split(install_line("cpu"))[2] == "cllm-export[cpu] @ https://host/cllm_export.whl"


def test_a_repository_is_named_at_its_commit(installed: Any):
    installed({"url": "https://host/project", "vcs_info": {"vcs": "git", "commit_id": "0abc"}})
    assert shlex.split(install_line("cpu"))[2] == "cllm-export[cpu] @ git+https://host/project@0abc"


@pytest.mark.parametrize(
    "origin",
    [
        None,
        {"url": "file:///gone/cllm_export-0.1.0-py3-none-any.whl", "archive_info": {}},
        {"url": "file:///gone/clone", "dir_info": {}},
        {"url": "file:///gone/clone", "dir_info": {"editable": True}},
    ],
)
def test_where_the_source_is_gone_the_packages_of_the_extra_are_named(installed: Any, origin: dict[str, Any] | None):
    """An image that was built in stages has the package and no wheel. An extra of extras names all packages."""
    installed(origin)
    assert shlex.split(install_line("cpu")) == ["pip", "install", "onnxruntime>=1.28"]
    assert shlex.split(install_line("train"))[2:] == ["torch>=2.9", "onnx>=1.20", "peft>=0.18"]


def test_a_source_tree_that_nobody_installed_is_a_clone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras, "_distribution", lambda: None)
    assert install_line("cpu") == f"pip install {shlex.quote(f'{ROOT}[cpu]')}"


def test_a_copy_of_the_package_alone_sends_to_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras, "_distribution", lambda: None)
    monkeypatch.setattr(extras, "SOURCES", tmp_path)
    assert install_line("cpu") == "pip install '.[cpu]' in a clone of the repository"


def test_the_packages_of_every_extra_are_found_in_the_real_metadata():
    """The reader of metadata and pyproject.toml agree on the names, in the form that setuptools writes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["optional-dependencies"]
    distribution = importlib.metadata.distribution("cllm-export")

    def packages_of(extra: str) -> list[str]:
        packages = declared[extra]
        own = [name for text in packages if text.startswith("cllm-export[") for name in text[12:-1].split(",")]
        others = [text for text in packages if not text.startswith("cllm-export[")]
        return others + [text for name in own for text in packages_of(name)]

    for extra in declared:
        wanted = packages_of(extra)
        found = extras._packages(distribution, extra)
        assert sorted(map(name_of, found)) == sorted(map(name_of, wanted)), extra


def test_an_error_about_a_missing_package_ends_with_the_line():
    message = str(missing_extra("onnxruntime", extra="cpu"))
    assert message.endswith(f"install it with: {install_line('cpu')}")


def test_nothing_tells_to_install_the_package_from_an_index():
    """The package is on no index, so such a line fails, or installs what somebody else has put there."""
    pages = (ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"))
    texts = {
        path.relative_to(ROOT): path.read_text("utf-8") for path in (*pages, *(ROOT / "cllm_export").rglob("*.py"))
    }
    wrong = re.compile(r"""pip install[^`\n]*?[\s'"]cllm[-_]export(?!\S*\.whl)\b""")
    assert [f"{path}: {match[0]}" for path, text in texts.items() for match in wrong.finditer(text)] == []
