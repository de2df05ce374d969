"""Questions of the synthetic text-to-SQL task: over thirty kinds, each paraphrased, each with its one SQL answer.

The answer is a function of the question and the schema: same order of columns, same aliases (T1 refers to T2), one
way to write each thing. Literals stand in quotes, numbers as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from schemas import Column, Table, random_text


class Question(NamedTuple):
    """A question, its answer, and its kind."""

    text: str
    sql: str
    kind: str


Made = tuple[str, str] | None
"""A question's text and its answer; None where the tables cannot be asked it."""
TableMaker = Callable[[random.Random, Table], Made]
PairMaker = Callable[[random.Random, Table, Table], Made]
"""Of a table and the one it refers to."""

AGGREGATES = {
    "avg": ("average", "mean"),
    "max": ("maximum", "largest", "highest"),
    "min": ("minimum", "smallest", "lowest"),
    "sum": ("total", "sum of the"),
}
COMPARISONS = {
    ">": ("above", "greater than", "more than", "over"),
    "<": ("below", "less than", "under", "smaller than"),
    ">=": ("at least", "no less than"),
    "<=": ("at most", "no more than"),
    "=": ("equal to", "of exactly"),
}
ASK = ("What is the {}", "Show the {}", "List the {}", "Give the {}", "Find the {}", "Return the {}", "Tell me the {}")
COUNT = ("How many {} are there{}", "Count the {}{}", "What is the number of {}{}", "Give the number of {}{}")


def random_question(rng: random.Random, tables: list[Table]) -> Question:
    """A question of a random kind that this schema can be asked."""
    while True:
        kind = rng.choices(KINDS, weights=[WEIGHTS.get(kind, 1.0) for kind in KINDS])[0]
        made = _make(rng, kind, tables)
        if made:
            text, sql = made
            mark = "?" if text.lower().startswith(INTERROGATIVE) else "."
            return Question(text[0].upper() + text[1:] + mark, sql, kind)


def _make(rng: random.Random, kind: str, tables: list[Table]) -> Made:
    if kind in TABLE_MAKERS:
        return TABLE_MAKERS[kind](rng, rng.choice(tables))
    pair = _pair(rng, tables)
    return PAIR_MAKERS[kind](rng, *pair) if pair else None


INTERROGATIVE = ("what", "how", "which", "who")


def _ask(rng: random.Random, what: str) -> str:
    return rng.choice(ASK).format(what)


def _count(rng: random.Random, what: str, condition: str = "") -> str:
    return rng.choice(COUNT).format(what, f" {condition}" if condition else "")


def _columns(rng: random.Random, table: Table, count: int = 1, kind: str | None = None) -> list[Column] | None:
    fitting = [column for column in table.columns if kind in (None, column.type)]
    return rng.sample(fitting, count) if len(fitting) >= count else None


def _numeric(rng: random.Random, table: Table) -> Column | None:
    fitting = [column for column in table.columns if column.type != "text"]
    return rng.choice(fitting) if fitting else None


def _amount(rng: random.Random, table: Table) -> Column | None:
    chosen = _columns(rng, table, kind="number")
    return chosen[0] if chosen else None


def _number(rng: random.Random, column: Column) -> int:
    value = rng.randint(column.low, column.high)
    return value if column.high < 1000 or column.type == "date" or rng.random() < 0.5 else value // 100 * 100 or 100


class Condition(NamedTuple):
    """A condition as the question says it and as SQL says it."""

    phrase: str
    sql: str


def _condition(rng: random.Random, table: Table, prefix: str = "", avoid: Column | None = None) -> Condition | None:
    columns = [column for column in table.columns if column != avoid]
    return _condition_on(rng, rng.choice(columns), prefix) if columns else None


def _condition_on(rng: random.Random, column: Column, prefix: str = "") -> Condition:
    name = prefix + column.name
    if column.type == "text":
        value = random_text(rng, column.pool)
        said = rng.choice(("{} is '{}'", "{} equals '{}'", "{} is equal to '{}'")).format(column.phrase, value)
        return Condition(said, f"{name} = '{value}'")
    operator = rng.choice(list(COMPARISONS) if column.type == "number" else [">", "<", "="])
    value_n = _number(rng, column)
    if column.type == "date":
        said = f"{column.phrase} is {dict(zip('><=', ('after', 'before', 'exactly'), strict=True))[operator]} {value_n}"
        return Condition(said, f"{name} {operator} {value_n}")
    return Condition(
        f"{column.phrase} is {rng.choice(COMPARISONS[operator])} {value_n}", f"{name} {operator} {value_n}"
    )


