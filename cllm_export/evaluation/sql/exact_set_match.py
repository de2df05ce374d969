"""Spider's exact-set match without values: two queries match if all their components match."""

from __future__ import annotations

from dataclasses import dataclass

from cllm_export.evaluation.sql.schema import Schema
from cllm_export.evaluation.sql.sql_components import UnparsableError, components


@dataclass(frozen=True, kw_only=True)
class SetMatch:
    """How a prediction compares with its gold query."""

    matches: bool | None
    """None if the gold query cannot be parsed, so no judgement is possible."""
    differing: tuple[str, ...] = ()
    """Names of the components that differ, or ``unparsable`` if the prediction is not one query."""


def exact_set_match(schema: Schema, gold: str, predicted: str) -> SetMatch:
    """Compare two queries on one schema, component by component (Yu et al. 2018, arXiv 1809.08887)."""
    try:
        wanted = components(gold, schema)
    except UnparsableError:
        return SetMatch(matches=None)
    try:
        differing = wanted.differing(components(predicted, schema))
    except UnparsableError:
        return SetMatch(matches=False, differing=("unparsable",))
    return SetMatch(matches=not differing, differing=tuple(differing))
