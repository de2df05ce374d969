"""General text, on which every model is measured: that of the package, or a file of the user's own.

The package has text of four kinds, in ``texts/``. It was written for this project, and is under its licence.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cllm_export.checks import option
from cllm_export.errors import OptionError

KINDS = ("prose", "code", "dialogue", "mathematics")


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text of one kind."""

    kind: str
    text: str


def text_option() -> Any:
    """The option for a user's own general text."""
    return option(
        None,
        help="A file of plain text on which agreement and perplexity are measured.",
        otherwise="the package's own prose, code, dialogue and mathematics",
        group="Input",
        flag="--text",
    )


def general_passages(path: Path | None = None) -> tuple[Passage, ...]:
    """The package's passages, or a file of plain text as one passage.

    Raises:
        OptionError: the file cannot be read, is not UTF-8, or is blank.
    """
    if path is None:
        files = resources.files("cllm_export.runtime") / "texts"
        return tuple(Passage(kind=kind, text=(files / f"{kind}.txt").read_text(encoding="utf-8")) for kind in KINDS)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"text: cannot read {path}: {error.strerror}", fields=("text",)) from None
    except UnicodeDecodeError as error:
        raise OptionError(f"text: {path} is not valid UTF-8 at byte {error.start}", fields=("text",)) from None
    if not text.strip():
        raise OptionError(f"text: {path} is blank: give a file of plain text", fields=("text",))
    return (Passage(kind=path.name, text=text),)