def _pair(rng: random.Random, tables: list[Table]) -> tuple[Table, Table] | None:
    """A table and the one it refers to."""
    by_name = {table.name: table for table in tables}
    children = [table for table in tables if table.parent]
    if not children:
        return None
    child = rng.choice(children)
    return child, by_name[str(child.parent)]


def _join(child: Table, parent: Table) -> str:
    return f"FROM {child.name} AS T1 JOIN {parent.name} AS T2 ON T1.{parent.key} = T2.{parent.key}"


def _whose(rng: random.Random) -> str:
    return rng.choice(("whose", "where the"))


# --- one table ------------------------------------------------------------------------------------------------------


def _all(rng: random.Random, table: Table) -> Made:
    columns = _columns(rng, table, rng.randint(1, 2))
    if not columns:
        return None
    said = " and ".join(column.phrase for column in columns)
    tail = rng.choice((f"of all {table.plural}", f"of every {table.phrase}", f"of each {table.phrase}"))
    return _ask(rng, f"{said} {tail}"), f"SELECT {', '.join(c.name for c in columns)} FROM {table.name}"


def _count_all(rng: random.Random, table: Table) -> Made:
    return _count(rng, table.plural), f"SELECT count(*) FROM {table.name}"


def _where(rng: random.Random, table: Table) -> Made:
    columns = _columns(rng, table, rng.randint(1, 2))
    condition = _condition(rng, table)
    if not columns or not condition:
        return None
    said = " and ".join(column.phrase for column in columns)
    selected = ", ".join(column.name for column in columns)
    return (
        _ask(rng, f"{said} of {table.plural} {_whose(rng)} {condition.phrase}"),
        f"SELECT {selected} FROM {table.name} WHERE {condition.sql}",
    )


def _where_two(word: str) -> TableMaker:
    def make(rng: random.Random, table: Table) -> Made:
        pair = _columns(rng, table, 2)
        selected = _columns(rng, table)
        if not pair or not selected:
            return None
        first, second = (_condition_on(rng, column) for column in pair)
        return (
            _ask(rng, f"{selected[0].phrase} of {table.plural} {_whose(rng)} {first.phrase} {word} {second.phrase}"),
            f"SELECT {selected[0].name} FROM {table.name} WHERE {first.sql} {word.upper()} {second.sql}",
        )

    return make


def _between(rng: random.Random, table: Table) -> Made:
    column, selected = _numeric(rng, table), _columns(rng, table)
    if not column or not selected:
        return None
    low, high = sorted((_number(rng, column), _number(rng, column)))
    return (
        _ask(rng, f"{selected[0].phrase} of {table.plural} {_whose(rng)} {column.phrase} is between {low} and {high}"),
        f"SELECT {selected[0].name} FROM {table.name} WHERE {column.name} BETWEEN {low} AND {high}",
    )


def _like(rng: random.Random, table: Table) -> Made:
    columns, selected = _columns(rng, table, kind="text"), _columns(rng, table)
    if not columns or not selected:
        return None
    value = random_text(rng, columns[0].pool).split()[0]
    verb, pattern = rng.choice((("contains", "%{}%"), ("starts with", "{}%"), ("ends with", "%{}")))
    return (
        _ask(rng, f"{selected[0].phrase} of {table.plural} {_whose(rng)} {columns[0].phrase} {verb} '{value}'"),
        f"SELECT {selected[0].name} FROM {table.name} WHERE {columns[0].name} LIKE '{pattern.format(value)}'",
    )


def _not_equal(rng: random.Random, table: Table) -> Made:
    columns, selected = _columns(rng, table, kind="text"), _columns(rng, table)
    if not columns or not selected:
        return None
    value = random_text(rng, columns[0].pool)
    return (
        _ask(rng, f"{selected[0].phrase} of {table.plural} {_whose(rng)} {columns[0].phrase} is not '{value}'"),
        f"SELECT {selected[0].name} FROM {table.name} WHERE {columns[0].name} != '{value}'",
    )


def _aggregate(rng: random.Random, table: Table) -> Made:
    column = _amount(rng, table)
    if not column:
        return None
    function = rng.choice(list(AGGREGATES))
    said = f"{rng.choice(AGGREGATES[function])} {column.phrase} of all {table.plural}"
    return _ask(rng, said), f"SELECT {function}({column.name}) FROM {table.name}"


