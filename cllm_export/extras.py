"""The packages that each extra installs: the line that installs one, and the floor if a package is too old.

Nothing is on a package index. So an extra comes from where the package came from: a clone, a wheel or a repository.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from cllm_export.errors import MissingExtraError, OutdatedPackageError

Extra = Literal["export", "train", "sentencepiece", "gguf"]

PROJECT = "cllm-export"

_RUNTIME = ("numpy", "filelock", "safetensors", "tokenizers", "jinja2")
_EXPORT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")
_PACKAGES: dict[Extra, tuple[str, ...]] = {
    "export": _EXPORT,
    "train": (*_EXPORT, "pyarrow", "accelerate", "peft", "tensorboard"),
    "sentencepiece": ("sentencepiece", "google"),
    "gguf": ("gguf", *_EXPORT),
}
_DISTRIBUTIONS = {"google": "protobuf"}
"""Package -> the distribution that holds it, if its name differs by more than an underscore."""
SOURCES = Path(__file__).parents[1]
"""Where the package is imported from: a clone, or a ``site-packages``."""


@contextmanager
def needs_extra(extra: Extra) -> Iterator[None]:
    """Check the versions of an extra's packages, and turn the ImportError of a missing one into its install line.

    Raises:
        MissingExtraError: a package that is missing in the block belongs to this extra.
        OutdatedPackageError: an installed package of this extra is older than its floor.
    """
    require_floors(*_RUNTIME, *_PACKAGES[extra], extra=extra)
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in _PACKAGES[extra]:
            raise missing_extra(error.name, extra=extra) from None
        raise


def require_floors(*packages: str, extra: Extra | None = None) -> None:
    """Check that each of these packages, if it is installed, is as new as the metadata of this project asks.

    An ``extra`` may ask for a newer version than the others do.

    An older one fails in ways that blame something else: an early transformers calls a sound checkpoint incomplete.

    Raises:
        OutdatedPackageError: one is older.
    """
    floors = declared_floors() | (_floors(extra) if extra else {})
    for package in packages:
        distribution = _DISTRIBUTIONS.get(package, package.replace("_", "-"))
        floor, installed = floors.get(distribution), _installed(distribution)
        if floor and installed and _release(installed) < _release(floor):
            raise OutdatedPackageError(distribution, installed=installed, floor=floor)


@cache
def declared_floors() -> dict[str, str]:
    """Distribution -> its oldest version, from the metadata of this project; empty if the project is not installed.

    If extras ask for several, it is the lowest.
    """
    return _floors()


def _floors(extra: Extra | None = None) -> dict[str, str]:
    """Distribution -> the lowest version that the metadata asks for, or that an extra itself asks for."""
    try:
        requirements = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return {}
    floors: dict[str, str] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+)\s*\(?>=\s*([\w.]+)", requirement)
        if match and (extra is None or _is_of_extra(requirement, extra)):
            name = match[1].lower().replace("_", "-")
            floors[name] = min(floors.get(name, match[2]), match[2], key=_release)
    return floors


def _is_of_extra(requirement: str, extra: str) -> bool:
    return re.search(rf"""\bextra == ["']{re.escape(extra)}["']""", requirement.partition(";")[2]) is not None


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without zeros at the end: ``2.13.0+cpu`` gives (2, 13)."""
    numbers = [int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


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


def _of_distribution(distribution: metadata.Distribution, extra: str) -> str:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if named := _of_origin(origin, extra) if origin else _of_clone(SOURCES, extra):
        return named
    return " ".join(shlex.quote(text) for text in _packages(distribution, extra))


def _distribution() -> metadata.Distribution | None:
    """What is installed, or None if the package runs from a source tree that nobody installed."""
    try:
        return metadata.distribution(PROJECT)
    except metadata.PackageNotFoundError:
        return None


def _of_origin(origin: dict[str, Any], extra: str) -> str | None:
    """What pip takes for the place that it wrote down, or None if the place is gone."""
    url = str(origin["url"])
    if (vcs := origin.get("vcs_info")) is not None:
        return shlex.quote(f"{PROJECT}[{extra}] @ {vcs['vcs']}+{url}@{vcs['commit_id']}")
    if not url.startswith("file:"):
        return shlex.quote(f"{PROJECT}[{extra}] @ {url}")
    path = Path(unquote(urlsplit(url).path))
    if "archive_info" in origin:
        return shlex.quote(f"{path}[{extra}]") if path.is_file() else None
    return _of_clone(path, extra, editable=bool(origin.get("dir_info", {}).get("editable")))


def _of_clone(path: Path, extra: str, *, editable: bool = False) -> str | None:
    if not (path / "pyproject.toml").is_file():
        return None
    return ("--editable " if editable else "") + shlex.quote(f"{path}[{extra}]")


def _packages(distribution: metadata.Distribution, extra: str) -> list[str]:
    """The requirements of an extra, with those of the extras that it names itself."""
    packages: list[str] = []
    for text in distribution.requires or ():
        requirement = text.partition(";")[0].strip()
        if not _is_of_extra(text, extra):
            continue
        if own := re.fullmatch(rf"{PROJECT}\[([\w,-]+)\]", requirement):
            packages += [package for name in own[1].split(",") for package in _packages(distribution, name)]
        else:
            packages.append(requirement)
    return packages
