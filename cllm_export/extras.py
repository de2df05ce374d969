"""The packages that each extra installs, and the install line to show if one of them is missing.

Nothing is on a package index. So an extra comes from where the package came from: a clone, a wheel or a repository.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from cllm_export.errors import MissingExtraError

Extra = Literal["export", "train", "sentencepiece"]

_EXPORT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")
_PACKAGES: dict[Extra, tuple[str, ...]] = {
    "export": _EXPORT,
    "train": (*_EXPORT, "pyarrow", "accelerate", "peft", "tensorboard"),
    "sentencepiece": ("sentencepiece", "google"),
}
NAME = "cllm-export"
SOURCES = Path(__file__).parents[1]
"""Where the package is imported from: a clone, or a ``site-packages``."""


@contextmanager
def needs_extra(extra: Extra) -> Iterator[None]:
    """Turn the ImportError of a missing package of an extra, raised in the block, into the extra's install line.

    Raises:
        MissingExtraError: the missing package belongs to this extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in _PACKAGES[extra]:
            raise missing_extra(error.name, extra=extra) from None
        raise


def missing_extra(package: str, *, extra: str) -> MissingExtraError:
    """The error to raise if a package is missing that only an extra installs."""
    return MissingExtraError(
        f"this needs the package {package!r}, which is not installed; install it with: {install_line(extra)}"
    )


def install_line(extra: str) -> str:
    """The command that installs an extra of this package into the environment that it runs in.

    pip writes down where a package came from (``direct_url.json``). A clone or a wheel is named if it is still there.
    Otherwise the line names the packages of the extra, which come from an index.
    """
    distribution = _distribution()
    if distribution is not None:
        return f"pip install {_of_distribution(distribution, extra)}"
    if clone := _of_clone(SOURCES, extra):
        return f"pip install {clone}"
    return f"pip install '.[{extra}]' in a clone of the repository"


def _of_distribution(distribution: importlib.metadata.Distribution, extra: str) -> str:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if named := _of_origin(origin, extra) if origin else _of_clone(SOURCES, extra):
        return named
    return " ".join(shlex.quote(text) for text in _packages(distribution, extra))


def _distribution() -> importlib.metadata.Distribution | None:
    """What is installed, or None if the package runs from a source tree that nobody installed."""
    try:
        return importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        return None


def _of_origin(origin: dict[str, Any], extra: str) -> str | None:
    """What pip takes for the place that it wrote down, or None if the place is gone."""
    url = str(origin["url"])
    if (vcs := origin.get("vcs_info")) is not None:
        return shlex.quote(f"{NAME}[{extra}] @ {vcs['vcs']}+{url}@{vcs['commit_id']}")
    if not url.startswith("file:"):
        return shlex.quote(f"{NAME}[{extra}] @ {url}")
    path = Path(unquote(urlsplit(url).path))
    if "archive_info" in origin:
        return shlex.quote(f"{path}[{extra}]") if path.is_file() else None
    return _of_clone(path, extra, editable=bool(origin.get("dir_info", {}).get("editable")))


def _of_clone(path: Path, extra: str, *, editable: bool = False) -> str | None:
    if not (path / "pyproject.toml").is_file():
        return None
    return ("--editable " if editable else "") + shlex.quote(f"{path}[{extra}]")


def _packages(distribution: importlib.metadata.Distribution, extra: str) -> list[str]:
    """The requirements of an extra, with those of the extras that it names itself."""
    packages: list[str] = []
    for text in distribution.requires or ():
        requirement, _, marker = (part.strip() for part in text.partition(";"))
        if not re.fullmatch(rf"""extra == ["']{re.escape(extra)}["']""", marker):
            continue
        if own := re.fullmatch(rf"{NAME}\[([\w,-]+)\]", requirement):
            packages += [package for name in own[1].split(",") for package in _packages(distribution, name)]
        else:
            packages.append(requirement)
    return packages
