"""Reads data files of public tasks: JSON or JSON Lines, gzip or not. Errors name the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cllm_export.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
FIELDS: dict[str, tuple[str, ...]] = {
    "spider": ("question", "query", "db_id"),
    "humaneval": ("task_id", "prompt", "entry_point", "test"),
    "gsm8k": ("question", "answer"),
    "prompts": ("prompt",),
}
"""Task -> the fields, all strings, that each of its examples must have. The most demanding task comes first."""

Example = Mapping[str, Any]


def read_examples(path: Path, task: str, *, limit: int | None = None) -> list[Example]:
    """Read the examples of a task's file, a JSON list or JSON Lines, and check each for the task's fields.

    Raises:
        DataError: the file is missing, damaged, not JSON, empty, or of another task. The message names the place.
    """
    examples = list(_entries(read_text(path), path))[:limit]
    if not examples:
        raise DataError(f"{path} holds no example: give a data file of the task {task}")
    for where, example in examples:
        _check_fields(example, where, task)
    return [example for _, example in examples]


def read_text(path: Path) -> str:
    """The text of a file, unpacked if it is gzip.

    Raises:
        DataError: the file is missing, unreadable, a damaged gzip, or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}: give the path of the task's data file") from None
    try:
        return (gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data).decode("utf-8-sig")
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text at byte {error.start}: fetch it again") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        DataError: as for ``read_text``, or the JSON is malformed.
    """
    return _parse(read_text(path), str(path))


def _entries(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_parse(text, str(path)), start=1):
            yield f"{path}, entry {number}", entry
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: malformed JSON: {error}") from None


def _check_fields(example: Any, where: str, task: str) -> None:
    if not isinstance(example, dict):
        raise DataError(f"{where}: expected an object with {_list(FIELDS[task])}, got {type(example).__name__}")
    if not (missing := _missing(example, task)):
        return
    fitting = next((other for other in FIELDS if not _missing(example, other)), None)
    advice = f"this looks like data of task='{fitting}'" if fitting else f"give a data file of task='{task}'"
    raise DataError(f"{where}: lacks the text field(s) {_list(missing)}; it has {_list(sorted(example))}: {advice}")


def _missing(example: Mapping[str, Any], task: str) -> list[str]:
    return [field for field in FIELDS[task] if not isinstance(example.get(field), str)]


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
