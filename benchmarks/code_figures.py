"""Figures of the code itself: how many things a reader meets, and how large they are.

    python benchmarks/code_figures.py                 # this checkout
    python benchmarks/code_figures.py PATH [PATH ...]  # any checkouts of it, side by side

A folder counts its own modules without ``__init__``. A parameter counts if a person wrote it; parameters that a
decorator generates for a dataclass do not count. An option is spelled wherever its name is a parameter, a field or a
key.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median

Function = ast.FunctionDef | ast.AsyncFunctionDef
ROOT = Path(__file__).parent.parent
LONG, WIDE = 60, 12
OPTION = "temperature"


def trees(package: Path) -> dict[Path, ast.Module]:
    """Every module of a package, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}


def functions(modules: dict[Path, ast.Module]) -> Iterator[Function]:
    for tree in modules.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def num_parameters(function: Function) -> int:
    arguments = function.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)


def num_lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def spellings(modules: dict[Path, ast.Module], name: str) -> int:
    """Places that declare or pass on an option by name: parameters, fields, keyword arguments, keys and strings."""
    count = 0
    for tree in modules.values():
        for node in ast.walk(tree):
            is_parameter = isinstance(node, ast.arg) and node.arg == name
            is_field = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name
            is_keyword = isinstance(node, ast.keyword) and node.arg == name
            is_string = isinstance(node, ast.Constant) and node.value == name
            count += is_parameter or is_field or is_keyword or is_string
    return count


def figures(checkout: Path) -> dict[str, str]:
    """The figures of one checkout, by name."""
    package = checkout / "cllm_export"
    modules = trees(package)
    written = list(functions(modules))
    per_folder = {
        folder: sum(path.parent == folder and path.name != "__init__.py" for path in modules)
        for folder in {path.parent for path in modules}
    }
    fullest = max(per_folder, key=lambda folder: per_folder[folder])
    lengths = [num_lines(function) for function in written]
    options = [
        node.name
        for tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Options", "Settings"))
    ]
    widest = max(written, key=num_parameters)
    return {
        "modules beside the root's __init__ and __main__": str(per_folder[package] - 1),
        "folders": str(len(per_folder)),
        "files in the fullest folder": f"{per_folder[fullest]} ({fullest.relative_to(checkout)})",
        "files a folder, mean": f"{mean(per_folder.values()):.1f}",
        f"places that spell {OPTION}": str(spellings(modules, OPTION)),
        "classes of options or settings": str(len(options)),
        "parameters of the widest function": f"{num_parameters(widest)} ({widest.name})",
        f"functions of more than {WIDE} parameters": str(sum(num_parameters(one) > WIDE for one in written)),
        f"functions above {LONG} lines": str(sum(length > LONG for length in lengths)),
        "lines of a function, median": f"{median(lengths):g}",
        "lines of the largest file": str(max(len(path.read_text(encoding="utf-8").splitlines()) for path in modules)),
        "lines of the package": str(sum(len(path.read_text(encoding="utf-8").splitlines()) for path in modules)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT])
    checkouts = parser.parse_args().checkouts or [ROOT]
    for checkout in checkouts:
        if not (checkout / "cllm_export").is_dir():
            parser.error(f"{checkout} is no checkout: it has no cllm_export")
    columns = [figures(checkout.resolve()) for checkout in checkouts]
    for name in columns[0]:
        print(f"{name:50}", *(f"{column[name]:32}" for column in columns))


if __name__ == "__main__":
    main()
