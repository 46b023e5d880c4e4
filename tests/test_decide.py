"""From scores to cells, and from cells to choices, on numbers that can be checked by hand."""

import dataclasses
import itertools

import numpy as np
import pytest

from fastdit import Schedule
from fastdit.attention import get_method
from fastdit.search.allocation import Problem, Target, choose_modes
from fastdit.search.candidates import describe
from fastdit.search.cost import CostModel, Timing
from fastdit.search.sampling import SampledSteps, Sampling
from fastdit.search.scores import CallScores, Change, Scores, Shape
from fastdit.search.solver import ImpossibleBudget
from fastdit.search.statistics import collect, layer_weights
from fastdit.tokens import TokenSpec, VideoGrid

SHAPE = Shape(2, 2, 16, 1, TokenSpec(VideoGrid(3, 8, 8)), "float32", "cpu")
METHODS = [get_method("dense"), *(get_method("draft", density=d) for d in (0.1, 0.4))]
DENSITIES = (1.0, 0.1, 0.4)
MASS = np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], np.float32)  # by frame distance; a layer further on is 1 more


def cost_of(candidates, **changes):
    """A cost model in which time is density, 10 ms of dense for a head, for calls of the tiny pipelines."""

    def timing(method):
        density = 1.0 if method.stock else getattr(method, "density", 0.5)
        kind = f"{method.name} {getattr(method, 'compensate', None)}"
        return Timing(describe(method), kind, density, density, *[0.02 * density] * 3, 0.0)

    timings = tuple(changes.get(method.name) or timing(method) for method in candidates)
    return CostModel("a device", "float32", None, None, 192, 2, 16, 1, 0.02, timings)


def scores(error, *, steps=(0, 1, 2, 3), sampled=(1, 3), titles=("transformer",), branches=("cond",), **others):
    """Scores of one video; ``error(title, step, branch, layer)`` is ``(candidates, heads)``."""
    density = np.repeat(np.array(DENSITIES, np.float32)[:, None], 2, 1)
    calls = [
        CallScores(*place, *[np.array(error(*place), np.float32)] * 2, 1 - density, density, MASS + place[3])
        for place in itertools.product(titles, sampled, branches, range(2))
    ]
    found = Scores(calls, num_steps=4, **others)
    found.shapes = dict.fromkeys(titles, SHAPE)
    found.steps = {title: list(steps) for title in titles}
    return found


def random_error(seed=0):
    rng = np.random.default_rng(seed)
    table = {}

    def error(*place):
        if place not in table:
            far, near = rng.uniform(0.1, 0.5, 2), rng.uniform(0.01, 0.1, 2)
            table[place] = [[0, 0], far, near]
        return table[place]

    return error


WHOLE = Sampling(Schedule(), buckets=2)


@pytest.mark.parametrize(
    ("sampling", "steps", "edges", "sampled"),
    [
        (Sampling(), 10, (0.3, 0.6, 1.0), {1, 4, 8}),
        (Sampling(Schedule(warmup_steps=0.3)), 10, (0.5, 0.7, 1.0), {4, 6, 8}),
        (Sampling(Schedule(warmup_steps=2, tail_steps=3)), 10, (0.3, 0.5, 1.0), {2, 4, 6}),
        (Sampling(Schedule(warmup_steps=0.25), per_bucket=2), 40, (0.5, 0.75, 1.0), {12, 17, 22, 27, 32, 37}),
        (Sampling(buckets=1, per_bucket=3), 4, (1.0,), {0, 2, 3}),
        (Sampling(), 2, (0.5, 1.0), {0, 1}),
        (Sampling(), 1, (1.0,), {0}),
        (Sampling(buckets=(0.1, 0.5, 1)), 10, (0.1, 0.5, 1), {0, 3, 7}),
        (Sampling(Schedule(warmup_steps=2), buckets=(0.1, 0.5, 1.0)), 10, (0.1, 0.5, 1.0), {3, 7}),
        (Sampling(Schedule(dense_layers=(0,)), steps=(1, 0)), 4, (0.25, 0.5, 1.0), {0, 1}),
    ],
)
def test_steps_are_spread_over_what_is_sparse(sampling, steps, edges, sampled):
    assert sampling.edges(steps) == pytest.approx(edges) and sampling.sampled(steps) == sampled


def test_sampled_steps_leave_the_others_alone():
    schedule = SampledSteps(sampling=Sampling(Schedule(dense_layers=(-1,)), steps=(2,)))
    reasons = [[schedule.dense_reason(layer, 3, step, 4) for layer in range(3)] for step in range(4)]
    assert reasons[2] == [None, None, "dense layer"]
    assert [r for step in (0, 1, 3) for r in reasons[step]] == ["not a sampled step"] * 9


