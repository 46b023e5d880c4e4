"""Who comes nearest to dense attention, of those that compute about as much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .rows import Row

DEFAULT = "default"
"""Name of the setting that users get."""

EQUAL = 1.1
"""How many times as much as was asked for, or as the default computed, is still equal."""


@dataclass(frozen=True)
class Contest:
    """Say by what settings are compared.

    Args:
        of: Name of the number that says where they ran.
        cost: Name of the number that says how much they computed.
        merit: Name of the number that says how near to dense they are.
        better: 1 if larger is nearer, -1 if smaller is.
        spell: Writes that number with its unit.
    """

    of: str
    cost: str
    merit: str
    better: int
    spell: Callable[[float], str]


CONTESTS = {
    "methods": Contest("source", "density", "error", -1, lambda value: f"relative L2 {value:.3f}"),
    # dense calls of some schedules count as sparse ones, so that what was computed in all steps is comparable
    "quality": Contest("model", "overall_density", "psnr", 1, lambda value: f"{value:.1f} dB"),
}


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Order rows by density and by nearness to dense, if their benchmark measures it.

    Args:
        rows: Rows of one benchmark, averaged over clips.
    """
    contest = CONTESTS.get(rows[0]["benchmark"]) if rows else None
    if contest is None:
        return list(rows)
    return sorted(rows, key=lambda row: (row.get("asked") or 0.0, -contest.better * float(row[contest.merit])))


def winners(rows: Sequence[Row]) -> list[str]:
    """Say for each density who is nearest to dense, and where the default is if that is another: a sentence each.

    What computed over a tenth more than was asked for, and than the default did, is out of the contest.

    Args:
        rows: Rows of one benchmark, averaged over clips.
    """
    contest = CONTESTS.get(rows[0]["benchmark"]) if rows else None
    if contest is None:
        return []
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.get("asked") is not None and isinstance(row.get(contest.merit), (int, float)):
            groups.setdefault((row[contest.of], row["asked"]), []).append(row)
    return [_sentence(contest, where, asked, group) for (where, asked), group in groups.items() if len(group) > 1]


def _sentence(contest: Contest, where: str, asked: float, rows: Sequence[Row]) -> str:
    ours = next((row for row in rows if _name(row) == DEFAULT), None)
    limit = EQUAL * max(asked, (ours or min(rows, key=lambda row: row[contest.cost]))[contest.cost])
    ordered = ranked([row for row in rows if row[contest.cost] <= limit])

    def spell(row: Row) -> str:
        return f"{_name(row)} ({contest.spell(row[contest.merit])})"

    text = f"{where}, density {asked:g}: nearest to dense is {spell(ordered[0])}"
    if ours is None or ours is ordered[0]:
        return f"{text}, then {spell(ordered[1])}." if len(ordered) > 1 else f"{text}."
    return f"{text}; {spell(ours)} is number {ordered.index(ours) + 1} of {len(ordered)}."


def _name(row: Row) -> Any:
    return row["setting"]["name"]