def _two_aggregates(rng: random.Random, table: Table) -> Made:
    column = _amount(rng, table)
    if not column:
        return None
    one, two = rng.sample(list(AGGREGATES), 2)
    said = f"{AGGREGATES[one][0]} and {AGGREGATES[two][0]} {column.phrase} of all {table.plural}"
    return _ask(rng, said), f"SELECT {one}({column.name}), {two}({column.name}) FROM {table.name}"


def _aggregate_where(rng: random.Random, table: Table) -> Made:
    column = _amount(rng, table)
    condition = _condition(rng, table, avoid=column)
    if not column or not condition:
        return None
    function = rng.choice(list(AGGREGATES))
    said = f"{rng.choice(AGGREGATES[function])} {column.phrase} of {table.plural} {_whose(rng)} {condition.phrase}"
    return _ask(rng, said), f"SELECT {function}({column.name}) FROM {table.name} WHERE {condition.sql}"


def _count_where(rng: random.Random, table: Table) -> Made:
    condition = _condition(rng, table)
    if not condition:
        return None
    return (
        _count(rng, table.plural, f"{_whose(rng)} {condition.phrase}"),
        f"SELECT count(*) FROM {table.name} WHERE {condition.sql}",
    )


def _count_distinct(rng: random.Random, table: Table) -> Made:
    columns = _columns(rng, table)
    if not columns:
        return None
    column = columns[0]
    said = f"how many {rng.choice(('different', 'distinct'))} values of {column.phrase} do the {table.plural} have"
    return said, f"SELECT count(DISTINCT {column.name}) FROM {table.name}"


def _distinct(rng: random.Random, table: Table) -> Made:
    columns = _columns(rng, table)
    if not columns:
        return None
    said = f"{rng.choice(('different', 'distinct', 'unique'))} values of {columns[0].phrase} of the {table.plural}"
    return _ask(rng, said), f"SELECT DISTINCT {columns[0].name} FROM {table.name}"


def _order(rng: random.Random, table: Table) -> Made:
    pair = _columns(rng, table, 2)
    if not pair:
        return None
    direction, said = rng.choice((("ASC", "ascending"), ("DESC", "descending")))
    by = rng.choice((f"in {said} order of {pair[1].phrase}", f"sorted by {pair[1].phrase} in {said} order"))
    return (
        _ask(rng, f"{pair[0].phrase} of all {table.plural} {by}"),
        f"SELECT {pair[0].name} FROM {table.name} ORDER BY {pair[1].name} {direction}",
    )


def _superlative(rng: random.Random, table: Table) -> Made:
    by, selected = _amount(rng, table), _columns(rng, table)
    if not by or not selected:
        return None
    direction, word = rng.choice((("DESC", "highest"), ("DESC", "largest"), ("ASC", "lowest"), ("ASC", "smallest")))
    return (
        _ask(rng, f"{selected[0].phrase} of the {table.phrase} with the {word} {by.phrase}"),
        f"SELECT {selected[0].name} FROM {table.name} ORDER BY {by.name} {direction} LIMIT 1",
    )


def _top(rng: random.Random, table: Table) -> Made:
    by, selected = _amount(rng, table), _columns(rng, table)
    if not by or not selected:
        return None
    count = rng.randint(2, 9)
    direction, word = rng.choice((("DESC", "highest"), ("DESC", "largest"), ("ASC", "lowest"), ("ASC", "smallest")))
    return (
        _ask(rng, f"{selected[0].phrase} of the {count} {table.plural} with the {word} {by.phrase}"),
        f"SELECT {selected[0].name} FROM {table.name} ORDER BY {by.name} {direction} LIMIT {count}",
    )


def _above_average(rng: random.Random, table: Table) -> Made:
    column, selected = _amount(rng, table), _columns(rng, table)
    if not column or not selected:
        return None
    sign, word = rng.choice(((">", "above"), ("<", "below")))
    return (
        _ask(rng, f"{selected[0].phrase} of {table.plural} {_whose(rng)} {column.phrase} is {word} the average"),
        f"SELECT {selected[0].name} FROM {table.name} "
        f"WHERE {column.name} {sign} (SELECT avg({column.name}) FROM {table.name})",
    )


def _group_count(rng: random.Random, table: Table) -> Made:
    columns = _columns(rng, table, kind="text")
    if not columns:
        return None
    name, phrase = columns[0].name, columns[0].phrase
    said = rng.choice(
        (f"the number of {table.plural} for each {phrase}", f"how many {table.plural} there are per {phrase}")
    )
    return f"show the {phrase} and {said}", f"SELECT {name}, count(*) FROM {table.name} GROUP BY {name}"


