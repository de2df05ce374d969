"""Finds the values that SQL names. It works on tokens only: enough to find literals, but not a parser."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

Kind = Literal["text", "number", "name", "operator"]
Value = str | int | float

_TOKEN = re.compile(
    r"""(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")"""
    r"""|(?P<number>(?<![\w.])\d+(?:\.\d+)?(?!\w))"""
    r"""|(?P<name>[A-Za-z_]\w*)"""
    r"""|(?P<operator><=|>=|<>|!=|==|[^\s\w])"""
)
_COMPARISONS = {"=", "==", "!=", "<>", "<", ">", "<=", ">=", "like", "between", "in"}
_ENDS = {"select", "from", "group", "having", "order", "by", "limit", "*", "union", "except", "intersect"}


class Token(NamedTuple):
    """A token of SQL: its kind and its text. The text is lower-cased, except for literals of kind ``text``."""

    kind: Kind
    text: str


class Condition(NamedTuple):
    """A column compared with a literal."""

    column: str
    operator: str
    value: Value


def tokenize(sql: str) -> Iterator[Token]:
    """The tokens of SQL. Text in double quotes is a literal, as in Spider."""
    for match in _TOKEN.finditer(sql):
        kind: Kind = match.lastgroup  # type: ignore[assignment]
        text = match.group()
        yield Token(kind, _unquote(text) if kind == "text" else text.lower())


def has_literal(sql: str) -> bool:
    """Whether a query names a value: text, or a number that does not follow LIMIT."""
    previous = ""
    for token in tokenize(sql):
        if token.kind == "text" or (token.kind == "number" and previous != "limit"):
            return True
        previous = token.text
    return False


def conditions(sql: str, columns: Collection[str]) -> Iterator[Condition]:
    """Comparisons of a column with a literal. ``columns`` holds the lower-case names of all columns."""
    column = operator = None
    for kind, text in tokenize(sql):
        if kind == "name" and text in columns:
            column, operator = text, None
        elif text in _ENDS and kind != "text":
            column = operator = None
        elif text in _COMPARISONS and kind != "text":
            operator = text
        elif kind in ("text", "number") and column and operator:
            yield Condition(column, operator, text if kind == "text" else _number(text))


def _unquote(text: str) -> str:
    return text[1:-1].replace(text[0] * 2, text[0])


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)