@pytest.mark.parametrize("wrong", [{"buckets": 0}, {"buckets": (0.5, 0.4, 1)}, {"per_bucket": 0}])
def test_sampling_that_makes_no_sense(wrong):
    with pytest.raises(ValueError, match="must be"):
        Sampling(**wrong)


def test_cells_are_statistics_over_prompts_and_passes():
    runs = [scores(random_error(seed), branches=("cond", "uncond")) for seed in (0, 1, 2)]
    (cells,) = collect(runs, WHOLE, quantile=0.8)
    np.testing.assert_allclose(cells.mass, np.stack([MASS, MASS + 1]), rtol=1e-6)
    for bucket, step in enumerate((1, 3)):
        for layer in range(2):
            found = np.stack([c.error for run in runs for c in run.calls if (c.step, c.layer) == (step, layer)])
            assert found.shape == (6, 3, 2)
            np.testing.assert_allclose(cells.error[bucket, layer], np.quantile(found, 0.8, axis=0).T, rtol=1e-6)
            np.testing.assert_allclose(cells.error_mean[bucket, layer], found.mean(0).T, rtol=1e-6)
            np.testing.assert_allclose(cells.error_std[bucket, layer], found.std(0).T, rtol=1e-5)
            np.testing.assert_allclose(cells.head_mse[bucket, layer], (found**2).mean(0).T, rtol=1e-5)
    np.testing.assert_allclose(cells.density[..., 1], 0.1, rtol=1e-6)
    np.testing.assert_allclose(cells.recall[..., 1], 0.9, rtol=1e-6)
    assert cells.calls.tolist() == [[2, 2], [2, 2]] and cells.refreshes.tolist() == [2, 2] and cells.dense_calls == 0


def test_a_bucket_without_samples_takes_those_of_the_nearest():
    error = random_error()
    run = scores(error, sampled=(3,))
    (cells,) = collect([run], Sampling(Schedule(warmup_steps=1), buckets=3, steps=(3,)))
    np.testing.assert_array_equal(cells.error[0], cells.error[2])
    assert cells.calls.tolist() == [[1, 1]] * 3 and cells.dense_calls == 2


def test_calls_count_where_the_schedule_lets_them():
    schedule = Schedule(warmup_steps=1, dense_layers=(1,), refresh_steps=2)
    (cells,) = collect([scores(random_error(), steps=(0, 1, 2))], Sampling(schedule, buckets=1, steps=(1, 3)))
    assert cells.calls.tolist() == [[2, 0]] and cells.refreshes.tolist() == [1] and cells.dense_calls == 4


def dense_layer(error):
    """Cells of which the second layer was never scored, because the schedule keeps it dense."""
    run = scores(error)
    run.calls = [call for call in run.calls if call.layer == 0]
    return collect([run], Sampling(Schedule(dense_layers=(1,)), buckets=1, steps=(1, 3)))


def test_what_was_not_scored_can_only_be_dense_and_is_said_to_be():
    (cells,) = dense_layer(random_error())
    model = cost_of(METHODS)
    for values, dense in ((cells.error, 0), (cells.recall, 1), (cells.density, 1), (cells.seconds(model), 0.01)):
        assert values[0, 1, :, 0].tolist() == [dense] * 2 and np.isnan(values[0, 1, :, 1:]).all()
    assert not np.isnan(cells.error[0, 0]).any() and not cells.mass[1].any()
    assert choose_modes(cells.head_mse, cells.density, threshold=1)[0, 1].tolist() == [0, 0]


def draft_taking(seconds):
    """A cost model in which the draft takes so long for two heads, and dense attention 0.02."""
    model = cost_of(METHODS)
    draft = Timing(describe(METHODS[1]), "slow", 0.1, 0.1, *3 * (seconds,), 0.0)
    return CostModel(**{**vars(model), "timings": (model.timings[0], draft, model.timings[2])})


def test_what_is_slow_is_named_though_nothing_is_known_of_dense_layers():
    model = draft_taking(0.031)
    assert Problem(dense_layer(random_error()), {"transformer": model}).slow == ["draft"]


def test_a_transformer_of_dense_steps_only_stays_dense_and_takes_its_time():
    run = scores(random_error(), steps=(1, 2, 3))
    run.steps["transformer_2"] = [0]
    shape = dataclasses.replace(SHAPE, layers=3)
    cells = collect([run], Sampling(Schedule(warmup_steps=1), buckets=2), {"transformer_2": shape})
    assert [each.title for each in cells] == ["transformer", "transformer_2"]
    assert cells[1].dense_calls == 3 and not cells[1].calls.any()
    problem = Problem(cells, dict.fromkeys(("transformer", "transformer_2"), cost_of(METHODS)))
    choices = problem.solve(Target(budget=0.3))
    assert choices["transformer_2"].shape == (2, 3, 2) and not choices["transformer_2"].any()
    expected = problem.expected(choices)
    # three calls that are dense anyhow, and three steps of two layers
    assert expected.speedup == pytest.approx(9 / (3 + 6 * expected.density)) and expected.density <= 0.3


