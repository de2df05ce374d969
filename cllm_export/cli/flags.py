"""Errors of options as the command line shows them: a field's name becomes its flag."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cllm_export.errors import CllmExportError, OptionError


def replace_words(text: str, words: Mapping[str, str]) -> str:
    """Replace whole words, but none that is quoted or part of a path or flag: those are what the user wrote."""
    if not words:
        return text
    names = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return re.sub(rf"(?<![\w'\"./-])(?:{names})(?![\w'\"/-]|\.\w)", lambda found: words[found[0]], text)


@contextmanager
def names_replaced(names: Mapping[str, str]) -> Iterator[None]:
    """Name the parameters of a command in errors that name fields."""
    try:
        yield
    except OptionError as error:
        words = {field: names.get(field, field) for field in error.fields}
        if all(field == name for field, name in words.items()):
            raise
        raise OptionError(replace_words(str(error), words), fields=tuple(words.values())) from error


def with_flags(error: CllmExportError, flags: Mapping[str, str]) -> str:
    """The message, with flags in place of the names of options.

    Args:
        flags: the flag of every option of the command that ran, by the name of its field.

    Replaced are the error's own ``fields``, and every name with an underscore: no other text has those.
    """
    fields = error.fields if isinstance(error, OptionError) else ()
    return replace_words(str(error), {name: flag for name, flag in flags.items() if name in fields or "_" in name})
