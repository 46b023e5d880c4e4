"""Choose a candidate for every cell under a budget: a multiple-choice knapsack over convex hulls."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDING = 1e-9
"""A sum may pass its limit by this share of it, so that a budget that is met exactly is met in floating point too."""

MAX_STATES = 1 << 22
"""Partial solutions that the exact part keeps in all, at about ten bytes each."""

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class ImpossibleBudget(ValueError):
    """Say that no choice meets a budget, and which ones can be met.

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
    groups: ArrayLike | None = None,
    max_kinds: int | None = None,
) -> Indices:
    """Choose for every cell the candidate so that the total error is least within a total cost, or the other way round.

    A Lagrange multiplier on the convex hull of each cell gives a choice that is at most one step of one hull away
    from the optimum. An exact search over what the multiplier leaves undecided then closes the gap; it is cut short
    only where it would keep more than ``MAX_STATES`` partial solutions. How far off a choice can then be is told by the
    curve of ``frontier``, which no choice is below. The same input always gives the same choice.

    Args:
        errors: ``(cells, candidates)`` errors of at least 0; a candidate with NaN or infinity is not used in that cell.
        costs: ``(cells, candidates)`` costs of at least 0, in any unit: seconds, densities; likewise.
        budget: Largest total cost, in the unit of ``costs``.
        max_error: Largest total error, instead of ``budget``: the total cost is then least.
        groups: ``(cells,)`` labels: cells of one label are the heads of one layer and step bucket.
        max_kinds: How many candidates the cells of a group may use, at least 1; needs ``groups``. Which ones is a
            heuristic.

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
    if (groups is None) != (max_kinds is None):
        raise ValueError("groups and max_kinds belong together: give both or neither")
    if groups is not None and max_kinds is not None:
        if max_kinds < 1:
            raise ValueError(f"max_kinds must be at least 1, got {max_kinds}")
        usable = _limit_kinds(values, weights, usable, limit, _labels(len(usable), groups), max_kinds)
        if not usable.any(1).all():
            raise ValueError(f"max_kinds={max_kinds} leaves cells without a candidate; allow more, or dense everywhere")
    hulls = _Hulls.of(values, weights, usable)
    limit = hulls.within_reach(limit, what)
    choice, multiplier = hulls.descend(limit)
    return _refine(values, weights, usable, limit, choice, multiplier)


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
    """Hold the lower convex hulls of all cells: where they start, and their steps, the steepest first."""

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

    def descend(self, limit: float) -> tuple[Indices, float]:
        """Take the steepest steps while they fit, and return the choice and the slope of the first that does not."""
        choice, spent, multiplier = self.start.copy(), self.least, 0.0
        for cell, before, after, gain, price in zip(
            self.cell.tolist(),
            self.before.tolist(),
            self.after.tolist(),
            self.gain.tolist(),
            self.price.tolist(),
            strict=True,
        ):
            if choice[cell] == before and spent + price <= limit:
                choice[cell] = after
                spent += price
            else:
                multiplier = multiplier or gain / price
        return choice, multiplier


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


def _refine(
    values: Floats, weights: Floats, usable: NDArray[np.bool_], limit: float, choice: Indices, multiplier: float
) -> Indices:
    """Search for a choice better than the given one among those that the multiplier does not rule out.

    A candidate's reduced value is what choosing it adds to the lower bound. Those whose sum reaches the gap between
    the bound and the best choice known cannot be part of a better one (Pisinger, EJOR 83, 1995), which leaves few cells
    open; of these, one after the other, all partial choices are kept that no other is better than in both sums.
    """
    cells = np.arange(len(values))
    best = float(values[cells, choice].sum())
    penalised = _penalised(values, weights, usable, multiplier)
    bound = float(penalised.min(1).sum() - multiplier * limit)
    gap = best - bound
    if multiplier == 0 or gap <= 1e-12 * max(abs(best), abs(bound)):
        return choice
    reduced = penalised - penalised.min(1, keepdims=True)
    alive = reduced < gap
    settled = alive.sum(1) == 1
    sure = alive.argmax(1)
    open_cells = np.flatnonzero(~settled)
    # the most undecided first: the others then have little left to decide
    open_cells = open_cells[np.argsort(np.partition(reduced[open_cells], 1)[:, 1], kind="stable")]
    least = np.where(alive, weights, np.inf).min(1)
    rest = np.append(np.cumsum(least[open_cells][::-1])[::-1], 0.0)[1:]
    weight = np.array([weights[cells, sure][settled].sum()])
    value = np.array([values[cells, sure][settled].sum()])
    excess = np.array([reduced[cells, sure][settled].sum()])
    width = max(256, MAX_STATES // max(1, len(open_cells)))
    trail: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    for cell, still in zip(open_cells, rest, strict=True):
        options = np.flatnonzero(alive[cell])
        sums = [(x[:, None] + y[cell, options]).ravel() for x, y in ((weight, weights), (value, values))]
        excess = (excess[:, None] + reduced[cell, options]).ravel()
        kept = np.flatnonzero((excess < gap) & (sums[0] + still <= limit))
        kept = kept[np.lexsort((sums[1][kept], sums[0][kept]))]
        lowest = np.minimum.accumulate(np.append(np.inf, sums[1][kept]))
        kept = kept[sums[1][kept] < lowest[:-1]]
        if len(kept) > width:
            kept = kept[np.sort(np.argsort(excess[kept], kind="stable")[:width])]
        if len(kept) == 0:
            return choice
        trail.append(((kept // len(options)).astype(np.int32), options[kept % len(options)].astype(np.int16)))
        weight, value, excess = sums[0][kept], sums[1][kept], excess[kept]
    if value[-1] >= best:
        return choice
    better, state = sure.copy(), len(value) - 1
    for cell, (parent, option) in zip(open_cells[::-1], reversed(trail), strict=True):
        better[cell], state = option[state], parent[state]
    return better


def _limit_kinds(
    values: Floats,
    weights: Floats,
    usable: NDArray[np.bool_],
    limit: float,
    groups: Indices,
    max_kinds: int,
) -> NDArray[np.bool_]:
    """Leave each group the candidates that serve it best, at the smallest multiplier that keeps within the limit."""
    cells = np.arange(len(values))
    spread = [np.ptp(x[usable]) or 1.0 for x in (values, weights)]

    def at(multiplier: float) -> tuple[NDArray[np.bool_], float]:
        cost = _penalised(values, weights, usable, multiplier)
        allowed = usable & _best_kinds(cost, groups, max_kinds)
        choice = np.where(allowed, cost, np.inf).argmin(1)
        return allowed, float(weights[cells, choice].sum())

    low, high = -9.0, 9.0  # powers of ten of the multiplier, times the ratio of the spreads
    allowed, _ = at(10.0**high * spread[0] / spread[1])
    free, weight = at(0.0)
    if weight <= limit * (1 + ROUNDING):
        return free
    for _ in range(40):
        middle = (low + high) / 2
        tried, weight = at(10.0**middle * spread[0] / spread[1])
        if weight <= limit * (1 + ROUNDING):
            allowed, high = tried, middle
        else:
            low = middle
    return allowed


def _best_kinds(cost: Floats, groups: Indices, max_kinds: int) -> NDArray[np.bool_]:
    """Pick candidates for each group one by one, each time the one that lowers the sum of its cells most."""
    # a cell without any candidate weighs more than all that could be saved elsewhere
    missing = 1 + 2 * np.abs(cost[np.isfinite(cost)]).sum()
    by_kind = np.where(np.isfinite(cost), cost, missing)
    allowed = np.zeros(cost.shape, bool)
    for group in range(int(groups.max()) + 1):
        members = np.flatnonzero(groups == group)
        served = np.full(len(members), missing)
        for _ in range(max_kinds):
            sums = np.minimum(served[:, None], by_kind[members]).sum(0)
            kind = int(sums.argmin())
            if sums[kind] >= served.sum():
                break
            served = np.minimum(served, by_kind[members, kind])
            allowed[members, kind] = True
    return allowed


def _penalised(values: Floats, weights: Floats, usable: NDArray[np.bool_], multiplier: float) -> Floats:
    return np.where(usable, values + multiplier * np.where(usable, weights, 0), np.inf)


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


def _labels(cells: int, groups: ArrayLike) -> Indices:
    named = np.asarray(groups)
    if named.shape != (cells,):
        raise ValueError(f"groups must be ({cells},), got {named.shape}")
    return np.unique(named, return_inverse=True)[1]
