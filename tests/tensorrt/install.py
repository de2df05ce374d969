"""Fetch the published Python bindings that the doubles are generated from, each version into a directory of its own.

The bindings carry NVIDIA's licence: they are a test dependency alone, are installed below ``build/`` and neither
committed nor redistributed. Where pip cannot get them, nothing is left behind and the tests that need them say so.

Run by ``make bindings``: ``python -m tests.tensorrt.install``. CI adds ``--required``: a missing one is an error there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

BUILD = Path(__file__).parent.parent.parent / "build"

TENSORRT = ("10.15.1.29", "11.0.0.114", "11.4.0.106")
"""The oldest TensorRT that has KVCacheUpdate, the first of the next major version, and the newest."""

CUDA = ("12.8.0", "13.5.0")
"""The oldest and the newest cuda-python that the extra ``tensorrt`` takes."""

NVRTC = "13.5.37"
"""CUDA's run-time compiler, which needs no GPU: kernels are compiled for real devices with it."""

PACKAGES = {
    **{BUILD / "tensorrt" / version: (f"tensorrt_cu13_bindings=={version}",) for version in TENSORRT},
    BUILD / "nvrtc" / NVRTC: (f"nvidia-cuda-nvrtc=={NVRTC}",),
    **{BUILD / "cuda" / version: (f"cuda-bindings=={version}", "cuda-pathfinder") for version in CUDA},
}
"""Directory -> what pip puts into it."""


def install(target: Path, packages: tuple[str, ...]) -> str | None:
    """Fill a directory, all or nothing; what pip said if it could not."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--target", str(part), *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(part, ignore_errors=True)
        return done.stderr.strip()
    part.rename(target)
    return None


def main(*, required: bool) -> int:
    """Install what is missing; the exit code, 1 where one was required that pip could not get."""
    missing = 0
    for target, packages in PACKAGES.items():
        if not target.is_dir() and (failure := install(target, packages)):
            missing += 1
            fate = "which --required asks for" if required else "its tests will be skipped"
            sys.stderr.write(f"{packages[0]} was not installed, {fate}: {failure}\n")
    return int(required and missing > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--required", action="store_true", help="fail where pip cannot get one")
    sys.exit(main(required=parser.parse_args().required))
