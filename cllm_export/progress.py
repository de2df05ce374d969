"""The callback through which long tasks report progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; ``total`` counts bytes or items, depending on the stage."""
