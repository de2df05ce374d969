"""Generates seeded rows for a schema, such that its queries find something.

Public copies of text-to-SQL tasks lack their rows. Each table gets one *planted* row for each query, with the values
that the query names, and random rows in addition. The planted rows of one query refer to each other through their
foreign keys, so that joins find them too.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from cllm_export.evaluation.sql.schema import Column, ForeignKey, Schema, Table
from cllm_export.evaluation.sql.sql_literals import Condition, Value, conditions

Row = tuple[Value, ...]
NUM_RANDOM_ROWS = (20, 36)
MAX_PLANTED = 250
WORDS = ("Amber", "Birch", "Cedar", "Delta", "Ember", "Falcon", "Garnet", "Harbor", "Indigo", "Juniper", "Kestrel")


def make_rows(schema: Schema, queries: Sequence[str], *, seed: int) -> dict[str, list[Row]]:
    """Rows for every table. Equal schema, queries and seed give equal rows.

    Foreign keys refer to existing rows, and primary keys are unique.
    """
    return _Generator(schema, queries, seed).rows()


class _Generator:
    def __init__(self, schema: Schema, queries: Sequence[str], seed: int) -> None:
        self._schema = schema
        self._seed = seed
        names = {column.name.lower() for table in schema.tables for column in table.columns}
        found = (tuple(conditions(query, names)) for query in queries)
        self._planted = list(dict.fromkeys(entry for entry in found if entry))[:MAX_PLANTED]
        self._values: dict[tuple[str, str], list[Value]] = {}
        self._open: set[tuple[str, str]] = set()

    def rows(self) -> dict[str, list[Row]]:
        return {
            table.name: list(zip(*(self._column(table, column) for column in table.columns), strict=True))
            for table in self._schema.tables
        }

    def _column(self, table: Table, column: Column) -> list[Value]:
        """The values of a column. A foreign key takes its values from its target, unless the keys form a cycle."""
        place = _place(table, column.name)
        if place not in self._values:
            target = self._target(table, column.name)
            self._open.add(place)
            self._values[place] = self._referring(table, column, target) if target else self._own(table, column)
            self._open.discard(place)
        return self._values[place]

    def _target(self, table: Table, column: str) -> tuple[Table, Column] | None:
        """The target of a foreign key; None if the column is no key, or if the target depends on this column."""
        key = next((key for key in table.foreign_keys if key.column.lower() == column.lower()), None)
        other = self._schema.table(key.table) if key else None
        if key is None or other is None or _place(other, key.references) in self._open | {_place(table, column)}:
            return None
        return other, next(column for column in other.columns if column.name.lower() == key.references.lower())

    def _count(self, table: Table) -> int:
        return len(self._planted) + self._random(table.name, "count").randint(*NUM_RANDOM_ROWS)

    def _referring(self, table: Table, column: Column, target: tuple[Table, Column]) -> list[Value]:
        """Values of a foreign key. Some rows are referred to often, some never. Planted rows refer to planted rows."""
        values, source = self._column(*target), self._random(table.name, column.name)
        popular = source.sample(values, max(1, 3 * len(values) // 4))
        count = self._count(table) - len(self._planted)
        return values[: len(self._planted)] + [popular[int(len(popular) * source.random() ** 3)] for _ in range(count)]

    def _own(self, table: Table, column: Column) -> list[Value]:
        source = self._random(table.name, column.name)
        pool = self._pool(column)
        names = self._names(table, column)
        values: list[Value] = [self._value(column, names, entry, pool, source) for entry in self._planted]
        values += [source.choice(pool) for _ in range(self._count(table) - len(values))]
        return _distinct(values, column) if table.unique_key == column.name else values

    def _names(self, table: Table, column: Column) -> set[str]:
        """Names that a query may use for the column's values: its own, and those of foreign keys that refer to it."""
        keys = [key for other in self._schema.tables for key in other.foreign_keys]
        referring = {key.column.lower() for key in keys if _place_referred(key) == _place(table, column.name)}
        return referring | {column.name.lower()}

    def _value(
        self,
        column: Column,
        names: Collection[str],
        entry: Sequence[Condition],
        pool: Sequence[Value],
        source: random.Random,
    ) -> Value:
        own = [condition for condition in entry if condition.column in names]
        return _satisfying(own, column) if own else source.choice(pool)

    def _pool(self, column: Column) -> list[Value]:
        """The values that random rows draw from: half made up, half close to values that queries name.

        The close values make some rows miss a query narrowly. Columns of equal name share these values, so that
        joins on them find something.
        """
        source = self._random(column.name)
        near = [
            value
            for entry in self._planted
            for condition in entry
            if condition.column == column.name.lower()
            for value in _around(condition)
        ]
        made = [_made_up(column, source) for _ in range(10)]
        return made + source.choices(near, k=10) if near else made

    def _random(self, *parts: str) -> random.Random:
        return random.Random("/".join((str(self._seed), *parts)).lower())  # noqa: S311 - data, not a secret


def _place(table: Table, column: str) -> tuple[str, str]:
    return table.name.lower(), column.lower()


def _place_referred(key: ForeignKey) -> tuple[str, str]:
    return key.table.lower(), key.references.lower()


def _made_up(column: Column, source: random.Random) -> Value:
    name = column.name.lower()
    if column.type == "date":
        return f"{source.randint(1985, 2024)}-{source.randint(1, 12):02}-{source.randint(1, 28):02}"
    if column.type == "text":
        return source.choice(WORDS) + source.choice(("", "", f" {source.randint(1, 9)}"))
    if "year" in name:
        return source.randint(1985, 2024)
    return source.randint(1, source.choice((10, 100, 1000, 100_000)))


def _around(condition: Condition) -> list[Value]:
    """Values at and on both sides of a condition's value."""
    value = condition.value
    if not isinstance(value, str):
        return [value - 1, value, value + 1]
    if condition.operator == "like":
        core = _without_wildcards(value)
        return [core, f"{core} Amber", f"Amber {core}", f"Amber {core} Birch"]
    return [value]


def _without_wildcards(pattern: str) -> str:
    return pattern.replace("%", "").replace("_", "x")


def _satisfying(entry: Sequence[Condition], column: Column) -> Value:
    """A value that satisfies the first condition, and also the second if the two are the ends of a range."""
    _, operator, value = entry[0]
    if operator == "like":
        return _without_wildcards(str(value))
    if not isinstance(value, str):
        if operator == "between" and len(entry) > 1 and not isinstance(entry[1].value, str):
            return (value + entry[1].value) // 2
        return value + {">": 1, "<": -1, "!=": 1, "<>": 1}.get(operator, 0)
    if operator in (">", "!=", "<>"):
        return value + "1" if column.type != "number" else value
    return value


def _distinct(values: Sequence[Value], column: Column) -> list[Value]:
    """The values with duplicates replaced, so that they can be a primary key."""
    seen: set[Value] = set()
    distinct: list[Value] = []
    for value in values:
        number, fresh = 0, value
        while _stored(fresh, column) in seen:
            number += 1
            fresh = number if column.type == "number" else f"{value} {number}"
        seen.add(_stored(fresh, column))
        distinct.append(fresh)
    return distinct


def _stored(value: Value, column: Column) -> Value:
    """A value as SQLite stores it: as a number in a number column if it looks like one, as text in other columns."""
    if column.type != "number":
        return str(value)
    try:
        return float(value)
    except ValueError:
        return value
