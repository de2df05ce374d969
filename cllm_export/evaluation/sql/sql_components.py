"""Splits SQL into the components that Spider's exact-set match compares, without values.

A query becomes one ``Components`` of plain tuples, so that ``==`` compares two queries. Aliases are resolved to their
tables, and bare columns to the table that has them. Columns that a foreign key links count as one.

As in Spider (Yu et al. 2018, arXiv 1809.08887), literals and the number after LIMIT are left out. DISTINCT and join
conditions are not compared. The order within a clause is compared only for ORDER BY.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from cllm_export.evaluation.sql.schema import Schema
from cllm_export.extras import missing_extra, require_floors

try:
    import sqlglot
    from sqlglot import exp
    from sqlglot.dialects.sqlite import SQLite
    from sqlglot.errors import SqlglotError
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "sqlglot", extra="evaluate") from None
require_floors("sqlglot")

VALUE = "value"
Key = tuple[Any, ...] | str


class SpiderSQL(SQLite):
    """SQLite's SQL, where double quotes also mark text: Spider writes literals that way."""

    class Tokenizer(SQLite.Tokenizer):
        QUOTES = ["'", '"']  # noqa: RUF012 - sqlglot reads it from the class
        IDENTIFIERS = ["`", ("[", "]")]  # noqa: RUF012


class UnparsableError(ValueError):
    """A text that is not one SQL query."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """A query as comparable parts. Sequences are sorted, except ``order_by`` and ``set_operation``."""

    tables: tuple[Key, ...]
    select: tuple[Key, ...]
    where: tuple[Key, ...]
    connectors: tuple[str, ...]
    """Which of ``and`` and ``or`` connect the conditions of WHERE."""
    group_by: tuple[Key, ...]
    having: tuple[Key, ...]
    order_by: tuple[Key, ...]
    limit: bool
    set_operation: tuple[Key, ...]
    """Each set operation with the components of its right-hand query, or empty."""

    def differing(self, other: Components) -> list[str]:
        """Names of the components in which two queries differ."""
        return [part.name for part in fields(self) if getattr(self, part.name) != getattr(other, part.name)]


def components(sql: str, schema: Schema) -> Components:
    """Split one query into its components.

    Raises:
        UnparsableError: it is neither one SELECT nor a set operation of SELECTs.
    """
    try:
        statements = [statement for statement in sqlglot.parse(sql, read=SpiderSQL) if statement]
        if len(statements) != 1:
            raise UnparsableError(f"expected one statement, got {len(statements)}")
        return _Query(statements[0], _Names(schema), {}).components()
    except (SqlglotError, RecursionError) as error:
        raise UnparsableError(str(error)) from None


class _Names:
    """Column names of a schema. All columns that foreign keys link share one representative name."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def has(self, table: str, column: str) -> bool:
        found = self._schema.table(table)
        return found is not None and found.has(column)

    def representative(self, table: str, column: str) -> str:
        return self._tied.get((table, column), f"{table}.{column}")

    @cached_property
    def _tied(self) -> Mapping[tuple[str, str], str]:
        groups: dict[tuple[str, str], set[tuple[str, str]]] = {}
        for table in self._schema.tables:
            for key in table.foreign_keys:
                first = (table.name.lower(), key.column.lower())
                second = (key.table.lower(), key.references.lower())
                merged = groups.get(first, {first}) | groups.get(second, {second})
                groups.update(dict.fromkeys(merged, merged))
        return {member: ".".join(min(group)) for member, group in groups.items()}


