"""The cost model: what it predicts from times that are known, and what it measures."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_views import SMALL, some_plan

from fastdit.attention import MethodState, get_method
from fastdit.plans import plan
from fastdit.search import cost
from fastdit.search.candidates import describe
from fastdit.search.cost import CostModel, Timing, measure_cost, structured_qkv
from fastdit.search.scores import Shape
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

SHAPE = Shape(3, 2, 16, 1, TokenSpec(VideoGrid(3, 9, 11), 7, True), "float32", "cpu")
TILE = (1, 4, 4)
CANDIDATES = [get_method("dense"), *(get_method("draft", density=d, tile=TILE) for d in (0.1, 0.2, 0.5))]
START, SLOPE = 2e-3, 3e-9
WORK = 400.0**2 * 32


def timing(method, density, *, kind="16x16", order=0.004, choice=0.01, **changes):
    """A candidate that keeps to the line exactly, on a call of 2 heads and 3 samples."""
    reused = 6 * (START + SLOPE * density * WORK) + order
    times = {"first": reused + choice, "refreshed": reused + choice, "reused": reused}
    about = {"candidate": describe(method), "kind": kind, "density": density, "first_density": density}
    return Timing(**{**about, **times, "order": order, **changes})


def model(*timings):
    dense = Timing(describe(CANDIDATES[0]), "dense", 1.0, 1.0, 5.0, 5.0, 5.0, 0.0)
    return CostModel("a device", "float32", None, None, 400, 2, 32, 3, 5.0, (dense, *timings))


def test_the_kernels_line_is_found_and_followed():
    known = model(*(timing(m, m.density) for m in CANDIDATES[1:]))
    start, slope = known.fits["16x16"]
    assert (start, slope) == (pytest.approx(START), pytest.approx(SLOPE))
    densities = np.array([0.05, 0.1, 0.3, 0.9])
    expected = 3 * (START + SLOPE * densities * WORK) + 0.002
    for index in (1, 2, 3):
        np.testing.assert_allclose(known.seconds(index, densities), expected, rtol=1e-9)
    assert known.seconds(0, 1.0) == pytest.approx(2.5)


def test_a_candidate_that_is_off_the_line_keeps_its_distance():
    slow = timing(CANDIDATES[2], 0.2)
    slow = dataclasses.replace(slow, **{name: getattr(slow, name) + 0.6 for name in ("first", "refreshed", "reused")})
    known = model(timing(CANDIDATES[1], 0.1), slow, timing(CANDIDATES[3], 0.5))
    slope = known.fits["16x16"][1]
    assert known.seconds(2, 0.2) == pytest.approx(slow.reused / 2)
    assert known.seconds(2, 0.4) - known.seconds(2, 0.2) == pytest.approx(3 * slope * 0.2 * WORK)


@pytest.mark.parametrize(
    ("densities", "seconds", "line"),
    [
        ([0.3], [0.6], (0, 2)),  # one point: through the origin
        ([0.3, 0.3001], [0.6, 0.7], (0, None)),  # as good as one
        ([0.2, 0.4], [0.2, 0.6], (0, 1.4)),  # a line that would start below 0
        ([0.2, 0.4], [0.6, 0.6], (0.6, 0)),  # nothing to gain from leaving more out
        ([0.2, 0.4], [0.6, 0.5], (0.55, 0)),  # noise
    ],
)
def test_lines_that_make_no_sense_are_set_right(densities, seconds, line):
    start, slope = cost._line(np.array([densities, seconds]).T)
    assert start == pytest.approx(line[0]) and start >= 0 and slope >= 0
    assert line[1] is None or slope == pytest.approx(line[1])


def test_choosing_blocks_is_paid_for_when_it_happens():
    known = model(timing(CANDIDATES[1], 0.1, choice=0.3), timing(CANDIDATES[2], 0.2, first=9.0, choice=0.3))
    plain = known.seconds(1, 0.1)
    assert known.seconds(1, 0.1, calls=10, refreshes=10) == pytest.approx(plain + 0.15)
    assert known.seconds(1, 0.1, calls=10, refreshes=2) == pytest.approx(plain + 0.15 * 2 / 10)
    learns = known.timings[2]
    total = learns.first + 3 * learns.refreshed + 6 * learns.reused
    assert known.seconds(2, 0.2, calls=10, refreshes=4) == pytest.approx(total / 10 / 2)


def test_heads_that_compute_nothing_cost_next_to_nothing():
    skip = Timing({}, "skip", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert 0 < model(skip).seconds(1, 0.0) < 1e-9


def test_other_sizes():
    known = model(*(timing(m, m.density) for m in CANDIDATES[1:]), timing(CANDIDATES[1], 0.3, kind="own", first=7.0))
    same = Shape(1, 2, 32, 3, TokenSpec(VideoGrid(4, 10, 10)), "float32", "cpu")
    again = known.scaled_to(same)
    assert again.dense == known.dense
    for a, b in zip(again.timings, known.timings, strict=True):
        for name in ("first", "refreshed", "reused", "order"):
            assert getattr(a, name) == pytest.approx(getattr(b, name))
    large = Shape(1, 4, 32, 3, TokenSpec(VideoGrid(8, 10, 10)), "float32", "cpu")
    scaled = known.scaled_to(large)
    assert scaled.dense == pytest.approx(5.0 * 8) and (scaled.tokens, scaled.heads) == (800, 4)
    expected = 3 * (START + SLOPE * 0.2 * 4 * WORK) + 4 * 0.004 / 4
    assert scaled.seconds(2, 0.2) == pytest.approx(expected)
    assert scaled.seconds(2, 0.5) == pytest.approx(expected + 3 * SLOPE * 0.3 * 4 * WORK)


def test_a_record_can_be_read_again(tmp_path):
    known = model(*(timing(m, m.density) for m in CANDIDATES[1:]))
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(known.record(), allow_nan=False))
    assert CostModel.load(path) == known
    for wrong in (
        "{",
        "[]",
        "{}",
        json.dumps({**known.record(), "version": 99}),
        json.dumps({**known.record(), "heads": "2"}),
        '{"version": 1, "speed": 3}',
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"cannot read a cost model from .*gpu\.json"):
            CostModel.load(path)
    with pytest.raises(ValueError, match="cannot read"):
        CostModel.load(tmp_path / "none.json")


def test_a_plan_brings_its_cost_model(tmp_path):
    known = model(*(timing(m, m.density) for m in CANDIDATES[1:]))
    some_plan(SMALL, cost_model=known.record()).save(tmp_path / "plan.json")
    assert CostModel.load(tmp_path / "plan.json") == known
    for shipped in Path(plan.__file__).with_name("data").glob("*.json"):
        assert CostModel.load(shipped).timings[0].candidate["method"] == "dense"
    some_plan(SMALL, cost_model={}).save(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"none\.json: it is no cost model.*give a plan, or a cost-\*\.json"):
        CostModel.load(tmp_path / "none.json")


def test_only_what_was_measured_can_be_selected():
    known = model(*(timing(m, m.density) for m in CANDIDATES[1:]))
    chosen = known.select([CANDIDATES[3], CANDIDATES[0]])
    assert [t.density for t in chosen.timings] == [0.5, 1.0] and chosen.fits.keys() == {"16x16", "dense"}
    with pytest.raises(ValueError, match=r"no times of 1 candidates, such as .*radial"):
        known.select([CANDIDATES[0], get_method("radial")])


def test_measurements_say_what_each_candidate_does():
    candidates = [*CANDIDATES, get_method("radial", block_size=16), get_method("draft", compensate="mean", tile=TILE)]
    known = measure_cost(candidates, SHAPE, rounds=1)
    assert (known.tokens, known.heads, known.head_dim, known.batch) == (304, 2, 16, 1)
    assert [t.kind for t in known.timings] == ["dense", *["16x16"] * 4, "16x16 mean"]
    assert known.select(candidates) == known and known.dense > 0 and known.timings[0].reused == known.dense
    q, k, v = structured_qkv(SHAPE)
    for method, timed in zip(candidates, known.timings, strict=True):
        state = MethodState()
        method.forward(q, k, v, AttentionCall(SHAPE.tokens), state)
        assert timed.density == timed.first_density == pytest.approx(float(state.kept))
        assert timed.reused >= timed.order >= 0
        assert timed.first > 0 and timed.refreshed > 0


def test_a_machine_that_slows_down_favours_nobody(monkeypatch):
    stands_for_dense = object()
    groups = []  # dense, then three calls of one candidate, and at another pace in every group

    def slower(run, device):
        about = run()
        if about is stands_for_dense:
            groups.append(0)
        groups[-1] += 1
        return (1.0 if about is stands_for_dense else 0.25) * 1.7 ** len(groups)

    monkeypatch.setattr(cost, "_time", slower)
    monkeypatch.setattr(cost.Dense, "forward", lambda *arguments: stands_for_dense)
    known = measure_cost(CANDIDATES[:3], SHAPE, rounds=3)
    assert groups == 4 * [1, 4, 4]
    for timed in known.timings[1:]:
        assert timed.reused / known.dense == pytest.approx(0.25)


def test_progress_counts_every_candidate_of_every_round():
    steps = []
    measure_cost(CANDIDATES[:2], SHAPE, rounds=2, advance=steps.append)
    assert sum(steps) == 2 * 3


def test_a_method_that_learns_from_its_first_call():
    adaspa = get_method("adaspa", block_size=16, density=0.25, adaptive=False)
    timed = measure_cost([CANDIDATES[0], adaspa], SHAPE, rounds=1).timings[1]
    assert timed.first_density == 1 and timed.density < 0.5 and timed.kind == "16x16"


def test_made_up_tensors_are_smooth_over_the_video_and_the_same_every_time():
    shape = Shape(1, 2, 32, 2, TokenSpec(VideoGrid(8, 16, 16), 5, True), "bfloat16", "cpu")
    q, k, v = structured_qkv(shape)
    for x, again in zip((q, k, v), structured_qkv(shape), strict=True):
        assert x.shape == (2, 2, 8 * 256 + 5, 32) and x.dtype == torch.bfloat16 and torch.equal(x, again)
    assert not torch.equal(q, k)
    video = q[:, :, 5:].float().unflatten(2, (8, 16, 16))
    near = torch.cosine_similarity(video[:, :, :, :, :-1], video[:, :, :, :, 1:], dim=-1).mean()
    far = torch.cosine_similarity(video[:, :, :4, :8], video[:, :, 4:, 8:], dim=-1).mean()
    assert near > 0.2 and abs(far) < 0.1
