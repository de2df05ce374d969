"""What ``make`` says while it works."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None and os.environ.get("CI") != "true", reason="make is not installed")
def test_setup_names_each_phase_and_lets_pip_speak():
    command = ["make", "--dry-run", "--always-make", "setup"]  # prints the commands, and runs none of them
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    [install] = [line for line in lines if "pip install" in line]
    assert "--quiet" not in install
    phases = [line for line in lines if line.startswith('echo "setup')]
    assert len(phases) == 3
    assert lines.index(phases[1]) < lines.index(install) < lines.index(phases[2])
    assert any("still installing" in line for line in lines), "pip is silent while it unpacks"
