"""Error messages for the command line: the name of an option becomes its flag."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cllm_export.errors import BundleError, CllmExportError, OptionError, ScalesError, SnapshotError

ABOUT_FILES = (BundleError, ScalesError, SnapshotError)
"""Errors that name keys of a file. Such keys may be spelled like options, but are not options."""
VALUE = r"=(?P<value>True|False|'[^']*'|-?[\w.]*\w)"


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Spelling of an option on the command line."""

    on: str
    off: str | None = None
    """The flag that turns a switch off."""
    is_switch: bool = False


def replace_words(text: str, words: Mapping[str, str]) -> str:
    """Replace whole words, except words in quotes, paths or flags: the user wrote those."""
    return _replaced(text, list(words), "", lambda found: words[found["name"]])


@contextmanager
def names_replaced(names: Mapping[str, str]) -> Iterator[None]:
    """Replace field names in errors by the names of the command's parameters."""
    try:
        yield
    except OptionError as error:
        words = {field: names.get(field, field) for field in error.fields}
        if all(field == name for field, name in words.items()):
            raise
        raise OptionError(replace_words(str(error), words), fields=tuple(words.values())) from error


def with_flags(error: CllmExportError, flags: Mapping[str, Flag]) -> str:
    """The message, with flags in place of the names of options.

    ``name=value`` becomes ``--name value``, and ``name=False`` becomes the flag that turns the switch off. A name
    without a value is replaced if it is one of the error's ``fields`` or has an underscore. Of other words, only keys
    of files have underscores. The flag of the option that the error is ``about`` comes first, unless it is named.

    Args:
        flags: flags by field name.
    """
    text = _replaced(str(error), list(flags), VALUE, lambda found: _with_value(flags[found["name"]], found["value"]))
    are_options = not isinstance(error, ABOUT_FILES)
    named = [name for name in flags if name in error.fields or (are_options and "_" in name)]
    text = replace_words(text, {name: flags[name].on for name in named})
    option = flags.get(error.about or "")
    return f"{option.on}: {text}" if option and option.on not in text else text


def with_value(error: Any, arguments: Sequence[str]) -> str:
    """The message of a ``typer.BadParameter``, with the value that the user gave.

    Args:
        arguments: those of the command, as the user wrote them.
    """
    spellings = [*error.param.opts, *error.param.secondary_opts] if error.param else []
    joined = [text.partition("=")[2] for text in arguments if text.partition("=")[0] in spellings and "=" in text]
    apart = [value for flag, value in itertools.pairwise(arguments) if flag in spellings]
    message = str(error.message).removeprefix("Value error, ")  # of pydantic, in which typer checks a choice
    values = [value for value in (*joined, *apart) if value not in message]
    return f"{message}, got {', '.join(map(repr, values))}" if values else message


def _replaced(text: str, names: list[str], suffix: str, by: Callable[[re.Match[str]], str]) -> str:
    if not names:
        return text
    either = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    return re.sub(rf"(?<![\w'\"./-])(?P<name>{either}){suffix}(?![\w'\"/=-]|\.\w)", by, text)


def _with_value(flag: Flag, value: str) -> str:
    if flag.is_switch:
        return flag.on if value != "False" else flag.off or f"no {flag.on}"
    return f"{flag.on} {value.strip(chr(39))}"
