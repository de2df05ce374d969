"""Schemas of the synthetic text-to-SQL task: tables, typed columns, and the values that stand in them.

A schema is one to three tables; of two, the second may refer to the first. Which schemas are held out is a function of
their names alone (table and column set), so that no question of the held-out set is over a table seen in training.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "number", "date"]

HELD_OUT_SHARE = 0.04


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column and what its values look like: a word pool for text, a range for numbers and years."""

    name: str
    type: Kind
    pool: str = ""
    low: int = 0
    high: int = 0

    @property
    def phrase(self) -> str:
        """How a question says it."""
        return self.name.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: its key, its columns without keys, and the table it refers to, if any."""

    name: str
    columns: tuple[Column, ...]
    parent: str | None = None

    @property
    def key(self) -> str:
        return f"{self.name}_id"

    @property
    def phrase(self) -> str:
        return self.name.replace("_", " ")

    @property
    def plural(self) -> str:
        return plural_of(self.phrase)

    @property
    def column_names(self) -> list[str]:
        """In the order of the table: key, columns, foreign key."""
        foreign = [f"{self.parent}_id"] if self.parent else []
        return [self.key, *(column.name for column in self.columns), *foreign]

    @property
    def held_out(self) -> bool:
        """Whether this table, by its name and its set of columns, belongs to the held-out set."""
        text = f"{self.name}:{','.join(sorted(column.name for column in self.columns))}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32

    def to_dict(self) -> dict[str, object]:
        """As a line of the prompt file describes it."""
        foreign = ["number"] if self.parent else []
        return {
            "name": self.name,
            "cols": self.column_names,
            "types": ["number", *(column.type for column in self.columns), *foreign],
            "pk": self.key,
            "fk": self.parent,
        }


def plural_of(phrase: str) -> str:
    """The plural of a table's phrase."""
    if phrase.endswith("y") and phrase[-2] not in "aeiou":
        return phrase[:-1] + "ies"
    return phrase + ("es" if phrase.endswith(("s", "x", "ch", "sh")) else "s")


def random_schema(rng: random.Random, *, held_out: bool) -> list[Table]:
    """One to three tables with distinct names, all of them held out or none; most refer to the one before."""
    count = rng.choices((1, 2, 3), (0.35, 0.55, 0.1))[0]
    names = rng.sample(TABLES, count)
    tables: list[Table] = []
    for index, name in enumerate(names):
        parent = names[index - 1] if index and (count == 2 or rng.random() < 0.6) else None
        table = _random_table(rng, name, parent)
        while table.held_out != held_out:
            table = _random_table(rng, name, parent)
        tables.append(table)
    return tables


def _random_table(rng: random.Random, name: str, parent: str | None) -> Table:
    return Table(name=name, columns=tuple(rng.sample(COLUMNS, rng.randint(2, 5))), parent=parent)


def random_text(rng: random.Random, pool: str) -> str:
    """A value of a text column: two in five are invented words, which can only be copied, never remembered."""
    if rng.random() < 0.4:
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()
        return word if rng.random() < 0.8 else f"{word} {rng.choice(POOLS[pool])}"
    return rng.choice(POOLS[pool])


SYLLABLES = (
    "ba be bi bo bra dan del dor el fa fen gal gri ha hol in ja jor ka kel la len lo lu ma mar mi mon na "
    "nel no or pa per qui ra ren ri ros sa sel sha so ta tan te tor ul va vel vi wen xa yo za zor"
).split()

POOLS: dict[str, list[str]] = {
    "person": (
        "Victor Alice Maria John Emma Oscar Helen Peter Laura Simon Nina Paul Clara Hugo Irene Tom Sofia Karl "
        "Diana Leon Ruth Adam Julia Mark Eva Felix Ana George Lucy Martin Rosa Henry"
    ).split(),
    "city": (
        "Oslo Paris Lima Cairo Tokyo Berlin Madrid Boston Dublin Vienna Prague Seoul Delhi Austin Denver "
        "Miami Geneva Lisbon Warsaw Athens Quito Havana Lagos Milan"
    ).split()
    + ["New York", "San Jose", "Cape Town", "Hong Kong"],
    "country": (
        "France Japan Norway Brazil Canada India Kenya Spain Peru China Egypt Italy Chile Ghana Nepal Greece "
        "Poland Mexico Iceland Germany Sweden Turkey Austria"
    ).split()
    + ["United States", "South Korea", "New Zealand"],
    "colour": "red blue green black white yellow purple orange silver gold brown grey".split(),
    "status": "active closed pending open cancelled approved rejected delayed finished planned".split(),
    "level": "junior senior expert basic advanced beginner premium standard".split(),
    "topic": (
        "history music science sports art travel cooking fashion health finance politics nature comedy drama "
        "jazz rock pop fantasy mystery romance"
    ).split(),
    "company": "Apex Orion Nova Vertex Atlas Zenith Pioneer Summit Delta Fusion Quantum Horizon Lumen Titan".split(),
    "language": "English French Spanish German Arabic Hindi Swahili Korean Dutch Greek Polish Latin".split(),
    "material": "steel wood glass paper cotton leather plastic stone copper silk".split(),
    "weekday": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
}


def _columns() -> list[Column]:
    text = {
        "person": "name first_name last_name nickname contact_name owner_name manager author director captain",
        "city": "city home_town birth_place location destination capital headquarters",
        "country": "country nationality origin region",
        "colour": "color eye_color",
        "status": "status order_status result",
        "level": "level rank membership_type grade",
        "topic": "category genre theme subject department title type",
        "company": "company brand publisher sponsor manufacturer",
        "language": "language",
        "material": "material surface",
        "weekday": "weekday",
    }
    number = {
        (1, 99): "age rating score quantity stock rank_points goals wins floors seats doors",
        (1, 999): "price cost area page_count weight height number_of_seats max_speed duration fee discount",
        (100, 99_999): "salary population budget revenue total_sales capacity credit_limit distance attendance income",
        (100, 9_999): "length elevation calories enrollment market_value depth horsepower",
    }
    date = "year founded_year birth_year start_year release_year opening_year"
    columns = [Column(name=n, type="text", pool=pool) for pool, names in text.items() for n in names.split()]
    for (low, high), names in number.items():
        columns += [Column(name=name, type="number", low=low, high=high) for name in names.split()]
    return columns + [Column(name=name, type="date", low=1950, high=2025) for name in date.split()]


COLUMNS = _columns()

TABLES = (
    "singer concert stadium student teacher course school airport flight airline city country mountain "
    "river lake museum artist painting gallery book author library publisher reader movie director actor "
    "theater festival band album song employee department company office manager customer purchase "
    "product supplier store invoice shipment warehouse hospital doctor patient nurse clinic medicine "
    "treatment hotel room guest booking restaurant chef dish recipe ingredient farm farmer animal crop "
    "vehicle driver race team player match coach league game club member sponsor event venue ticket "
    "building apartment tenant owner bridge station train ship captain port island journal editor article "
    "news_report channel program device engine phone camera laptop project task engineer scientist "
    "experiment planet mission rocket bank account loan branch lawyer court judge mayor election "
    "candidate party vote church village district park tree garden dog cat horse breed wine grape "
    "vineyard stamp coin auction bidder"
).split()
