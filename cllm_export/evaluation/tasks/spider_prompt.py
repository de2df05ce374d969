"""Spider's prompts in the CLLM paper's form, for evaluation and for training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm_export.errors import DataError
from cllm_export.evaluation.sql.schema import Schema, schema_to_tables, spider_schema
from cllm_export.evaluation.tasks.data import Example, read_examples, read_json

INSTRUCTION = (
    "Could you translate the following question into SQL. "
    "Please only generate SQL, don't include explanation in the answer. "
)
TABLES_NAME = "tables.json"


@dataclass(frozen=True, kw_only=True)
class SpiderExample:
    """One question of Spider."""

    id: str
    question: str
    query: str
    schema: Schema


def spider_prompt(schema: Schema, question: str) -> str:
    """The CLLM paper's prompt (arXiv 2403.00835), with the ending of the prompts in ``examples/text_to_sql``."""
    tables = ", ".join(
        f"table named {table.name} with columns {[column.name for column in table.columns]}" for table in schema.tables
    )
    return f"{INSTRUCTION}The SQL database has {tables}. Question: {question}\nSQL:"


def read_spider(data: Path, *, tables: Path | None = None, limit: int | None = None) -> list[SpiderExample]:
    """Read ``train.json`` or ``dev.json``. By default, ``tables.json`` is read from the same directory.

    Raises:
        DataError: a file is missing or malformed, or the database of a question has no schema.
    """
    examples = read_examples(data, "spider", limit=limit)
    schemas = read_schemas(tables or data.parent / TABLES_NAME)
    return [_example(index, example, schemas, data) for index, example in enumerate(examples)]


def read_schemas(path: Path) -> dict[str, Schema]:
    """The schemas of ``tables.json``, by the name of their database.

    Raises:
        DataError: the file is missing or malformed.
    """
    raw = read_json(path)
    if not isinstance(raw, list) or not all(isinstance(entry, Mapping) for entry in raw):
        raise DataError(f"{path} must hold a list of schemas, as Spider's tables.json does")
    schemas = [spider_schema(entry) for entry in raw]
    return {schema.name: schema for schema in schemas}


def spider_prompt_lines(examples: Sequence[SpiderExample]) -> Iterator[str]:
    """Lines of a prompt file for these questions: ``id``, ``prompt``, ``answer`` and ``tables``."""
    for example in examples:
        line: dict[str, Any] = {
            "id": example.id,
            "prompt": spider_prompt(example.schema, example.question),
            "answer": clean_query(example.query),
            "tables": schema_to_tables(example.schema),
        }
        yield json.dumps(line, ensure_ascii=False)


def clean_query(query: str) -> str:
    """A gold query on one line, without the semicolon that some of them have."""
    return " ".join(query.split()).removesuffix(";").strip()


def _example(index: int, raw: Example, schemas: Mapping[str, Schema], path: Path) -> SpiderExample:
    name = raw["db_id"]
    if name not in schemas:
        raise DataError(f"{path}, entry {index + 1}: no schema of the database {name!r} in {TABLES_NAME}")
    return SpiderExample(id=str(index + 1), question=raw["question"], query=raw["query"], schema=schemas[name])
