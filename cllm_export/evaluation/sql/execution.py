"""Execution match: a predicted query is right if it gives the result of the gold query on every generated database."""

from __future__ import annotations

import itertools
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from cllm_export.evaluation.sql.rows import make_rows
from cllm_export.evaluation.sql.schema import Schema
from cllm_export.evaluation.sql.sql_literals import tokenize
from cllm_export.evaluation.sql.sqlite_files import Cell, Result, open_read_only, query, write_database

SEEDS = (1, 2, 3)
"""One database for each seed. A wrong query that is right by luck on one is seldom right on all."""
MAX_PERMUTED = 6
Rows = Sequence[tuple[Cell, ...]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgement of a prediction against its gold query."""

    matches: bool | None
    """None if the gold query itself fails, so no judgement is possible."""
    gold_is_empty: bool
    """Whether the gold query finds nothing on any database. Many wrong queries then match, so a match means little."""
    error: str | None = None
    """The error of the gold query if that fails, otherwise the error of the prediction if that fails."""


def execution_matches(schema: Schema, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Judge (gold, prediction) pairs that all query one schema.

    The rows are generated from the schema and the gold queries, and are the same on every run. A prediction runs
    read-only, and is stopped after a fixed number of steps.
    """
    with tempfile.TemporaryDirectory(prefix="cllm-export-sqlite-") as directory, ExitStack() as stack:
        connections = [
            stack.enter_context(closing(_database(Path(directory), schema, [gold for gold, _ in pairs], seed)))
            for seed in SEEDS
        ]
        return [_judge(connections, gold, predicted) for gold, predicted in pairs]


def execution_matches_by_schema(
    schemas: Mapping[int, Schema], pairs: Mapping[int, tuple[str, str]]
) -> dict[int, Verdict]:
    """Judge pairs of several schemas. Both mappings are by example number. Equal schemas share their rows."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index in pairs:
        groups.setdefault(schemas[index].tables, []).append(index)
    verdicts: dict[int, Verdict] = {}
    for members in groups.values():
        judged = execution_matches(schemas[members[0]], [pairs[index] for index in members])
        verdicts.update(zip(members, judged, strict=True))
    return verdicts


def same_rows(gold: Rows, predicted: Rows, *, ordered: bool) -> bool:
    """Whether two results are equal. Rows may be in any order unless ``ordered``; columns may be in any order."""
    if len(gold) != len(predicted) or (gold and len(gold[0]) != len(predicted[0])):
        return False
    if not gold:
        return True
    left, right = [_cells(row) for row in gold], [_cells(row) for row in predicted]
    return any(_same(left, [tuple(row[i] for i in order) for row in right], ordered) for order in _orders(left, right))


def is_ordered(sql: str) -> bool:
    """Whether the outermost query has an ORDER BY."""
    depth = 0
    for token in tokenize(sql):
        depth += {"(": 1, ")": -1}.get(token.text, 0) if token.kind == "operator" else 0
        if not depth and token.kind == "name" and token.text == "order":
            return True
    return False


def _database(directory: Path, schema: Schema, queries: Sequence[str], seed: int) -> sqlite3.Connection:
    path = directory / f"{seed}.sqlite"
    write_database(path, schema, make_rows(schema, queries, seed=seed))
    return open_read_only(path)


def _judge(connections: Sequence[sqlite3.Connection], gold: str, predicted: str) -> Verdict:
    wanted = [query(connection, gold) for connection in connections]
    empty = not any(result.rows for result in wanted)
    if failed := next((result.error for result in wanted if result.error), None):
        return Verdict(matches=None, gold_is_empty=False, error=f"gold: {failed}")
    if gold == predicted:
        return Verdict(matches=True, gold_is_empty=empty)
    ordered = is_ordered(gold)
    for connection, expected in zip(connections, wanted, strict=True):
        got = query(connection, predicted)
        if got.error or not _same_result(expected, got, ordered):
            return Verdict(matches=False, gold_is_empty=empty, error=got.error)
    return Verdict(matches=True, gold_is_empty=empty)


def _same_result(expected: Result, got: Result, ordered: bool) -> bool:
    return same_rows(expected.rows, got.rows, ordered=ordered)


def _orders(gold: Rows, predicted: Rows) -> list[tuple[int, ...]]:
    """Orders of the predicted columns in which each column has the same values as the gold column in its place."""
    width = len(gold[0])
    if width > MAX_PERMUTED:
        return [tuple(range(width))]
    wanted = [Counter(column) for column in zip(*gold, strict=True)]
    had = [Counter(column) for column in zip(*predicted, strict=True)]
    fitting = [[index for index in range(width) if had[index] == column] for column in wanted]
    return [order for order in itertools.product(*fitting) if len(set(order)) == width]


def _same(gold: Rows, predicted: Rows, ordered: bool) -> bool:
    return list(gold) == list(predicted) if ordered else Counter(gold) == Counter(predicted)


def _cells(row: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """Round floats, so that sums in another order compare equal. A whole float equals its integer in Python anyway."""
    return tuple(float(f"{cell:.9g}") if isinstance(cell, float) else cell for cell in row)