def test_videos_of_different_sizes_cannot_be_averaged():
    other = scores(random_error())
    other.shapes["transformer"] = Shape(2, 2, 16, 1, TokenSpec(VideoGrid(3, 8, 9)), "float32", "cpu")
    with pytest.raises(ValueError, match="different sizes"):
        collect([scores(random_error()), other], WHOLE)


def test_a_candidate_that_gave_no_number_once_is_not_used():
    def error(title, step, branch, layer):
        return [[0, 0], [np.nan if layer else 0.01, 0.01], [0.2, 0.2]]

    (cells,) = collect([scores(error), scores(random_error())], WHOLE)
    assert np.isnan(cells.error[:, 1, 0, 1]).all() and not np.isnan(cells.error[:, 0]).any()
    problem = Problem([cells], {"transformer": cost_of(METHODS)})
    choices = problem.solve(Target(budget=0.5))["transformer"]
    assert (choices[:, 1, 0] != 1).all() and (choices == 1).any()


def test_layers_weigh_as_much_as_they_change():
    changes = [Change("transformer", 1, "cond", layer, 1, 0.1, change) for layer, change in ((0, 0.03), (1, 0.01))]
    weights = layer_weights([scores(random_error(), changes=changes)])
    assert weights["transformer", 0] == pytest.approx(3 * weights["transformer", 1])
    assert np.mean(np.square(list(weights.values()))) == pytest.approx(1)
    assert layer_weights([scores(random_error())]) == {}
    (cells,) = collect([scores(random_error(), changes=changes)], WHOLE)
    assert cells.weights.tolist() == [weights["transformer", 0], weights["transformer", 1]]
    problem = Problem([cells], {"transformer": cost_of(METHODS)})
    expected = problem.expected({"transformer": np.full((2, 2, 2), 1)})
    squares = (np.square(cells.error[..., 1]).sum(2) * np.square(cells.weights)).mean()
    assert expected.error == pytest.approx(np.sqrt(squares))


def brute_force(problem, limit, cost):
    best, rows = None, len(problem.rows)
    for choice in itertools.product(range(3), repeat=rows):
        picked = (np.arange(rows), list(choice))
        if cost[picked].sum() <= limit * (1 + 1e-9) and not np.isnan(problem.usable[picked]).any():
            value = problem.errors[picked].sum()
            best = value if best is None else min(best, value)
    return best


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.7, 1.0])
def test_the_budget_is_met_with_the_least_error(budget):
    run = scores(random_error(3), steps=(0, 1, 2, 3), titles=("transformer", "transformer_2"))
    sampling = Sampling(Schedule(warmup_steps=1), buckets=1)
    cells = collect([run], sampling)
    models = dict.fromkeys(("transformer", "transformer_2"), cost_of(METHODS))
    problem = Problem(cells, models)
    choices = problem.solve(Target(budget=budget))
    expected = problem.expected(choices)
    assert expected.density <= budget * (1 + 1e-9)
    least = brute_force(problem, budget * 3 * len(problem.rows), problem.density)
    assert expected.error == pytest.approx(np.sqrt(least / problem.layers))
    # one dense step of four, and time is density
    assert expected.speedup == pytest.approx(4 / (1 + 3 * expected.density))


def test_speed_counts_the_dense_steps_too():
    (cells,) = collect([scores(random_error())], Sampling(Schedule(warmup_steps=2), buckets=1, steps=(3,)))
    problem = Problem([cells], {"transformer": cost_of(METHODS)})
    choices = problem.solve(Target(speedup=1.5))
    found = problem.expected(choices)
    assert found.speedup >= 1.5 - 1e-9 and found.density == pytest.approx(2 * (2 / 3 - 0.5), abs=0.1)
    with pytest.raises(ImpossibleBudget, match=r"target_speedup 1\.9 is impossible: .* reach 1\.82$"):
        problem.solve(Target(speedup=1.9))
    # half of the time is not attention: a third of attention must go for a sixth of all
    whole = problem.expected(problem.solve(Target(speedup=1.2, end_to_end=True), share=0.5))
    assert 2 / (1 / whole.speedup + 1) >= 1.2 - 1e-9
    with pytest.raises(ValueError, match="share of self-attention"):
        problem.solve(Target(speedup=1.2, end_to_end=True))
    with pytest.raises(ImpossibleBudget, match="target_speedup 2 is impossible"):
        problem.solve(Target(speedup=2, end_to_end=True), share=0.5)


