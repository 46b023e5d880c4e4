"""Ranking of settings by similarity to dense attention at about equal cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..inputs.settings import DEFAULT
from .columns import mean_rows
from .result_store import Row

EQUAL = 1.1
"""How many times as much as was asked for, or as the default computed, is still equal."""


@dataclass(frozen=True)
class Contest:
    """The numbers by which settings are compared.

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

    What computed over a tenth more than was asked for, and than the default did, is out of the contest; what says its
    density itself, such as a plan, is in it at each that it does not exceed. Only clips that all have made count.

    Args:
        rows: Rows of one benchmark, each clip by itself.
    """
    contest = CONTESTS.get(rows[0]["benchmark"]) if rows else None
    if contest is None:
        return []
    measured = [row for row in rows if contest.merit in row]
    sentences = []
    for where in dict.fromkeys(row[contest.of] for row in measured):
        mine = [row for row in measured if row[contest.of] == where]
        for asked in dict.fromkeys(row["asked"] for row in mine if row.get("asked") is not None):
            entered, clips = _on_common_clips([row for row in mine if row.get("asked") in (asked, None)])
            entered = [row for row in entered if isinstance(row[contest.merit], (int, float))]
            if len(entered) > 1:
                sentences.append(_sentence(contest, f"{where}, density {asked:g}{clips}", asked, entered))
    return sentences


def _on_common_clips(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """Average rows over the clips that all parts have, and say how many that are where it is not all."""
    made: dict[str, set[Any]] = {}
    for row in rows:
        made.setdefault(row["part"], set()).add(_clip(row))
    common, every = set.intersection(*made.values()), set.union(*made.values())
    where = "" if len(common) == len(every) else f" ({len(common)} of {len(every)} clips)"
    return mean_rows([row for row in rows if _clip(row) in common]), where


def _clip(row: Row) -> Any:
    return row.get("prompt"), row.get("clip_seed")


def _sentence(contest: Contest, where: str, asked: float, rows: Sequence[Row]) -> str:
    ours = next((row for row in rows if row["setting"]["name"] == DEFAULT and row["asked"] is not None), None)
    limit = EQUAL * max(asked, (ours or min(rows, key=lambda row: row[contest.cost]))[contest.cost])
    near = [row for row in rows if row[contest.cost] <= limit]
    ordered = sorted(near, key=lambda row: -contest.better * row[contest.merit])

    def spell(row: Row) -> str:
        return f"{row['part']} ({contest.spell(row[contest.merit])})"

    text = f"{where}: nearest to dense is {spell(ordered[0])}"
    if ours is None or ours is ordered[0]:
        return f"{text}, then {spell(ordered[1])}." if len(ordered) > 1 else f"{text}."
    return f"{text}; {spell(ours)} is number {ordered.index(ours) + 1} of {len(ordered)}."
