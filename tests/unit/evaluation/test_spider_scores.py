"""Spider's scorers: what counts as the same query, and as the same result on generated rows."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cllm_export.errors import DataError
from cllm_export.evaluation.sql.exact_set_match import exact_set_match
from cllm_export.evaluation.sql.execution import execution_matches, is_ordered, same_rows
from cllm_export.evaluation.sql.rows import make_rows
from cllm_export.evaluation.sql.schema import guess_type, schema_from_tables, schema_to_tables, spider_schema
from cllm_export.evaluation.sql.sql_literals import Condition, conditions, has_literal
from cllm_export.evaluation.sql.sqlite_files import open_read_only, query, write_database
from cllm_export.evaluation.tasks.spider_prompt import read_spider, spider_prompt, spider_prompt_lines
from cllm_export.evaluation.tasks.spider_task import predicted_query, score_spider
from tests.evaluation_data import SPIDER, TABLES, write_spider

SCHEMA = spider_schema(TABLES[0])
GOLD = [example["query"] for example in SPIDER]
COLUMNS = {"name", "city", "tonnage", "depth"}
SAME = [
    ("SELECT Name, Tonnage FROM Ship", "select tonnage, NAME from ship"),
    ("SELECT Name FROM Ship WHERE Tonnage > 5", "SELECT T1.Name FROM Ship AS T1 WHERE T1.Tonnage > 900"),
    (
        "SELECT Name FROM Ship WHERE Name = 'a' AND Tonnage > 1",
        'SELECT Name FROM Ship WHERE Tonnage > 2 AND Name = "b"',
    ),
    ("SELECT count(*) FROM Ship GROUP BY Port_ID", "SELECT COUNT( * ) FROM Ship GROUP BY Ship.Port_ID"),
    (
        "SELECT T1.Port_ID FROM Ship AS T1 JOIN Port AS T2 ON T1.Port_ID = T2.Port_ID",
        "SELECT b.Port_ID FROM Port AS b JOIN Ship AS a ON a.Port_ID = b.Port_ID",
    ),
    ("SELECT Name FROM Ship ORDER BY Tonnage ASC LIMIT 3", "SELECT Name FROM Ship ORDER BY Tonnage LIMIT 9"),
    ("SELECT DISTINCT Name FROM Ship", "SELECT Name FROM Ship"),
    ("SELECT City FROM Port WHERE City IN ('a')", "SELECT City FROM Port WHERE City IN ('b', 'c')"),
]
DIFFERENT = [
    ("SELECT Name FROM Ship", "SELECT City FROM Port", "select"),
    ("SELECT max(Tonnage) FROM Ship", "SELECT min(Tonnage) FROM Ship", "select"),
    ("SELECT Name FROM Ship WHERE Tonnage > 5", "SELECT Name FROM Ship WHERE Tonnage < 5", "where"),
    ("SELECT Name FROM Ship WHERE Tonnage > 5", "SELECT Name FROM Ship", "where"),
    (
        "SELECT Name FROM Ship WHERE Tonnage > 5 AND Ship_ID = 1",
        "SELECT Name FROM Ship WHERE Tonnage > 5 OR Ship_ID = 1",
        "connectors",
    ),
    ("SELECT Name FROM Ship GROUP BY Name", "SELECT Name FROM Ship GROUP BY Tonnage", "group_by"),
    (
        "SELECT Name FROM Ship GROUP BY Name HAVING count(*) > 1",
        "SELECT Name FROM Ship GROUP BY Name HAVING count(*) < 1",
        "having",
    ),
    ("SELECT Name FROM Ship ORDER BY Tonnage", "SELECT Name FROM Ship ORDER BY Tonnage DESC", "order_by"),
    ("SELECT Name FROM Ship LIMIT 1", "SELECT Name FROM Ship", "limit"),
    (
        "SELECT City FROM Port UNION SELECT Name FROM Ship",
        "SELECT City FROM Port EXCEPT SELECT Name FROM Ship",
        "set_operation",
    ),
    ("SELECT City FROM Port UNION SELECT Name FROM Ship", "SELECT City FROM Port", "set_operation"),
    (
        "SELECT City FROM Port WHERE Port_ID NOT IN (SELECT Port_ID FROM Ship)",
        "SELECT City FROM Port WHERE Port_ID NOT IN (SELECT Ship_ID FROM Ship)",
        "where",
    ),
    ("SELECT Name FROM Ship", "SELECT Name FROM Ship JOIN Port ON Ship.Port_ID = Port.Port_ID", "tables"),
]


@pytest.fixture
def examples(tmp_path: Path):
    return read_spider(write_spider(tmp_path))


@pytest.fixture
def database(tmp_path: Path):
    path = tmp_path / "a.sqlite"
    write_database(path, SCHEMA, make_rows(SCHEMA, GOLD, seed=1))
    with closing(open_read_only(path)) as connection:
        yield connection


@pytest.mark.parametrize(("gold", "predicted"), SAME)
def test_queries_that_differ_in_values_spelling_or_order_match(gold, predicted):
    assert exact_set_match(SCHEMA, gold, predicted).differing == ()


@pytest.mark.parametrize(("gold", "predicted", "part"), DIFFERENT)
def test_queries_that_differ_in_a_component_do_not_match_and_it_is_named(gold, predicted, part):
    compared = exact_set_match(SCHEMA, gold, predicted)
    assert compared.matches is False
    assert part in compared.differing


@pytest.mark.parametrize(
    "text",
    ["", "I cannot help", "SELECT", "SELECT Name FROM", "DROP TABLE Ship", "SELECT 1; SELECT 2", "(" * 3000, "'"],
)
def test_a_text_that_is_no_query_does_not_match(text):
    assert exact_set_match(SCHEMA, GOLD[0], text).matches is False


def test_the_gold_queries_score_full_marks(examples):
    scores = score_spider(examples, GOLD)
    assert scores.value("exact_set_match") == scores.value("execution_match") == 1.0
    assert scores.value("gold_result_empty") == 0.0


def test_corrupted_queries_score_nothing(examples):
    for corrupted in (
        [f"SELECT count(*) + 1000 FROM ({gold.rstrip(';')})" for gold in GOLD],
        [f"{gold.rstrip(';')} WHERE" for gold in GOLD],
        ["" for _ in GOLD],
        [*GOLD[1:], GOLD[0]],
    ):
        scores = score_spider(examples, corrupted)
        assert scores.value("exact_set_match") == scores.value("execution_match") == 0.0


def test_an_answer_in_a_code_block_or_with_a_semicolon_is_read():
    assert predicted_query("Here:\n```sql\nSELECT 1\nFROM t;\n```\nDone.") == "SELECT 1 FROM t"
    assert predicted_query(" SELECT ';' ;\nSELECT 2") == "SELECT ';'"


def test_a_wrong_literal_is_seen_by_execution_alone():
    wrong = GOLD[2].replace("Bergen", "Oslo")
    assert exact_set_match(SCHEMA, GOLD[2], wrong).matches
    assert execution_matches(SCHEMA, [(GOLD[2], wrong), *((query, query) for query in GOLD)])[0].matches is False


def test_rows_are_the_same_on_every_run_and_differ_by_seed():
    assert make_rows(SCHEMA, GOLD, seed=1) == make_rows(SCHEMA, GOLD, seed=1)
    assert make_rows(SCHEMA, GOLD, seed=1) != make_rows(SCHEMA, GOLD, seed=2)


def test_rows_keep_foreign_keys_and_primary_keys():
    for seed in range(5):
        rows = make_rows(SCHEMA, GOLD, seed=seed)
        ports = [row[0] for row in rows["Port"]]
        assert len(set(ports)) == len(ports)
        assert {row[4] for row in rows["Ship"]} < set(ports)


def test_tables_that_refer_to_each_other_in_a_circle_get_rows():
    tables = [
        {"name": "a", "cols": ["a_id", "b_id"], "pk": "a_id", "fk": [["b_id", "b", "b_id"]]},
        {"name": "b", "cols": ["b_id", "a_id"], "pk": "b_id", "fk": [["a_id", "a", "a_id"]]},
        {"name": "c", "cols": ["c_id", "boss_id"], "pk": "c_id", "fk": [["boss_id", "c", "c_id"]]},
    ]
    rows = make_rows(schema_from_tables(tables, "test"), [], seed=1)
    assert all(rows[name] for name in "abc")
    assert {row[1] for row in rows["c"]} <= {row[0] for row in rows["c"]}


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM Ship",
        "DROP TABLE Ship",
        "INSERT INTO Ship VALUES (1, 'a', 1, 'b', 1)",
        "UPDATE Ship SET Name = 'x'",
        "CREATE TABLE t (a)",
        "CREATE TEMP TABLE t AS SELECT 1",
        "ATTACH DATABASE '/etc/passwd' AS p",
        "PRAGMA query_only = OFF",
        "VACUUM INTO 'copy.sqlite'",
        "SELECT load_extension('x')",
        "BEGIN",
        "",
        "SELECT 1; SELECT 2",
        "SELECT randomblob(1000000000)",
        "SELECT \x00",
    ],
)
def test_sql_that_does_more_than_read_is_refused(database: sqlite3.Connection, sql):
    before = query(database, "SELECT count(*), total(Tonnage) FROM Ship")
    assert query(database, sql).error
    assert query(database, "SELECT count(*), total(Tonnage) FROM Ship") == before


def test_a_query_without_end_is_cut_off(database: sqlite3.Connection):
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    assert query(database, endless).error
    assert query(database, "SELECT * FROM Ship a, Ship b, Ship c, Ship d").error


def test_rows_in_another_order_are_equal_unless_the_gold_query_orders_them():
    gold, other = [(1, "a"), (2, "b")], [(2, "b"), (1, "a")]
    assert same_rows(gold, other, ordered=False)
    assert not same_rows(gold, other, ordered=True)
    assert is_ordered("SELECT a FROM t ORDER BY a")
    assert not is_ordered("SELECT a FROM t WHERE b IN (SELECT b FROM u ORDER BY b LIMIT 1)")
    assert not is_ordered("SELECT a FROM t WHERE b = 'order by'")


def test_columns_in_another_order_are_equal_but_rows_must_stay_together():
    assert same_rows([(1, "a"), (2, "b")], [("a", 1), ("b", 2)], ordered=True)
    assert not same_rows([(1, "a"), (2, "b")], [("b", 1), ("a", 2)], ordered=False)
    assert not same_rows([(1,)], [(1, 1)], ordered=False)
    assert same_rows([(1.0,)], [(1,)], ordered=False)
    assert not same_rows([(1,)], [(1,), (1,)], ordered=False)


def test_literals_are_told_from_limits_and_names():
    assert has_literal("SELECT a FROM t WHERE b = 'x'")
    assert has_literal("SELECT a FROM t WHERE b > 3 LIMIT 1")
    assert not has_literal("SELECT T1.a FROM t AS T1 ORDER BY a LIMIT 3")


def test_comparisons_with_literals_are_found_with_their_columns():
    sql = "SELECT max(depth) FROM t WHERE T1.name = 'it''s' AND tonnage BETWEEN 1 AND 2.5 AND city LIKE \"%a%\" LIMIT 3"
    assert list(conditions(sql, COLUMNS)) == [
        Condition("name", "=", "it's"),
        Condition("tonnage", "between", 1),
        Condition("tonnage", "between", 2.5),
        Condition("city", "like", "%a%"),
    ]


def test_a_schema_survives_its_way_through_a_prompt_line():
    assert schema_from_tables(schema_to_tables(SCHEMA), "x").tables == SCHEMA.tables


def test_a_foreign_key_by_table_name_means_its_primary_key():
    tables = [
        {"name": "port", "cols": ["port_id", "city"], "pk": "port_id", "fk": None},
        {"name": "ship", "cols": ["ship_id", "age", "port_id"], "pk": "ship_id", "fk": "port"},
    ]
    [_, ship] = schema_from_tables(tables, "x").tables
    [key] = ship.foreign_keys
    assert (key.column, key.table, key.references) == ("port_id", "port", "port_id")
    assert [column.type for column in ship.columns] == ["number", "number", "number"]


def test_types_are_told_from_names():
    assert [guess_type(name) for name in ("birth_date", "max_speed", "Name")] == ["date", "number", "text"]


@pytest.mark.parametrize(
    "tables",
    [
        "text",
        [1],
        [{"name": "a"}],
        [{"name": "a", "cols": []}],
        [{"name": "a", "cols": ["x", "X"]}],
        [{"name": "a", "cols": ["x"], "pk": "y"}],
        [{"name": "a", "cols": ["x"], "fk": "b"}],
        [{"name": "a", "cols": ["x"], "fk": [["x", "b", "y"]]}],
        [{"name": "a", "cols": ["x"], "types": ["blob"]}],
        [{"name": "a", "cols": ["x"], "types": ["text", "text"]}],
        [],
    ],
)
def test_malformed_tables_are_refused(tables):
    with pytest.raises(DataError):
        schema_from_tables(tables, "line 1")


def test_the_prompt_names_every_table_and_column():
    assert spider_prompt(SCHEMA, "How many?") == (
        "Could you translate the following question into SQL. Please only generate SQL, don't include explanation in "
        "the answer. The SQL database has table named Port with columns ['Port_ID', 'City', 'Depth'], table named Ship "
        "with columns ['Ship_ID', 'Name', 'Tonnage', 'Launched', 'Port_ID']. Question: How many?\nSQL:"
    )


def test_prompt_lines_hold_what_scoring_needs(examples, tmp_path):
    from cllm_export.evaluation.tasks.questions import read_questions
    from cllm_export.evaluation.tasks.score_prompts import score_prompts

    path = tmp_path / "spider.jsonl"
    path.write_text("\n".join(spider_prompt_lines(examples)), encoding="utf-8")
    questions = read_questions(path)
    assert questions[2].prompt.answer == GOLD[2].rstrip(";")
    assert [question.schema.tables for question in questions] == [SCHEMA.tables] * len(GOLD)
    scores = score_prompts(questions, [str(question.prompt.answer) for question in questions])
    assert scores.value("exact_match") == scores.value("execution_match") == 1.0


def test_a_question_of_an_unknown_database_is_refused(tmp_path):
    path = write_spider(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("harbor", "marina", 1), encoding="utf-8")
    with pytest.raises(DataError, match="marina"):
        read_spider(path)


@pytest.mark.parametrize(
    ("gold", "wrong"),
    [
        ("SELECT Name FROM Ship WHERE Tonnage > 500", "SELECT Name FROM Ship"),
        ("SELECT Name FROM Ship WHERE Tonnage > 500", "SELECT Name FROM Ship WHERE Tonnage >= 500"),
        ("SELECT Name FROM Ship WHERE Tonnage > 500", "SELECT Name FROM Ship WHERE Tonnage > 501"),
        ("SELECT Name FROM Ship WHERE Tonnage < 500", "SELECT Name FROM Ship WHERE Tonnage > 500"),
        (
            "SELECT Name FROM Ship WHERE Tonnage BETWEEN 20 AND 40",
            "SELECT Name FROM Ship WHERE Tonnage BETWEEN 20 AND 39",
        ),
        ("SELECT Tonnage FROM Ship WHERE Name LIKE '%sea%'", "SELECT Tonnage FROM Ship WHERE Name LIKE 'sea%'"),
        ("SELECT Tonnage FROM Ship WHERE Name = 'Ran'", "SELECT Tonnage FROM Ship WHERE Name = 'Ron'"),
        ("SELECT Tonnage FROM Ship WHERE Name != 'Ran'", "SELECT Tonnage FROM Ship"),
        ("SELECT DISTINCT Name FROM Ship", "SELECT Name FROM Ship"),
        ("SELECT max(Tonnage) FROM Ship", "SELECT min(Tonnage) FROM Ship"),
        ("SELECT count(*) FROM Ship", "SELECT count(DISTINCT Name) FROM Ship"),
        ("SELECT Name FROM Ship ORDER BY Tonnage", "SELECT Name FROM Ship ORDER BY Tonnage DESC"),
        ("SELECT City FROM Port WHERE Port_ID IN (SELECT Port_ID FROM Ship)", "SELECT City FROM Port"),
        (
            "SELECT Port_ID, count(*) FROM Ship GROUP BY Port_ID HAVING count(*) > 1",
            "SELECT Port_ID, count(*) FROM Ship GROUP BY Port_ID",
        ),
    ],
)
def test_execution_tells_close_queries_apart_even_when_they_are_the_only_ones(gold, wrong):
    assert execution_matches(SCHEMA, [(gold, wrong)])[0].matches is False
