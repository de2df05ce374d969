"""Writes SQLite files for a schema, and runs queries on them that can only read, within fixed limits."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from cllm_export.evaluation.sql.rows import Row
from cllm_export.evaluation.sql.schema import Schema, Table

Cell = str | int | float | bytes | None
AFFINITY = {"text": "TEXT", "date": "TEXT", "number": "NUMERIC"}
READ_ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile"}
STEPS_A_CALL, MAX_CALLS = 10_000, 300
"""A query may take about their product in steps of SQLite's virtual machine. The limit always stops a query at the
same step."""
MAX_ROWS, MAX_BYTES = 20_000, 1_000_000


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a query: its rows, or the reason why there are none."""

    rows: tuple[tuple[Cell, ...], ...] = ()
    error: str | None = None


def write_database(path: Path, schema: Schema, rows: Mapping[str, Sequence[Row]]) -> None:
    """Write one SQLite file with the schema's tables and these rows."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        for table in schema.tables:
            connection.execute(_create(table))
            places = ", ".join("?" * len(table.columns))
            connection.executemany(f"INSERT INTO {quote(table.name)} VALUES ({places})", rows[table.name])  # noqa: S608
        connection.commit()


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that may only select. The file is opened read-only, and an authorizer checks every statement."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.set_authorizer(_judge)
    return connection


def query(connection: sqlite3.Connection, sql: str) -> Result:
    """Run one statement of untrusted SQL on a connection of ``open_read_only``. Errors are returned, not raised."""
    calls = iter(range(MAX_CALLS))
    connection.set_progress_handler(lambda: next(calls, None) is None, STEPS_A_CALL)
    try:
        with closing(connection.execute(sql)) as cursor:
            if cursor.description is None:
                return Result(error="not a query")
            rows = cursor.fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError, RecursionError) as error:
        return Result(error=str(error) or type(error).__name__)
    return Result(error="too many rows") if len(rows) > MAX_ROWS else Result(rows=tuple(rows))


def quote(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _create(table: Table) -> str:
    columns = [f"{quote(column.name)} {AFFINITY[column.type]}" for column in table.columns]
    if table.unique_key:
        columns.append(f"PRIMARY KEY ({quote(table.unique_key)})")
    columns += [
        f"FOREIGN KEY ({quote(key.column)}) REFERENCES {quote(key.table)} ({quote(key.references)})"
        for key in table.foreign_keys
    ]
    return f"CREATE TABLE {quote(table.name)} ({', '.join(columns)})"


def _judge(action: int, _first: str | None, second: str | None, *_: str | None) -> int:
    if action not in READ_ACTIONS or (action == sqlite3.SQLITE_FUNCTION and second in FORBIDDEN_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK
