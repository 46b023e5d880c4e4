"""A multiple-choice knapsack solver: one candidate for every cell under a budget."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDING = 1e-9
"""Relative tolerance of a limit, for budgets that are met exactly."""

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class ImpossibleBudget(ValueError):
    """A budget that no choice meets, with the range of those that can be met.

    Args:
        what: What is limited: ``"budget"`` or ``"max_error"``.
        asked: The limit asked for.
        least: The smallest one that can be met.
        most: The largest one that makes a difference.
    """

    def __init__(self, what: str, asked: float, least: float, most: float) -> None:
        super().__init__(
            f"{what} {asked:.6g} is impossible: it must be at least {least:.6g}, and beyond {most:.6g} nothing changes"
        )
        self.what, self.asked, self.least, self.most = what, asked, least, most


def solve(
    errors: ArrayLike,
    costs: ArrayLike,
    budget: float | None = None,
    *,
    max_error: float | None = None,
) -> Indices:
    """Choose for every cell the candidate so that the total error is least within a total cost, or the other way round.

    The steps of the cells' convex hulls are taken, the steepest first, while they fit. The choice is at most one step
    of one hull away from the optimum; no choice is below the curve of ``frontier``. Equal input gives an equal choice.

    Args:
        errors: ``(cells, candidates)`` errors of at least 0; a candidate with NaN or infinity is not used in that cell.
        costs: ``(cells, candidates)`` costs of at least 0, in any unit: seconds, densities; likewise.
        budget: Largest total cost, in the unit of ``costs``.
        max_error: Largest total error, instead of ``budget``: the total cost is then least.

    Returns:
        ``(cells,)`` index of the candidate of each cell.

    Raises:
        ImpossibleBudget: No choice meets the limit; the error says which limits can be met.
        ValueError: Shapes or numbers make no sense, or a cell has no candidate that can be used.
    """
    first, second, usable = _check(errors, costs)
    if (budget is None) == (max_error is None):
        raise ValueError("give either a budget or max_error")
    if budget is not None:
        values, weights, limit, what = first, second, float(budget), "budget"
    else:
        assert max_error is not None
        values, weights, limit, what = second, first, float(max_error), "max_error"
    if np.isnan(limit):
        raise ValueError(f"{what} must be a number, got nan")
    hulls = _Hulls.of(values, weights, usable)
    return hulls.descend(hulls.within_reach(limit, what))


def frontier(errors: ArrayLike, costs: ArrayLike) -> tuple[Floats, Floats]:
    """Return the curve of the least total error over total cost, at the choices that one multiplier gives.

    Args:
        errors: ``(cells, candidates)`` errors, as for ``solve``.
        costs: ``(cells, candidates)`` costs, likewise.

    Returns:
        Costs, ascending, and errors, descending: ``(points,)`` each.

    Raises:
        ValueError: Shapes or numbers make no sense.
    """
    values, weights, usable = _check(errors, costs)
    hulls = _Hulls.of(values, weights, usable)
    cells = np.arange(len(values))
    cost = weights[cells, hulls.start].sum() + np.concatenate([[0.0], np.cumsum(hulls.price)])
    error = values[cells, hulls.start].sum() - np.concatenate([[0.0], np.cumsum(hulls.gain)])
    return cost, error.clip(min=0)


@dataclass(frozen=True, eq=False)
class _Hulls:
    """The lower convex hulls of all cells: where they start, and their steps, the steepest first."""

    start: Indices
    cell: Indices
    before: Indices
    after: Indices
    gain: Floats
    price: Floats
    least: float
    most: float

    @classmethod
    def of(cls, values: Floats, weights: Floats, usable: NDArray[np.bool_]) -> _Hulls:
        order = np.lexsort((values, np.where(usable, weights, np.inf)), axis=-1)
        start, steps, most = np.empty(len(values), np.int64), [], 0.0
        for cell, row in enumerate(order):
            hull = _lower_hull(values[cell].tolist(), weights[cell].tolist(), [j for j in row if usable[cell, j]])
            start[cell], most = hull[0], most + weights[cell, hull[-1]]
            steps += [(cell, i, j) for i, j in itertools.pairwise(hull)]
        cell, before, after = np.array(steps, np.int64).reshape(-1, 3).T
        gain = values[cell, before] - values[cell, after]
        price = weights[cell, after] - weights[cell, before]
        # stable, and the steps of one hull get ever flatter, so they stay in their order
        steepest = np.argsort(-(gain / price), kind="stable")
        least = float(weights[np.arange(len(start)), start].sum())
        places = (part[steepest] for part in (cell, before, after))
        return cls(start, *places, gain=gain[steepest], price=price[steepest], least=least, most=float(most))

    def within_reach(self, limit: float, what: str) -> float:
        if not limit * (1 + ROUNDING) >= self.least:
            raise ImpossibleBudget(what, limit, self.least, self.most)
        return min(limit, self.most) * (1 + ROUNDING)

    def descend(self, limit: float) -> Indices:
        """Take the steps that fit, the steepest first."""
        choice, spent = self.start.copy(), self.least
        for cell, before, after, price in zip(self.cell, self.before, self.after, self.price, strict=True):
            if choice[cell] == before and spent + price <= limit:
                choice[cell] = after
                spent += price
        return choice


def _lower_hull(values: list[float], weights: list[float], order: list[int]) -> list[int]:
    """Return the corners of the lower convex hull of the points, given by ascending weight, then value."""
    hull: list[int] = []
    for j in order:
        if hull and values[j] >= values[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            gain, price = values[a] - values[b], weights[b] - weights[a]
            if (values[a] - values[j]) * price < gain * (weights[j] - weights[a]):
                break
            hull.pop()
        hull.append(j)
    return hull


def _check(errors: ArrayLike, costs: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    first, second = np.asarray(errors, np.float64), np.asarray(costs, np.float64)
    if first.ndim != 2 or first.shape != second.shape or 0 in first.shape:
        raise ValueError(
            f"errors and costs must both be (cells, candidates) and not empty, got {first.shape} and {second.shape}"
        )
    usable = np.isfinite(first) & np.isfinite(second)
    if not usable.any(1).all():
        cell = int(np.flatnonzero(~usable.any(1))[0])
        raise ValueError(
            f"cell {cell} has no candidate with a finite error and cost; dense, with error 0, always is one"
        )
    if (first[usable] < 0).any() or (second[usable] < 0).any():
        raise ValueError("errors and costs must be at least 0")
    return first, second, usable