class _Query:
    """One SELECT or set operation, with the tables that its columns may come from."""

    def __init__(self, node: exp.Expr, names: _Names, outer: Mapping[str, str]) -> None:
        while isinstance(node, exp.Subquery):
            node = node.this
        if not isinstance(node, exp.Select | exp.SetOperation):
            raise UnparsableError(f"expected a SELECT, got {type(node).__name__}")
        self._node = node
        self._names = names
        self._left = self._leftmost(node)
        self._own = dict(self._sources(self._left))
        self._outer = outer

    def components(self) -> Components:
        left, node = self._left, self._node
        where, having = left.args.get("where"), left.args.get("having")
        conditions = _conditions(where.this) if where else []
        return Components(
            tables=_sorted(self._tables()),
            select=_sorted(self._key(entry) for entry in left.expressions),
            where=_sorted(self._key(condition) for condition in conditions),
            connectors=tuple(sorted(_connectors(where.this))) if where else (),
            group_by=_sorted(self._key(entry) for entry in _expressions(left, "group")),
            having=_sorted(self._key(condition) for condition in _conditions(having.this)) if having else (),
            order_by=tuple(self._key(entry) for entry in _expressions(left, "order") or _expressions(node, "order")),
            limit=bool(left.args.get("limit") or node.args.get("limit")),
            set_operation=self._set_operation(),
        )

    def _set_operation(self) -> tuple[Key, ...]:
        if isinstance(self._node, exp.Select):
            return ()
        operations = list(_operations(self._node))
        return tuple(
            (type(operation).__name__.lower(), _astuple(_Query(operation.expression, self._names, {}).components()))
            for operation in operations
        )

    @staticmethod
    def _leftmost(node: exp.Expr) -> exp.Select:
        while not isinstance(node, exp.Select):
            if not isinstance(node, exp.SetOperation | exp.Subquery):
                raise UnparsableError(f"expected a SELECT, got {type(node).__name__}")
            node = node.this
        return node

    def _from(self) -> Iterator[exp.Expr]:
        if origin := self._left.args.get("from_"):
            yield origin.this
        for join in self._left.args.get("joins") or ():
            yield join.this

    def _tables(self) -> Iterator[Key]:
        for source in self._from():
            yield source.name.lower() if isinstance(source, exp.Table) else self._subquery(source)

    def _sources(self, select: exp.Select) -> Iterator[tuple[str, str]]:
        """Names that columns may be qualified with -> the table they mean."""
        origin = select.args.get("from_")
        joins = [join.this for join in select.args.get("joins") or ()]
        for source in [origin.this, *joins] if origin else joins:
            if isinstance(source, exp.Table):
                yield (source.alias or source.name).lower(), source.name.lower()

    def _subquery(self, node: exp.Expr) -> Key:
        return _astuple(_Query(node, self._names, {**self._outer, **self._own}).components())

    def _key(self, node: Any) -> Key:
        """An expression as a tuple: its kind, then its parts."""
        for kinds, key in self._special:
            if isinstance(node, kinds):
                return key(node)
        return self._parts(node)

    @cached_property
    def _special(self) -> tuple[tuple[tuple[type, ...], Callable[[Any], Key]], ...]:
        """Kinds of expressions -> function that gives the key of one. ``_parts`` handles all other kinds."""
        return (
            ((exp.Paren, exp.Alias), lambda node: self._key(node.this)),
            ((exp.Literal, exp.Boolean, exp.Null, exp.Neg), lambda _: VALUE),
            ((exp.Star,), lambda _: "*"),
            ((exp.Column,), self._column),
            ((exp.Select, exp.SetOperation, exp.Subquery), self._subquery),
            ((exp.Distinct,), self._distinct),
            ((exp.Ordered,), lambda node: ("desc" if node.args.get("desc") else "asc", self._key(node.this))),
            ((exp.In,), self._in),
        )

    def _distinct(self, node: exp.Distinct) -> Key:
        return self._key(node.expressions[0]) if len(node.expressions) == 1 else self._parts(node)

    def _in(self, node: exp.In) -> Key:
        return self._parts(node) if node.args.get("query") else ("in", self._key(node.this), VALUE)

    def _parts(self, node: exp.Expr) -> Key:
        children = list(node.iter_expressions())
        own = node.name.lower() if isinstance(node, exp.Anonymous | exp.Identifier) else ""
        return (type(node).__name__.lower(), own, *(self._key(child) for child in children))

    def _column(self, node: exp.Column) -> str:
        if isinstance(node.this, exp.Star):
            return "*"
        name, qualifier = node.name.lower(), node.table.lower()
        if qualifier:
            table = self._own.get(qualifier) or self._outer.get(qualifier) or qualifier
            return self._names.representative(table, name)
        for scope in (self._own, self._outer):
            for table in scope.values():
                if self._names.has(table, name):
                    return self._names.representative(table, name)
        return f"?.{name}"


def _conditions(node: exp.Expr) -> list[exp.Expr]:
    """The conditions that AND and OR connect, as one list."""
    if isinstance(node, exp.Paren) and isinstance(node.this, exp.Connector):
        node = node.this
    if isinstance(node, exp.Connector):
        return _conditions(node.left) + _conditions(node.right)
    return [node]


def _connectors(node: exp.Expr) -> set[str]:
    if isinstance(node, exp.Paren):
        node = node.this
    if not isinstance(node, exp.Connector):
        return set()
    return {type(node).__name__.lower()} | _connectors(node.left) | _connectors(node.right)


def _operations(node: exp.Expr) -> Iterator[exp.SetOperation]:
    """The set operations of a chain, first to last."""
    if isinstance(node, exp.SetOperation):
        yield from _operations(node.this)
        yield node


def _expressions(node: exp.Expr, clause: str) -> list[exp.Expr]:
    found = node.args.get(clause)
    return list(found.expressions) if found else []


def _sorted(keys: Iterator[Key]) -> tuple[Key, ...]:
    return tuple(sorted(keys, key=repr))


def _astuple(parts: Components) -> Key:
    return tuple(getattr(parts, part.name) for part in fields(parts))