def _group_aggregate(rng: random.Random, table: Table) -> Made:
    by, column = _columns(rng, table, kind="text"), _amount(rng, table)
    if not by or not column:
        return None
    function = rng.choice(list(AGGREGATES))
    said = f"{rng.choice(AGGREGATES[function])} {column.phrase} of the {table.plural} for each {by[0].phrase}"
    return (
        _ask(rng, f"{by[0].phrase} and the {said}"),
        f"SELECT {by[0].name}, {function}({column.name}) FROM {table.name} GROUP BY {by[0].name}",
    )


def _having(rng: random.Random, table: Table) -> Made:
    by = _columns(rng, table, kind="text")
    if not by:
        return None
    count = rng.randint(1, 9)
    sign, word = rng.choice(((">", "more than"), (">=", "at least"), ("<", "less than")))
    return (
        f"which values of {by[0].phrase} are shared by {word} {count} {table.plural}",
        f"SELECT {by[0].name} FROM {table.name} GROUP BY {by[0].name} HAVING count(*) {sign} {count}",
    )


def _most_common(rng: random.Random, table: Table) -> Made:
    by = _columns(rng, table, kind="text")
    if not by:
        return None
    direction, word = rng.choice((("DESC", "most"), ("ASC", "least")))
    return (
        _ask(rng, f"{word} common {by[0].phrase} of the {table.plural}"),
        f"SELECT {by[0].name} FROM {table.name} GROUP BY {by[0].name} ORDER BY count(*) {direction} LIMIT 1",
    )


def _both(operation: str) -> TableMaker:
    def make(rng: random.Random, table: Table) -> Made:
        selected, column = _columns(rng, table, kind="text"), _amount(rng, table)
        if not selected or not column:
            return None
        low, high = sorted((_number(rng, column), _number(rng, column)))
        name, phrase = selected[0].name, selected[0].phrase
        said = {
            "INTERSECT": f"which values of {phrase} are shared by {table.plural} with {column.phrase} above {high} "
            f"and {table.plural} with {column.phrase} below {low}",
            "EXCEPT": f"which values of {phrase} belong to {table.plural} with {column.phrase} above {high} "
            f"but not to {table.plural} with {column.phrase} below {low}",
        }[operation]
        return said, (
            f"SELECT {name} FROM {table.name} WHERE {column.name} > {high} {operation} "
            f"SELECT {name} FROM {table.name} WHERE {column.name} < {low}"
        )

    return make


# --- two tables -----------------------------------------------------------------------------------------------------


def _join_all(rng: random.Random, child: Table, parent: Table) -> Made:
    mine, its = rng.choice(child.columns), rng.choice(parent.columns)
    return (
        _ask(rng, f"{mine.phrase} of each {child.phrase} and the {its.phrase} of its {parent.phrase}"),
        f"SELECT T1.{mine.name}, T2.{its.name} {_join(child, parent)}",
    )


def _join_where(rng: random.Random, child: Table, parent: Table) -> Made:
    mine, condition = rng.choice(child.columns), _condition(rng, parent, "T2.")
    if not condition:
        return None
    return (
        _ask(rng, f"{mine.phrase} of {child.plural} whose {parent.phrase} has the {_has(condition.phrase)}"),
        f"SELECT T1.{mine.name} {_join(child, parent)} WHERE {condition.sql}",
    )


def _join_up(rng: random.Random, child: Table, parent: Table) -> Made:
    its, condition = rng.choice(parent.columns), _condition(rng, child, "T1.")
    if not condition:
        return None
    return (
        _ask(rng, f"{its.phrase} of {parent.plural} that have a {child.phrase} with the {_has(condition.phrase)}"),
        f"SELECT T2.{its.name} {_join(child, parent)} WHERE {condition.sql}",
    )


def _has(phrase: str) -> str:
    """A condition after "with the": "city is 'Oslo'" becomes "city 'Oslo'"."""
    for verb in (" is equal to ", " equals ", " is "):
        if verb in phrase:
            return phrase.replace(verb, " ", 1)
    return phrase


def _join_count_where(rng: random.Random, child: Table, parent: Table) -> Made:
    condition = _condition(rng, parent, "T2.")
    if not condition:
        return None
    return (
        _count(rng, child.plural, f"whose {parent.phrase} has the {_has(condition.phrase)}"),
        f"SELECT count(*) {_join(child, parent)} WHERE {condition.sql}",
    )


