"""Functions that a reader takes in at one sight."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cllm_export

PACKAGE = Path(cllm_export.__file__).parent
MOST_LINES, MOST_PARAMETERS = 60, 12


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every written function with its place. What a decorator makes of it is not written."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(PACKAGE)}: {node.name}", node


def test_no_function_is_longer_than_a_page():
    """Its docstring counts."""
    long = {name: node.end_lineno - node.lineno + 1 for name, node in functions() if node.end_lineno}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}


def test_no_function_has_more_parameters_than_a_reader_holds():
    """Many options belong into an options class."""
    counts = {
        name: len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) for name, node in functions()
    }
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}
