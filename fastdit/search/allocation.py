"""The choice of a candidate for every cell, from scores and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cost import TOO_SLOW, CostModel
from .solver import ImpossibleBudget, frontier, solve
from .statistics import Cells

POINTS = 64
"""Points kept of the curve of error over cost."""

_ROUNDING = 1e-12

Choices = dict[str, NDArray[np.int64]]
Floats = NDArray[np.float64]

PENALTY = 0.5
"""Weight of the work left to do, in the paper's notation lambda."""

THRESHOLD = 0.5
"""Loss above which a sparse mode is not taken, epsilon: what dense attention itself loses by its work."""


@dataclass(frozen=True)
class Target:
    """The limit of a plan: one of density, speed-up and error.

    Args:
        budget: Mean density of the calls that the search decides about, in (0, 1].
        speedup: Time of dense over that of the plan, all steps of a run counted, above 0.
        max_error: Largest error: root mean square, over layers and steps, of the relative error of a layer's output,
            at least 0.
        end_to_end: Whether ``speedup`` is that of the whole denoising instead of that of its self-attention.

    Raises:
        ValueError: None or several are given, or one is out of range.
    """

    budget: float | None = None
    speedup: float | None = None
    max_error: float | None = None
    end_to_end: bool = False

    def __post_init__(self) -> None:
        given = [value for value in (self.budget, self.speedup, self.max_error) if value is not None]
        if len(given) != 1:
            raise ValueError("give one of budget (a density), target_speedup and max_error")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(
                f"budget is a density in (0, 1], got {self.budget!r}; write 0.25 to keep 25 % of the pairs"
            )
        if self.speedup is not None and not 0 < self.speedup < math.inf:
            raise ValueError(
                f"target_speedup must be above 0 and finite, got {self.speedup!r}; write 2 for twice as fast"
            )
        if self.max_error is not None and not 0 <= self.max_error < math.inf:
            raise ValueError(
                f"max_error must be at least 0 and finite, got {self.max_error!r}; write 0.1 for 10 % of the output"
            )
        if self.end_to_end and self.speedup is None:
            raise ValueError("end_to_end says what target_speedup counts: give both")


@dataclass(frozen=True)
class Expected:
    """The expected density, speed-up and error of a choice.

    Args:
        density: Mean density of the calls that the search decides about, in [0, 1].
        speedup: Self-attention time of a dense run over that of the plan, at least 0.
        error: Root mean square of the relative error of a layer's output, at least 0.
    """

    density: float
    speedup: float
    error: float


