"""Write the data of the example: training questions, and questions over schemas that training never saw: some to watch
the training by (validation), others to judge its end by (held-out).

    python examples/text_to_sql/generate.py --output DIR [--train 150000] [--held-out 500] [--seed 0]

Deterministic by seed. Every answer is executed in SQLite on its schema: one that does not run stops the program.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from questions import random_question
from schemas import Table, random_schema

SQL_TYPES = {"text": "TEXT", "number": "INTEGER", "date": "INTEGER"}


def prompt_of(tables: list[Table], question: str) -> str:
    """The Spider prompt of the CLLM paper without its first two sentences, which are the same in every prompt."""
    described = ", ".join(f"table named {table.name} with columns {table.column_names}" for table in tables)
    return f"The SQL database has {described}. Question: {question}\nSQL:"


def questions(rng: random.Random, *, held_out: bool) -> Iterator[dict[str, object]]:
    """Lines of a prompt file, without end; ``held_out``: over held-out tables only, else over none of them."""
    while True:
        yield _line(random_schema(rng, held_out=held_out), rng)


def _line(tables: list[Table], rng: random.Random) -> dict[str, object]:
    question = random_question(rng, tables)
    _execute(tables, question.sql)
    return {
        "prompt": prompt_of(tables, question.text),
        "answer": " " + question.sql,
        "kind": question.kind,
        "tables": [table.to_dict() for table in tables],
    }


def _execute(tables: list[Table], sql: str) -> None:
    """Run a query on the empty schema, which finds whatever is not valid in it."""
    database = sqlite3.connect(":memory:")
    try:
        for table in tables:
            described = table.to_dict()
            pairs = zip(described["cols"], described["types"], strict=True)  # type: ignore[call-overload]
            columns = ", ".join(f'"{name}" {SQL_TYPES[kind]}' for name, kind in pairs)
            database.execute(f'CREATE TABLE "{table.name}" ({columns})')
        database.execute(sql).fetchall()
    finally:
        database.close()


def write(path: Path, lines: Iterator[dict[str, object]], count: int) -> None:
    """Write ``count`` different lines."""
    seen: set[object] = set()
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            if len(seen) == count:
                break
            if line["prompt"] not in seen:
                seen.add(line["prompt"])
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=150_000)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write(options.output / "train.jsonl", questions(random.Random(options.seed), held_out=False), options.train)
    for offset, name in ((1, "held-out"), (2, "validation")):
        rng = random.Random(options.seed + offset)
        write(options.output / f"{name}.jsonl", questions(rng, held_out=True), options.held_out)


if __name__ == "__main__":
    main()