def test_errors_are_limited_in_their_own_unit():
    (cells,) = collect([scores(random_error(5))], WHOLE)
    problem = Problem([cells], {"transformer": cost_of(METHODS)})
    found = problem.expected(problem.solve(Target(max_error=0.1)))
    assert found.error <= 0.1 and found.density < 1
    nothing = problem.expected(problem.solve(Target(max_error=0)))
    assert nothing.error == 0 and nothing.density == 1


def test_what_takes_far_longer_than_dense_is_not_used():
    model = draft_taking(0.031)
    (cells,) = collect([scores(random_error())], WHOLE)
    problem = Problem([cells], {"transformer": model})
    assert set(problem.solve(Target(budget=0.45))["transformer"].flat) <= {0, 2}
    reason = r"at least 0\.4, .* they take far longer than dense here: draft"
    with pytest.raises(ImpossibleBudget, match=reason) as caught:
        problem.solve(Target(budget=0.3))
    assert caught.value.least == pytest.approx(0.4)


def test_what_takes_a_little_longer_than_dense_counts_by_its_density():
    """Times vary between runs: they must not decide what a limit on density gets."""
    model = draft_taking(0.026)
    (cells,) = collect([scores(random_error())], WHOLE)
    problem = Problem([cells], {"transformer": model})
    assert 1 in problem.solve(Target(budget=0.3))["transformer"]
    assert 1 not in problem.solve(Target(None, 1.2, end_to_end=False), share=0.5)["transformer"]


def test_learning_from_a_dense_call_counts_as_density():
    learns = Timing(describe(METHODS[1]), "learns", 0.1, 1.0, 0.02, 0.002, 0.002, 0.0)
    model = cost_of(METHODS)
    model = CostModel(**{**vars(model), "timings": (model.timings[0], learns, model.timings[2])})
    (cells,) = collect([scores(random_error())], WHOLE)
    density = cells.mean_density(model)
    np.testing.assert_allclose(density[..., 1], (1.0 + 0.1) / 2, rtol=1e-6)
    np.testing.assert_allclose(density[..., [0, 2]], cells.density[..., [0, 2]])
    np.testing.assert_allclose(cells.seconds(model)[..., 1], (0.02 + 0.002) / 2 / 2)


def test_the_curve_goes_from_the_least_cost_to_no_error():
    (cells,) = collect([scores(random_error())], WHOLE)
    problem = Problem([cells], {"transformer": cost_of(METHODS)})
    curve = np.array(problem.curve())
    assert curve[0, 0] == pytest.approx(0.1, rel=1e-6) and curve[-1].tolist() == [1, 0]
    assert (np.diff(curve[:, 0]) > 0).all() and (np.diff(curve[:, 1]) < 0).all()
    assert curve[0, 1] == pytest.approx(problem.expected({"transformer": np.full((2, 2, 2), 1)}).error)


@pytest.mark.parametrize("unit", ["density", "seconds"])
def test_what_a_plan_is_expected_to_do_lies_on_the_curve(unit):
    (cells,) = collect([scores(random_error())], Sampling(Schedule(warmup_steps=1), buckets=1))
    problem = Problem([cells], {"transformer": cost_of(METHODS)})
    at, error = problem.curve(unit)[0]
    cheapest = problem.expected({"transformer": np.full((1, 2, 2), 1)})
    assert at == pytest.approx(cheapest.density if unit == "density" else 1 / cheapest.speedup)
    assert error == pytest.approx(cheapest.error) and problem.fixed > 0


def test_a_schedule_that_leaves_nothing_open():
    (cells,) = collect([scores(random_error())], Sampling(Schedule(dense_layers=(0, 1)), buckets=1))
    with pytest.raises(ValueError, match="nothing to decide"):
        Problem([cells], {"transformer": cost_of(METHODS)})


def test_the_rule_of_sparse_vdit():
    density = [1, 0, 0.2, 0.2]
    mse = [
        [0, 1.0, 0.1, 0.3],  # 1, .2, .4 with the penalty
        [0, 0.05, 0.1, 0.3],  # a head without effect is skipped
        [0, 1.0, 0.6, 0.5],  # nothing is good enough
        [0, np.nan, np.nan, 0.3],
        [0, np.nan, np.nan, np.nan],
    ]
    assert choose_modes(mse, np.broadcast_to(density, (5, 4))).tolist() == [2, 1, 0, 3, 0]
    assert choose_modes(mse[0], density, penalty=0, threshold=0.05).tolist() == 0
    assert choose_modes(mse[2], density, threshold=10).tolist() == 3