class Problem:
    """The cells that the search decides about as rows of costs and errors of the candidates.

    A layer's error is the sum of its heads' squared errors, as if they erred apart; an error counts once for each step.
    A candidate that takes far longer than dense (``cost.TOO_SLOW``) is not used.

    Args:
        cells: The cells of each transformer.
        models: The cost model for the calls of each transformer, by its name.
    """

    def __init__(self, cells: Sequence[Cells], models: Mapping[str, CostModel]) -> None:
        self.cells = cells
        self.rows = [
            (index, bucket, layer, head)
            for index, each in enumerate(cells)
            for bucket, layer in zip(*map(np.ndarray.tolist, np.nonzero(each.calls)), strict=True)
            for head in range(each.shape.heads)
        ]
        if not self.rows:
            raise ValueError("the schedule keeps every layer dense, so there is nothing to decide")
        seconds = [each.seconds(models[each.title]) for each in cells]
        density = [each.mean_density(models[each.title]) for each in cells]
        errors = [np.square(each.error * each.weights[:, None, None]) for each in cells]
        names = [timing.candidate["method"] for timing in models[cells[0].title].timings]
        quick = [np.less_equal(s, TOO_SLOW * s[..., :1]) for s in seconds]
        self.slow = [name for i, name in enumerate(names) if not any(each[..., i].any() for each in quick)]
        self.calls = np.array([cells[i].calls[b, layer] for i, b, layer, _ in self.rows], np.float64)
        self.errors, self.seconds, self.density = (self._take(x) for x in (errors, seconds, density))
        self.usable = np.where(self.seconds <= TOO_SLOW * self.seconds[:, :1], self.errors, np.nan)
        self.layers = sum(int(each.calls.sum()) for each in cells)
        dense = {each.title: each.shape.heads * models[each.title].seconds(0, 1.0) for each in cells}
        self.fixed = float(sum(dense[each.title] * each.dense_calls for each in cells))
        self.dense = float(self.seconds[:, 0].sum()) + self.fixed

    def _take(self, arrays: Sequence[Floats]) -> Floats:
        return np.stack([arrays[i][b, layer, head] for i, b, layer, head in self.rows]) * self.calls[:, None]

    def solve(self, target: Target, *, share: float | None = None) -> Choices:
        """Choose a candidate for every cell.

        Args:
            target: How much the choice may cost or err.
            share: Of the time of a dense forward pass that is self-attention, in (0, 1]; ``None`` if unknown.

        Returns:
            For each transformer ``(buckets, layers, heads)`` indices of candidates.

        Raises:
            ImpossibleBudget: No choice meets the target; the error says which targets can be met.
            ValueError: ``share`` is needed and unknown.
        """
        if target.max_error is not None:
            limit = target.max_error**2 * self.layers
            return self._solve(
                self.seconds, "max_error", target.max_error, lambda x: (x / self.layers) ** 0.5, max_error=limit
            )
        if target.budget is not None:
            total = float(self.density[:, 0].sum())
            return self._solve(self.density, "budget", target.budget, lambda x: x / total, budget=target.budget * total)
        assert target.speedup is not None
        others = self.fixed
        if target.end_to_end:
            if share is None:
                raise ValueError(
                    "the share of self-attention in the time of a step is unknown, because every step was sampled; "
                    "sample fewer, or give a speed-up of self-attention"
                )
            others += self.dense * (1 / share - 1)
        dense = self.dense - self.fixed + others
        return self._solve(
            self.seconds,
            "target_speedup",
            target.speedup,
            lambda x: dense / (x + others),
            budget=dense / target.speedup - others,
        )

    def _solve(self, costs: Floats, what: str, asked: float, back: Callable[[float], float], **limit: float) -> Choices:
        try:
            return self._place(solve(self.usable, costs, **limit))
        except ImpossibleBudget as error:
            low, high = sorted(back(x) for x in (error.least, error.most))
            impossible = ImpossibleBudget(what, asked, low, high)
            text = str(impossible)
            if what == "target_speedup":
                text = f"target_speedup {asked:g} is impossible: these candidates and this schedule reach {high:.3g}"
            if self.slow:
                names = ", ".join(dict.fromkeys(self.slow))
                text += f"; not used, because they take far longer than dense here: {names}"
            impossible.args = (text,)
            raise impossible from error

    def _place(self, found: NDArray[np.int64]) -> Choices:
        choices = {each.title: np.full(each.error.shape[:3], -1, np.int64) for each in self.cells}
        for (index, bucket, layer, head), candidate in zip(self.rows, found, strict=True):
            choices[self.cells[index].title][bucket, layer, head] = candidate
        for array in choices.values():
            _fill(array)
        return choices

    def expected(self, choices: Choices) -> Expected:
        """Return what a choice is expected to do.

        Args:
            choices: For each transformer ``(buckets, layers, heads)`` indices of candidates.
        """
        picked = [choices[self.cells[i].title][b, layer, head] for i, b, layer, head in self.rows]
        error, seconds, density = (
            float(np.take_along_axis(x, np.array(picked)[:, None], 1).sum())
            for x in (self.errors, self.seconds, self.density)
        )
        return Expected(
            density=min(density / float(self.density[:, 0].sum()), 1.0),
            speedup=self.dense / (seconds + self.fixed),
            error=float(np.sqrt(error / self.layers)),
        )

    def curve(self, unit: str = "density") -> tuple[tuple[float, float], ...]:
        """Return what other budgets would have given: pairs of cost relative to dense, and error, by ascending cost.

        Args:
            unit: ``"density"``, that of the calls that the search decides about, or ``"seconds"``, those of all calls.
        """
        costs, fixed = (self.density, 0.0) if unit == "density" else (self.seconds, self.fixed)
        cost, error = frontier(self.usable, costs)
        error = np.where(error > _ROUNDING * error.max(initial=0), error, 0)
        spots = np.unique(np.linspace(0, len(cost) - 1, POINTS).round().astype(int))
        dense = float(costs[:, 0].sum()) + fixed
        return tuple((float((cost[i] + fixed) / dense), float(np.sqrt(error[i] / self.layers))) for i in spots)


def _fill(choices: NDArray[np.int64]) -> None:
    """Give the layers of buckets that nothing was decided about what the nearest bucket has, dense if there is none."""
    known = choices[:, :, 0] >= 0
    for bucket, layer in np.argwhere(~known):
        decided = np.flatnonzero(known[:, layer])
        nearest = decided[np.abs(decided - bucket).argmin()] if len(decided) else None
        choices[bucket, layer] = 0 if nearest is None else choices[nearest, layer]


def choose_modes(
    mse: ArrayLike, density: ArrayLike, *, penalty: float = PENALTY, threshold: float = THRESHOLD
) -> NDArray[np.int64]:
    """Choose for every head the sparse mode with the least loss, or dense where every loss is above a threshold.

    The loss is the squared error of the head's output plus ``penalty * density``. The paper takes the plain mean
    squared error, with a penalty of 0.5 and a threshold of 1 for one model; here it is relative to the mean square of
    the head's dense output, as the scale of activations differs between models, layers and heads. Then a head that is
    left out always loses 1, and a threshold of 1 would keep no head dense.

    Args:
        mse: ``(..., modes)`` relative squared errors, at least 0; the first mode is dense; NaN: cannot be used.
        density: ``(..., modes)`` fraction of pairs that a mode computes, in [0, 1].
        penalty: Weight of the work, at least 0.
        threshold: Largest loss of a sparse mode, at least 0.

    Returns:
        ``(...)`` index of the mode.

    Source: Sparse-vDiT (arXiv 2506.03065), offline search.
    """
    loss = np.asarray(mse, np.float64) + penalty * np.asarray(density, np.float64)
    loss = np.where(np.isfinite(loss), loss, np.inf)[..., 1:]
    return np.where(loss.min(-1) <= threshold, loss.argmin(-1) + 1, 0)
