"""The result of a scorer: shares by measure, for all examples and for groups of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Judgement = Mapping[str, bool | None]
"""For one example: measure -> whether it holds; None if no judgement is possible."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The number of right examples among those that could be judged."""

    right: int
    judged: int

    @property
    def value(self) -> float | None:
        """The share, 0 to 1; None if nothing was judged."""
        return self.right / self.judged if self.judged else None

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-ready."""
        return {"share": None if self.value is None else round(self.value, 6), "right": self.right, "of": self.judged}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one set of texts."""

    shares: Mapping[str, Share]
    """Measure -> its share. The first is the main measure of the task."""
    groups: Mapping[str, Mapping[str, Share]]
    """Group of examples (a kind, ``with a literal``) -> the shares within this group."""
    judgements: tuple[Judgement, ...]
    """One for each example, in order."""
    notes: tuple[str, ...] = ()
    """Facts that a reader needs to interpret the figures."""

    def value(self, measure: str) -> float | None:
        """The share of a measure, 0 to 1; None if the data allows no judgement."""
        return self.shares[measure].value if measure in self.shares else None

    def to_dict(self) -> dict[str, object]:
        """Shares and notes, JSON-ready."""
        return {
            "all": {name: share.to_dict() for name, share in self.shares.items()},
            "groups": {
                group: {name: share.to_dict() for name, share in shares.items()}
                for group, shares in self.groups.items()
            },
            "notes": list(self.notes),
        }


def summarize_judgements(
    judgements: Sequence[Judgement], groups: Sequence[Iterable[str]] = (), notes: Sequence[str] = ()
) -> Scores:
    """Shares of every measure, overall and for each group. ``groups`` holds the group names of each example."""
    members: dict[str, list[Judgement]] = {}
    for judgement, names in zip(judgements, groups or [()] * len(judgements), strict=True):
        for name in names:
            members.setdefault(name, []).append(judgement)
    return Scores(
        shares=_shares(judgements),
        groups={name: _shares(members[name]) for name in sorted(members, key=_place)},
        judgements=tuple(judgements),
        notes=tuple(notes),
    )


def _place(group: str) -> tuple[bool, str]:
    """Sort key that puts kinds last, because there may be many."""
    return group.startswith("kind "), group


def _shares(judgements: Sequence[Judgement]) -> dict[str, Share]:
    measures = dict.fromkeys(measure for judgement in judgements for measure in judgement)
    return {measure: _share([judgement.get(measure) for judgement in judgements]) for measure in measures}


def _share(values: Sequence[bool | None]) -> Share:
    judged = [value for value in values if value is not None]
    return Share(right=sum(judged), judged=len(judged))
