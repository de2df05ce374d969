"""Write what the real builder makes of each family to ``plan_contents.json`` beside it.

Run it after a change of the graph or of the library's version, and read the difference before it is committed:
``python -m tests.tensorrt.rtx.golden``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.checkpoints import REALISTIC
from tests.conftest import Workshop
from tests.tensorrt.rtx.plans import GOLDEN, contents_of, counts_of, family_of, require_library


def main() -> None:
    """Build a plan of each family, and replace the counts of this version of the library."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        workshop, found = Workshop(directory, directory / "shared"), {}
        for name in REALISTIC:
            contents = contents_of(workshop.bundle(name, precision="fp16"), directory / name)
            found[family_of(name)] = counts_of(contents)
            sys.stdout.write(f"{name}: {[profile.kernels for profile in contents.profiles]} kernels\n")
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    known[require_library()] = found
    GOLDEN.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
