"""Small examples of the public tasks' forms, in words of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLES: list[dict[str, Any]] = [
    {
        "db_id": "harbor",
        "table_names_original": ["Port", "Ship"],
        "column_names_original": [
            [-1, "*"],
            [0, "Port_ID"],
            [0, "City"],
            [0, "Depth"],
            [1, "Ship_ID"],
            [1, "Name"],
            [1, "Tonnage"],
            [1, "Launched"],
            [1, "Port_ID"],
        ],
        "column_types": ["text", "number", "text", "number", "number", "text", "number", "time", "number"],
        "primary_keys": [1, 4],
        "foreign_keys": [[8, 1]],
    }
]
SPIDER: list[dict[str, str]] = [
    {"db_id": "harbor", "question": question, "query": query}
    for question, query in (
        ("How many ships are there?", "SELECT count(*) FROM Ship"),
        ("Which ships weigh over 500 tons?", "SELECT Name FROM Ship WHERE Tonnage  >  500"),
        (
            "Name the ships of Bergen, heaviest first.",
            'SELECT T1.Name FROM Ship AS T1 JOIN Port AS T2 ON T1.Port_ID = T2.Port_ID WHERE T2.City = "Bergen" '
            "ORDER BY T1.Tonnage DESC;",
        ),
        (
            "Which cities have at least two ships?",
            "SELECT T2.City FROM Ship AS T1 JOIN Port AS T2 ON T1.Port_ID = T2.Port_ID GROUP BY T2.Port_ID "
            "HAVING count(*) >= 2",
        ),
        ("Which ports have no ship?", "SELECT City FROM Port WHERE Port_ID NOT IN (SELECT Port_ID FROM Ship)"),
        (
            "Ports deeper than 10 or in Oslo.",
            "SELECT City FROM Port WHERE Depth > 10 UNION SELECT City FROM Port WHERE City = 'Oslo'",
        ),
        (
            "Ships launched between two days.",
            "SELECT Name FROM Ship WHERE Tonnage BETWEEN 20 AND 40 AND Name LIKE '%Sea%'",
        ),
        ("The heaviest ship?", "SELECT Name FROM Ship ORDER BY Tonnage DESC LIMIT 1"),
    )
]
GSM8K: list[dict[str, str]] = [
    {
        "question": "Ann has 3 nets with 400 fish each. How many fish?",
        "answer": "3 x 400 = <<3*400=1200>>1200\n#### 1,200",
    },
    {"question": "It was 4 degrees and fell by 9. What is it now?", "answer": "4 - 9 = -5\n#### -5"},
    {"question": "Half of 5 crowns?", "answer": "5 / 2 = 2.5 crowns\n#### 2.5"},
]
HUMANEVAL: list[dict[str, str]] = [
    {
        "task_id": "Own/0",
        "prompt": 'from typing import List\n\n\ndef widest(gaps: List[int]) -> int:\n    """The widest, or 0."""\n',
        "entry_point": "widest",
        "canonical_solution": "    return max(gaps, default=0)\n",
        "test": "def check(candidate):\n    assert candidate([]) == 0\n    assert candidate([3, 9, 2]) == 9\n",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def shout(text: str) -> str:\n    """Upper case, with a mark."""\n',
        "entry_point": "shout",
        "canonical_solution": "    return text.upper() + '!'\n",
        "test": "def check(candidate):\n    assert candidate('hej') == 'HEJ!'\n",
    },
]


def write_spider(directory: Path) -> Path:
    """dev.json with tables.json beside it."""
    (directory / "tables.json").write_text(json.dumps(TABLES), encoding="utf-8")
    return write_json(directory / "dev.json", SPIDER)


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def write_lines(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path
