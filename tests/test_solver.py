"""The solver against brute force, its bound, and what it says of budgets that cannot be met."""

import itertools

import numpy as np
import pytest

from fastdit.search import solver
from fastdit.search.solver import ImpossibleBudget, frontier, solve


def brute_force(errors, costs, budget):
    """Try every choice: the least total error, ``None`` where no choice is within the budget."""
    cells, candidates = errors.shape
    choices = np.array(list(itertools.product(range(candidates), repeat=cells)))
    rows = np.arange(cells)
    error, cost = errors[rows, choices].sum(1), costs[rows, choices].sum(1)
    allowed = np.isfinite(error) & (cost <= budget * (1 + solver.ROUNDING))
    return error[allowed].min() if allowed.any() else None


def instance(seed, *, whole):
    """Random errors and costs; whole numbers make ties, and every tenth candidate cannot be used."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 7), rng.integers(1, 6)
    errors, costs = (rng.integers(0, 6, (2, *shape)).astype(float)) if whole else rng.random((2, *shape))
    errors[rng.random(shape) < 0.1] = rng.choice([np.nan, np.inf])
    errors[:, 0], costs[:, 0] = 0, costs.max() + (seed % 3)
    return errors, costs, rng.uniform(0, costs.max()) * shape[0]


def realistic(cells, candidates, seed=0):
    """Errors that grow as densities fall, at a rate of each cell's own."""
    rng = np.random.default_rng(seed)
    density = np.linspace(1, 0.05, candidates)
    errors = rng.gamma(1, 1, (cells, 1)) * (1 - density) ** rng.uniform(1, 4, (cells, 1))
    errors = errors * rng.uniform(0.8, 1.2, (cells, candidates))
    costs = density * rng.uniform(0.8, 1.2, (cells, candidates))
    errors[:, 0], costs[:, 0] = 0, 1
    return errors, costs


def total(table, choice):
    return float(table[np.arange(len(table)), choice].sum())


def lower_bound(errors, costs, budget):
    """The optimum of the linear relaxation: a point of the convex curve through the choices of one multiplier."""
    return float(np.interp(budget, *frontier(errors, costs)))


def largest_step(errors):
    """The most that one cell can lose."""
    usable = np.where(np.isfinite(errors), errors, 0)
    return float((usable.max(1) - usable.min(1)).max())


@pytest.mark.parametrize("whole", [False, True])
def test_at_most_one_step_above_brute_force(whole):
    gaps = []
    for seed in range(200):
        errors, costs, budget = instance(seed, whole=whole)
        expected = brute_force(errors, costs, budget)
        if expected is None:
            with pytest.raises(ImpossibleBudget):
                solve(errors, costs, budget)
            continue
        choice = solve(errors, costs, budget)
        assert total(costs, choice) <= budget * (1 + 2 * solver.ROUNDING)
        bound = lower_bound(errors, costs, budget)
        assert bound - 1e-6 <= expected <= total(errors, choice) + 1e-9, seed
        assert total(errors, choice) <= bound + largest_step(errors) + 1e-9, seed
        gaps.append(total(errors, choice) - expected)
    assert len(gaps) >= 100 and np.mean(np.array(gaps) < 1e-9) > 0.5


def test_max_error_is_the_mirrored_problem():
    for seed in range(40):
        errors, costs, _ = instance(seed, whole=bool(seed % 2))
        limit = np.random.default_rng(seed).uniform(0, 3)
        swapped = np.where(np.isfinite(errors), costs, np.inf)
        expected = brute_force(swapped, np.nan_to_num(errors, nan=0, posinf=0), limit)
        choice = solve(errors, costs, max_error=limit)
        assert total(errors, choice) <= limit * (1 + 2 * solver.ROUNDING)
        assert expected - 1e-9 <= total(costs, choice) <= expected + largest_step(swapped) + 1e-9


def test_large_instances_are_within_their_bound():
    errors, costs = realistic(1080, 12)  # Wan 1.3B: 3 buckets, 30 layers, 12 heads
    choice = solve(errors, costs, 0.25 * 1080)
    assert total(costs, choice) <= 0.25 * 1080 * (1 + 2 * solver.ROUNDING)
    found, bound = total(errors, choice), lower_bound(errors, costs, 0.25 * 1080)
    assert bound <= found <= bound * 1.0001
    assert np.array_equal(choice, solve(errors, costs, 0.25 * 1080))
    uniform = errors[:, np.abs(costs.mean(0) - 0.25).argmin()].sum()
    assert found < 0.8 * uniform


def test_ties_are_settled_always_alike():
    errors, costs = np.array([[0.0, 1, 1]] * 4), np.array([[2.0, 1, 1]] * 4)
    assert solve(errors, costs, 6).tolist() == solve(errors, costs, 6).tolist()
    assert sorted(solve(errors, costs, 6)) == [0, 0, 1, 1]  # of two equal candidates the first


def test_a_budget_that_is_met_exactly():
    errors, costs = np.array([[0.0, 1]] * 10), np.array([[1.0, 0.1]] * 10)
    assert total(errors, solve(errors, costs, 3 * 1 + 7 * 0.1)) == 7
    assert total(errors, solve(errors, costs, np.nextafter(3.7, 0))) == 7
    assert total(errors, solve(errors, costs, 3.69)) == 8
    assert solve(errors, costs, 1e9).tolist() == solve(errors, costs, np.inf).tolist() == [0] * 10
    assert solve(errors, costs, 1).tolist() == [1] * 10


def test_impossible_budgets_say_what_is_possible():
    errors, costs = np.array([[0.0, 1], [0, 2]]), np.array([[1.0, 0.25], [1, 0.5]])
    with pytest.raises(
        ImpossibleBudget, match=r"budget 0.1 is impossible: it must be at least 0.75, and beyond 2 "
    ) as it:
        solve(errors, costs, 0.1)
    assert (it.value.asked, it.value.least, it.value.most) == (0.1, 0.75, 2)
    with pytest.raises(ImpossibleBudget, match="max_error -1 is impossible: it must be at least 0,"):
        solve(errors, costs, max_error=-1)


def test_frontier_is_convex_and_holds_the_choices():
    errors, costs = realistic(30, 6)
    cost, error = frontier(errors, costs)
    assert (np.diff(cost) > 0).all() and (np.diff(error) < 0).all()
    slopes = np.diff(error) / np.diff(cost)
    assert (np.diff(slopes) >= -1e-9).all()
    for at in (0, 7, len(cost) // 2, -1):
        assert total(errors, solve(errors, costs, cost[at])) == pytest.approx(error[at], abs=1e-9)
    assert error[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": [0, 1]}, r"must both be \(cells, candidates\)"),
        ({"costs": np.ones((2, 3))}, r"got \(2, 2\) and \(2, 3\)"),
        ({"errors": np.ones((0, 2)), "costs": np.ones((0, 2))}, "not empty"),
        ({"errors": [[0, 1], [np.nan, np.inf]]}, "cell 1 has no candidate"),
        ({"errors": [[0, -1], [0, 1]]}, "at least 0"),
        ({"costs": [[1, -1], [0, 1]]}, "at least 0"),
        ({"budget": float("nan")}, "budget must be a number"),
        ({"budget": None}, "either a budget or max_error"),
        ({"max_error": 1.0}, "either a budget or max_error"),
    ],
)
def test_senseless_input(change, message):
    arguments = {"errors": np.array([[0.0, 1], [0, 1]]), "costs": np.array([[1.0, 0.5], [1, 0.5]]), "budget": 1.0}
    with pytest.raises(ValueError, match=message):
        solve(**(arguments | change))