def _join_group_count(rng: random.Random, child: Table, parent: Table) -> Made:
    its = rng.choice(parent.columns)
    return (
        _ask(rng, f"{its.phrase} of each {parent.phrase} and the number of its {child.plural}"),
        f"SELECT T2.{its.name}, count(*) {_join(child, parent)} GROUP BY T2.{parent.key}",
    )


def _join_group_aggregate(rng: random.Random, child: Table, parent: Table) -> Made:
    its, mine = rng.choice(parent.columns), _amount(rng, child)
    if not mine:
        return None
    function = rng.choice(list(AGGREGATES))
    word = rng.choice(AGGREGATES[function])
    return (
        _ask(rng, f"{its.phrase} of each {parent.phrase} and the {word} {mine.phrase} of its {child.plural}"),
        f"SELECT T2.{its.name}, {function}(T1.{mine.name}) {_join(child, parent)} GROUP BY T2.{parent.key}",
    )


def _join_most(rng: random.Random, child: Table, parent: Table) -> Made:
    its = rng.choice(parent.columns)
    direction, word = rng.choice((("DESC", "most"), ("ASC", "fewest")))
    return (
        _ask(rng, f"{its.phrase} of the {parent.phrase} with the {word} {child.plural}"),
        f"SELECT T2.{its.name} {_join(child, parent)} GROUP BY T2.{parent.key} ORDER BY count(*) {direction} LIMIT 1",
    )


def _join_having(rng: random.Random, child: Table, parent: Table) -> Made:
    its, count = rng.choice(parent.columns), rng.randint(1, 9)
    sign, word = rng.choice(((">", "more than"), (">=", "at least")))
    return (
        _ask(rng, f"{its.phrase} of {parent.plural} that have {word} {count} {child.plural}"),
        f"SELECT T2.{its.name} {_join(child, parent)} GROUP BY T2.{parent.key} HAVING count(*) {sign} {count}",
    )


def _join_superlative(rng: random.Random, child: Table, parent: Table) -> Made:
    its, by = rng.choice(parent.columns), _amount(rng, child)
    if not by:
        return None
    direction, word = rng.choice((("DESC", "highest"), ("ASC", "lowest")))
    return (
        _ask(rng, f"{its.phrase} of the {parent.phrase} of the {child.phrase} with the {word} {by.phrase}"),
        f"SELECT T2.{its.name} {_join(child, parent)} ORDER BY T1.{by.name} {direction} LIMIT 1",
    )


def _without(rng: random.Random, child: Table, parent: Table) -> Made:
    its = rng.choice(parent.columns)
    said = rng.choice(("without any", "that have no"))
    return (
        _ask(rng, f"{its.phrase} of {parent.plural} {said} {child.plural}"),
        f"SELECT {its.name} FROM {parent.name} WHERE {parent.key} NOT IN (SELECT {parent.key} FROM {child.name})",
    )


TABLE_MAKERS: dict[str, TableMaker] = {
    "all": _all,
    "count": _count_all,
    "where": _where,
    "where and": _where_two("and"),
    "where or": _where_two("or"),
    "between": _between,
    "like": _like,
    "not equal": _not_equal,
    "aggregate": _aggregate,
    "two aggregates": _two_aggregates,
    "aggregate where": _aggregate_where,
    "count where": _count_where,
    "count distinct": _count_distinct,
    "distinct": _distinct,
    "order": _order,
    "superlative": _superlative,
    "top": _top,
    "above average": _above_average,
    "group count": _group_count,
    "group aggregate": _group_aggregate,
    "having": _having,
    "most common": _most_common,
    "intersect": _both("INTERSECT"),
    "except": _both("EXCEPT"),
}
PAIR_MAKERS: dict[str, PairMaker] = {
    "join": _join_all,
    "join where": _join_where,
    "join up where": _join_up,
    "join count where": _join_count_where,
    "join group count": _join_group_count,
    "join group aggregate": _join_group_aggregate,
    "join most": _join_most,
    "join having": _join_having,
    "join superlative": _join_superlative,
    "without": _without,
}
KINDS = (*TABLE_MAKERS, *PAIR_MAKERS)
WEIGHTS = {"all": 0.6, "count": 0.3, "where": 2.0, "where and": 1.5, "join where": 1.5, "join up where": 1.5}
"""How often a kind is drawn, 1 where nothing is said: those with literals more often, the shortest less."""
