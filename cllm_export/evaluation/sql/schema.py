"""Database schemas, from Spider's ``tables.json`` or from the ``tables`` of a prompt line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cllm_export.errors import DataError

ColumnType = Literal["text", "number", "date"]
COLUMN_TYPES: tuple[ColumnType, ...] = get_args(ColumnType)
SPIDER_TYPES: dict[str, ColumnType] = {"number": "number", "boolean": "number", "time": "date"}
"""Spider's column types; all others are text."""

_DATES = re.compile(r"(^|_)(date|time|day|birthday|founded_on)($|_)")
_NUMBERS = re.compile(
    r"(^|_)(id|age|year|count|number|num|no|weight|height|length|width|speed|score|rating|rank|points|price|cost|"
    r"salary|budget|amount|total|quantity|capacity|population|area|size|distance|duration|percentage|seats|level|"
    r"attendance|sales|revenue|profit|gdp|hours|minutes|floors|pages|wins|losses|credits|grade|enrollment)($|_)"
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column."""

    name: str
    type: ColumnType


@dataclass(frozen=True, kw_only=True)
class ForeignKey:
    """``column`` of the table that has this key takes values of ``references`` in ``table``."""

    column: str
    table: str
    references: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table."""

    name: str
    columns: tuple[Column, ...]
    primary_key: str | None = None
    foreign_keys: tuple[ForeignKey, ...] = ()

    @property
    def unique_key(self) -> str | None:
        """The primary key, spelled as its column; None if it is also a foreign key, so half of a compound key."""
        referring = {key.column.lower() for key in self.foreign_keys}
        name = (self.primary_key or "").lower()
        return next((own.name for own in self.columns if own.name.lower() == name and name not in referring), None)

    def has(self, column: str) -> bool:
        """Whether the table has a column of this name. Case does not matter, as in SQL."""
        return any(own.name.lower() == column.lower() for own in self.columns)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The tables of one database."""

    name: str
    tables: tuple[Table, ...]

    def __post_init__(self) -> None:
        names = [table.name.lower() for table in self.tables]
        if not names or len(set(names)) < len(names):
            raise DataError(f"the schema {self.name} must have tables of different names, got {names}")
        for table in self.tables:
            columns = [column.name.lower() for column in table.columns]
            if not columns or len(set(columns)) < len(columns):
                raise DataError(f"table {table.name} of {self.name} must have different columns, got {columns}")
            self._check_keys(table)

    def table(self, name: str) -> Table | None:
        """The table of this name, ignoring case; None if there is none."""
        return next((table for table in self.tables if table.name.lower() == name.lower()), None)

    def _check_keys(self, table: Table) -> None:
        if table.primary_key is not None and not table.has(table.primary_key):
            raise DataError(f"table {table.name} of {self.name} has no column {table.primary_key}, its primary key")
        for key in table.foreign_keys:
            target = self.table(key.table)
            if not table.has(key.column) or target is None or not target.has(key.references):
                raise DataError(
                    f"{self.name}: {table.name}.{key.column} refers to {key.table}.{key.references}: no such"
                )


def spider_schema(raw: Mapping[str, Any]) -> Schema:
    """The schema of one entry of Spider's ``tables.json``. A compound primary key is left out.

    Raises:
        DataError: the entry does not have that form.
    """
    try:
        return _spider_schema(raw)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"not an entry of Spider's tables.json ({error!r}): fetch the file again") from None


def _spider_schema(raw: Mapping[str, Any]) -> Schema:
    names, columns = raw["table_names_original"], raw["column_names_original"]
    typed = list(zip(columns, raw["column_types"], strict=True))
    keys: dict[int, list[ForeignKey]] = {index: [] for index in range(len(names))}
    for source, target in raw["foreign_keys"]:
        (table, name), (other, referred) = columns[source], columns[target]
        keys[table].append(ForeignKey(column=name, table=names[other], references=referred))
    primary = {columns[index][0]: columns[index][1] for index in raw["primary_keys"] if isinstance(index, int)}
    return Schema(
        name=raw["db_id"],
        tables=tuple(
            Table(
                name=name,
                columns=tuple(
                    Column(name=column, type=SPIDER_TYPES.get(kind, "text"))
                    for (owner, column), kind in typed
                    if owner == index
                ),
                primary_key=primary.get(index),
                foreign_keys=tuple(keys[index]),
            )
            for index, name in enumerate(names)
            if not name.lower().startswith("sqlite_")  # SQLite reserves these names
        ),
    )


def schema_to_tables(schema: Schema) -> list[dict[str, Any]]:
    """The ``tables`` field of a prompt line for this schema."""
    return [
        {
            "name": table.name,
            "cols": [column.name for column in table.columns],
            "types": [column.type for column in table.columns],
            "pk": table.primary_key,
            "fk": [[key.column, key.table, key.references] for key in table.foreign_keys],
        }
        for table in schema.tables
    ]


def schema_from_tables(raw: object, where: str) -> Schema:
    """The schema of a prompt line's ``tables``: a list of ``{name, cols, pk, fk}`` with optional ``types``.

    ``fk`` is null, a table name, or a list of ``[column, table, referred column]``. A table name means that this table
    holds that table's primary key under the same name. Missing types are guessed from the columns' names.

    Raises:
        DataError: ``tables`` does not have that form.
    """
    if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
        raise DataError(f"{where}: `tables` must be a list of objects with name, cols, pk and fk, got {raw!r:.80}")
    primary = {str(entry.get("name")): entry.get("pk") for entry in raw}
    try:
        return Schema(name=where, tables=tuple(_table(entry, primary) for entry in raw))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: `tables` needs name, cols, pk and fk ({error!r})") from None


def _table(raw: Mapping[str, Any], primary: Mapping[str, Any]) -> Table:
    names = [str(name) for name in raw["cols"]]
    types = raw.get("types") or [guess_type(name) for name in names]
    if bad := [kind for kind in types if kind not in COLUMN_TYPES]:
        raise ValueError(f"types must be of {', '.join(COLUMN_TYPES)}, got {bad[0]!r}")
    return Table(
        name=str(raw["name"]),
        columns=tuple(Column(name=name, type=kind) for name, kind in zip(names, types, strict=True)),
        primary_key=raw.get("pk"),
        foreign_keys=tuple(_foreign_keys(raw.get("fk"), primary)),
    )


def _foreign_keys(raw: str | Sequence[Sequence[str]] | None, primary: Mapping[str, Any]) -> list[ForeignKey]:
    if not raw:
        return []
    if isinstance(raw, str):
        return [ForeignKey(column=primary[raw], table=raw, references=primary[raw])]
    return [ForeignKey(column=column, table=table, references=referred) for column, table, referred in raw]


def guess_type(column: str) -> ColumnType:
    """The type that a column's name suggests; text if it suggests none."""
    if _DATES.search(column.lower()):
        return "date"
    return "number" if _NUMBERS.search(column.lower()) else "text"
