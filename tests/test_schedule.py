import pytest

from fastdit.schedule import Schedule


def dense_steps(schedule, num_steps):
    return [s for s in range(num_steps) if schedule.dense_reason(3, 10, s, num_steps)]


@pytest.mark.parametrize(
    ("schedule", "steps", "dense"),
    [
        (Schedule(), 5, []),
        (Schedule(warmup_steps=2), 5, [0, 1]),
        (Schedule(warmup_steps=0.25), 10, [0, 1, 2]),
        (Schedule(warmup_steps=0.1), 30, [0, 1, 2]),
        (Schedule(warmup_steps=0.25, tail_steps=0.2), 10, [0, 1, 2, 8, 9]),
        (Schedule(tail_steps=1), 4, [3]),
        (Schedule(warmup_steps=9), 4, [0, 1, 2, 3]),
        (Schedule(warmup_steps=1.0), 3, [0, 1, 2]),
        (Schedule(warmup_steps=0.25), 1, [0]),
    ],
)
def test_dense_steps(schedule, steps, dense):
    assert dense_steps(schedule, steps) == dense


def test_dense_layers_count_from_both_ends():
    schedule = Schedule(dense_layers=(0, -1))
    assert [layer for layer in range(6) if schedule.dense_reason(layer, 6, 0, None)] == [0, 5]


def test_reasons():
    schedule = Schedule(warmup_steps=1, tail_steps=1, dense_layers=(0,))
    reasons = [schedule.dense_reason(layer, 4, step, 3) for layer, step in [(0, 1), (1, 0), (1, 1), (1, 2)]]
    assert reasons == ["dense layer", "warm-up step", None, "tail step"]


def test_refresh():
    every = Schedule(warmup_steps=2, refresh_steps=3)
    assert [s for s in range(2, 12) if every.refreshes(s, 12)] == [2, 5, 8, 11]
    listed = Schedule(warmup_steps=2, refresh_steps=(4, 9))
    assert [s for s in range(2, 12) if listed.refreshes(s, 12)] == [4, 9]
    parts = Schedule(warmup_steps=0.2, refresh_steps=(0.2, 0.6))
    assert [s for s in range(10, 50) if parts.refreshes(s, 50)] == [10, 30]
    with pytest.raises(ValueError, match="refresh_steps depends on the number of denoising steps"):
        parts.refreshes(1, None)


def test_counts_need_no_number_of_steps():
    assert Schedule(warmup_steps=2).dense_reason(0, 1, 1, None) == "warm-up step"


@pytest.mark.parametrize("schedule", [Schedule(warmup_steps=0.25), Schedule(tail_steps=1), Schedule(tail_steps=0.1)])
def test_unknown_number_of_steps_is_an_error(schedule):
    with pytest.raises(ValueError, match="number of denoising steps"):
        schedule.dense_reason(0, 1, 0, None)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"warmup_steps": -1}, ValueError),
        ({"warmup_steps": 1.5}, ValueError),
        ({"warmup_steps": float("nan")}, ValueError),
        ({"warmup_steps": "2"}, TypeError),
        ({"warmup_steps": True}, TypeError),
        ({"tail_steps": -0.1}, ValueError),
        ({"dense_layers": 1}, TypeError),
        ({"dense_layers": ("0",)}, TypeError),
        ({"refresh_steps": 0}, ValueError),
        ({"refresh_steps": (-1,)}, ValueError),
        ({"refresh_steps": (1.5,)}, ValueError),
        ({"refresh_steps": (True,)}, ValueError),
        ({"refresh_steps": 1.5}, TypeError),
    ],
)
def test_bad_values(fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        Schedule(**fields)


def test_lists_from_json_become_tuples():
    assert Schedule(dense_layers=[0], refresh_steps=[1, 2]) == Schedule(dense_layers=(0,), refresh_steps=(1, 2))
