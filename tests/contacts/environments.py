"""Environments that pip fills with this project, from a copy of its sources. pip keeps the wheels in its cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "contacts"
"""What is expensive to install stays here between runs."""
OFFLINE = re.compile(
    r"(connection|resolution|read timed out|getaddrinfo|unreachable|from versions: none)", re.IGNORECASE
)
"""In pip's message: it could not reach an index, rather than find what it offers wanting."""


def copy_source(directory: Path) -> Path:
    """A copy of what a wheel is built from, so that pip writes nothing into the sources."""
    source = directory / "source"
    shutil.copytree(ROOT / "cllm_export", source / "cllm_export", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    return source


def declared_floors() -> dict[str, str]:
    """Distribution -> the oldest version that ``pyproject.toml`` declares, of the runtime and of every extra.

    Of several, it is the lowest.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    stated = [line.partition(";")[0].strip() for line in listed]
    pairs = [line.split(">=") for line in stated if ">=" in line]
    return dict(sorted(pairs, key=lambda pair: Version(pair[1]), reverse=True))


def interpreter(version: str) -> Path:
    """The Python of this version, as in ``3.13``. Skips the test, and so fails CI, if there is none."""
    candidates = [sys.executable] if version == f"{sys.version_info[0]}.{sys.version_info[1]}" else []
    candidates += [shutil.which(f"python{version}") or ""]
    kept = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates += sorted(map(str, kept.glob(f"{version}.*/bin/python{version}")))
    for candidate in filter(None, candidates):
        command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if told.stdout.strip() == version:  # a shim of pyenv is there for every version, and starts only a chosen one
            return Path(candidate)
    pytest.skip(f"there is no python{version} here, on the path or below {kept}: install it")


def new_environment(python: Path, directory: Path) -> Path:
    """The interpreter of a new environment."""
    subprocess.run([python, "-m", "venv", directory], check=True)
    return directory / "bin" / "python"


def install(python: Path, *arguments: object) -> None:
    """Run ``pip install``. Skips the test, and so fails CI, if no index can be reached; any other failure is one."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode == 0:
        return
    told = outcome.stderr.strip()
    if OFFLINE.search(told) and "ResolutionImpossible" not in told:
        pytest.skip(f"pip cannot get what is needed here: {told.splitlines()[-1]}")
    pytest.fail(f"pip install {' '.join(map(str, arguments))} failed:\n{told[-3000:]}")


def add_torch(python: Path) -> None:
    """Let an environment import torch, of the version in ``constraints.txt``, which is installed once and kept.

    The folder is the last on the environment's path: what pip installs into the environment itself comes first.
    """
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    torch = next(line for line in pins.splitlines() if line.startswith("torch=="))
    place = KEPT / f"{torch.replace('==', '-')}-{sys.implementation.cache_tag}"
    if not place.is_dir():
        staging = place.with_name(f"{place.name}.{os.getpid()}")
        install(Path(sys.executable), "--target", staging, torch)
        staging.rename(place)
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    (packages / "torch.pth").write_text(f"{place}\n", encoding="utf-8")


def run(python: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)
