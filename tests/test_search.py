"""The search as a whole on tiny pipelines: the same plan every time, resumed where it stopped."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny
import torch
from test_decide import cost_of

import fastdit
from fastdit import Schedule
from fastdit.attention import get_method
from fastdit.attention.methods.draft import Draft
from fastdit.pipelines.families.wan import Wan
from fastdit.plans.plan import Plan
from fastdit.search import stages as task
from fastdit.search.candidates import make_candidates
from fastdit.search.cost import ROUNDS, TOO_SLOW
from fastdit.search.fingerprint import fingerprint, plain
from fastdit.search.sampling import Sampling
from fastdit.search.search import CALIBRATION_PROMPTS, search
from fastdit.search.solver import ImpossibleBudget

CANDIDATES = make_candidates(
    [
        "draft(density=0.1, tile=(1, 4, 4), compensate=mean)",
        "draft(density=0.3, tile=(1, 4, 4))",
        "draft(density=0.6, tile=(1, 4, 4))",
        "radial(block_size=16, min_band=64)",
    ]
)
SIZES = {"num_frames": 9, "height": 128, "width": 128, "num_inference_steps": 4, "guidance_scale": 5.0}
PROMPTS = ("a", "bb")
EVERY = Sampling(Schedule(warmup_steps=1), buckets=2)


def pipeline(kind="wan", **changes):
    """A pipeline that knows its prompts by their length."""
    pipe = tiny.pipeline(kind, **changes)

    def encode_prompt(prompt, prompt_embeds=None, negative_prompt_embeds=None, **options):
        if prompt is None:
            return prompt_embeds, negative_prompt_embeds
        words = torch.Generator().manual_seed(len(prompt))
        text = torch.randn(1, tiny.TEXT, tiny.WIDTH, generator=words)
        return text, torch.zeros_like(text)

    pipe.encode_prompt = encode_prompt
    return pipe


def quick_search(pipe, prompts=PROMPTS, **options):
    defaults = {"candidates": CANDIDATES, "cost": cost_of(CANDIDATES), "sampling": EVERY, "arguments": SIZES}
    limited = {"budget", "target_speedup", "max_error", "preset"} & set(options)
    return search(pipe, prompts, **{**defaults, **({} if limited else {"budget": 0.4}), **options})


def test_a_plan_holds_what_was_asked_for_and_runs(tmp_path):
    pipe = pipeline()
    expected = tiny.run(pipe)
    plan = quick_search(pipe, budget=0.4)
    assert torch.equal(tiny.run(pipe), expected)
    assert plan.buckets == (0.5, 1.0) and plan.steps == 4 and plan.schedule == Schedule(warmup_steps=1)
    assert plan.prompts == PROMPTS and plan.guidance == 5.0 and plan.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert plan.density <= 0.4 and 0 < plan.error < 1 and plan.speedup > 1
    assert plan.curve[0][1] >= plan.error >= plan.curve[-1][1] and plan.curve_unit == "density"
    found = plan.transformers["transformer"]
    # buckets hold one step and two
    densities = np.array(found.densities)
    assert np.average(densities.mean((1, 2)), weights=[1, 2]) == pytest.approx(plan.density, abs=1e-5)
    for name in ("choices", "errors", "seconds", "error_means", "error_stds", "recalls"):
        assert np.array(getattr(found, name)).shape == (2, 2, tiny.HEADS)
    assert np.all(np.array(found.error_means) <= np.array(found.errors) + 1e-6) and np.array(found.error_stds).max() > 0
    assert np.array(found.recalls, float)[np.array(found.densities) < 1].max() < 1
    assert np.array(found.frame_mass).shape == (2, tiny.HEADS, 3)
    np.testing.assert_allclose(np.sum(found.frame_mass, -1), 1, atol=1e-5)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with fastdit.sparse_attention(pipe, plan.method("transformer"), schedule=plan.schedule) as handle:
        pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent", **SIZES)
    assert handle.density == pytest.approx(plan.density, abs=0.02)
    assert not handle.report()["totals"]["fallbacks"]


def test_less_error_costs_more_and_the_same_search_gives_the_same_plan():
    pipe = pipeline()
    plans = [quick_search(pipe, budget=budget) for budget in (0.2, 0.4, 0.8)]
    assert plans[0].error > plans[1].error > plans[2].error
    assert quick_search(pipe, budget=0.4) == plans[1]
    limit = plans[1].error * (1 + 1e-4)
    by_error = quick_search(pipe, max_error=limit)
    # either choice may be one step of one cell off the optimum
    assert by_error.error <= limit and by_error.speedup >= 0.98 * plans[1].speedup
    fast = quick_search(pipe, target_speedup=1.5)
    assert fast.speedup >= 1.5 - 1e-5


def test_two_transformers_are_searched_apart():
    pipe = pipeline("wan22")
    plan = quick_search(pipe, sampling=Sampling(Schedule(), buckets=2, steps=(0, 3)), budget=0.4)
    assert set(plan.transformers) == {"transformer", "transformer_2"}
    assert plan.transformers["transformer"].choices != plan.transformers["transformer_2"].choices
    with pytest.raises(ValueError, match=r"the transformer ran at steps 0 to 0, .* only \[1, 2\]; give steps="):
        quick_search(pipe, sampling=Sampling(Schedule(), steps=(1, 2)))


@pytest.mark.parametrize("preset", [None, "paro"])
def test_a_transformer_that_only_runs_in_dense_steps_is_in_the_plan(preset):
    pipe = pipeline("wan22")
    made = []
    options = {"preset": preset, "candidates": None, "cost": None} if preset else {}
    plan = quick_search(pipe, ("a",), **options, budget=0.4, progress=lambda *about: made.append(about))
    first, second = (plan.transformers[title] for title in ("transformer", "transformer_2"))
    assert not np.any(first.choices) and np.all(np.array(first.densities) == 1) and first.frame_mass == ()
    assert np.any(second.choices) and (first.layers, first.heads) == (second.layers, second.heads)
    last = {stage: (done, total) for stage, done, total in made}
    assert all(done == total for done, total in last.values()) and ("calibrate" in last) == (preset is not None)
    with fastdit.sparse_attention(pipe, plan) as handle:
        pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent", **SIZES)
    assert handle.density == pytest.approx(plan.density, abs=0.05)
    if not preset:
        np.testing.assert_allclose(first.seconds, 0.01)  # that of a dense head
        assert plan.speedup == pytest.approx(4 / (1 + 3 * plan.density), rel=0.05)


def test_layers_that_the_schedule_keeps_dense_are_not_decided_about():
    sampling = Sampling(Schedule(dense_layers=(0,)), buckets=1)
    plan = quick_search(pipeline(), sampling=sampling, budget=0.4)
    choices = np.array(plan.transformers["transformer"].choices)
    assert (choices[:, 0] == 0).all() and (choices[:, 1] > 0).any()
    assert plan.density <= 0.4
    found = plan.transformers["transformer"]
    assert np.all(np.array(found.densities)[:, 0] == 1) and np.allclose(np.array(found.seconds)[:, 0], 0.01)


def captures(monkeypatch):
    """List the videos that are made; a survey makes none."""
    made = []
    generate = task.Task.generate

    def listed(self, *about):
        generate(self, *about)
        made.append(about)

    monkeypatch.setattr(task.Task, "generate", listed)
    return made


def test_scores_that_are_there_are_used_again(tmp_path, monkeypatch):
    made = captures(monkeypatch)
    first = quick_search(pipeline(), folder=tmp_path)
    assert made == [("a", 0), ("bb", 1)] and len(list(tmp_path.iterdir())) == 2
    assert quick_search(pipeline(), folder=tmp_path) == first and len(made) == 2
    assert quick_search(pipeline(), folder=tmp_path, budget=0.7).density > first.density and len(made) == 2
    quick_search(pipeline(), ("a", "bb", "ccc"), folder=tmp_path)
    assert made[2:] == [("ccc", 2)]


@pytest.mark.parametrize(
    "change",
    [
        {"candidates": CANDIDATES[:3], "cost": cost_of(CANDIDATES[:3])},
        {"sampling": Sampling(Schedule(), buckets=2)},
        {"arguments": {**SIZES, "guidance_scale": 1.0}},
        {"seed": 7},
        {"precision": None, "kernel": "reference"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_scores_of_another_search_are_not(tmp_path, monkeypatch, change):
    made = captures(monkeypatch)
    quick_search(pipeline(), ("a",), folder=tmp_path)
    quick_search(pipeline(), ("a",), folder=tmp_path, **change)
    assert len(made) == 2 and len(list(tmp_path.iterdir())) == 2


def test_scores_of_another_model_are_not(tmp_path, monkeypatch):
    made = captures(monkeypatch)
    for pipe in (pipeline(), pipeline(seed=1), pipeline(ffn_dim=64)):
        quick_search(pipe, ("a",), folder=tmp_path)
    assert len(made) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, monkeypatch, error):
    made = captures(monkeypatch)
    pipe = pipeline()

    def stop(stage, done, total):
        if len(made) == 1 and done > 70:
            raise error

    with pytest.raises(error):
        quick_search(pipe, folder=tmp_path, progress=stop)
    assert pipe.sparse_attention is None and len(list(tmp_path.iterdir())) == 1
    made.clear()
    plan = quick_search(pipe, folder=tmp_path)
    assert made == [("bb", 1)]
    assert plan == quick_search(pipe)


def test_progress_is_an_estimate_that_comes_true(monkeypatch):
    seen = []

    def measure(candidates, shape, *, advance, **options):
        for _ in range((ROUNDS + 1) * len(candidates)):
            advance(1)
        return cost_of(candidates)

    monkeypatch.setattr(task, "measure_cost", measure)
    quick_search(pipeline(), candidates=CANDIDATES[:2], cost=None, budget=1.0, progress=lambda *x: seen.append(x))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["cost", "capture", "solve"]
    for stage in ("cost", "capture", "solve"):
        done = [(d, t) for s, d, t in seen if s == stage]
        assert done[0][0] == 0 and done[-1][0] == done[-1][1] and all(d <= t for d, t in done)
        assert [d for d, _ in done] == sorted(d for d, _ in done)
    # four steps of two passes over two layers, two of them scored with a candidate
    total = 2 * (4 * 2 * 2 + 2 * 2 * 2)
    changes = 2 * 2 * 2  # at two steps two layers by themselves, each a pass of two layers
    assert next(about for about in seen if about[0] == "capture") == ("capture", 0, total)
    assert [d for s, d, _ in seen if s == "capture"][-1] == total + changes


def test_the_pipeline_is_given_back_as_it_was():
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True, desc="mine")
    quick_search(pipe, ("a",))
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    assert pipe.sparse_attention is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": []}, ValueError, "at least one text"),
        ({"prompts": ["a", " "]}, ValueError, "at least one text"),
        ({"prompts": "a cat"}, ValueError, "at least one text"),
        ({"candidates": ["daft"]}, ValueError, "unknown method 'daft'"),
        ({"budget": 0.0}, ValueError, r"budget is a density in \(0, 1\]"),
        ({"budget": 0.3, "max_error": 0.1}, ValueError, "give one of budget"),
        ({"max_error": -1.0}, ValueError, "max_error must be at least 0"),
        ({"target_speedup": 0.0}, ValueError, "target_speedup must be above 0"),
        ({"budget": 0.3, "end_to_end": True}, ValueError, "give both"),
        ({"preset": "svg"}, ValueError, "presets are: sparse-vdit, paro"),
        ({"preset": "paro"}, ValueError, "has candidates of its own"),
        ({"preset": "paro", "candidates": None, "target_speedup": 2.0}, ValueError, "calibrates for a density"),
        ({"preset": "paro", "candidates": None}, ValueError, "leave the cost model out"),
        ({"preset": "paro", "candidates": None, "cost": None, "folder": "x"}, ValueError, "leave the folder out"),
        ({"budget": 0.01}, ImpossibleBudget, r"budget 0.01 is impossible: it must be at least 0\.\d+"),
        ({"target_speedup": 99.0}, ImpossibleBudget, r"target_speedup 99 is impossible: .* reach \d\.\d+$"),
        ({"sampling": Sampling(Schedule(warmup_steps=1.0))}, ValueError, "keeps all 4 steps dense"),
        ({"sampling": Sampling(EVERY.schedule, steps=(0, 3))}, ValueError, r"sparse steps, 1 to 3 of 4, got \[0\]"),
    ],
)
def test_what_makes_no_sense_says_so(options, error, message):
    pipe = pipeline()
    with pytest.raises(error, match=message):
        quick_search(pipe, **options)
    assert pipe.sparse_attention is None


def test_the_published_rule_of_sparse_vdit():
    plan = search(pipeline(), ("a",), preset="sparse-vdit", arguments=SIZES)
    names = [method.name for method in plan.candidates]
    assert names == ["dense", "skip", "diagonal", "multi_diagonal", "vertical_stripe"]
    assert len(plan.buckets) == 1
    assert {0} != {i for layer in plan.transformers["transformer"].choices[0] for i in layer}


def test_the_published_procedure_of_paro():
    pipe = pipeline("wan22")
    made = []
    plan = search(
        pipe, PROMPTS, preset="paro", budget=0.5, sampling=Sampling(Schedule(), buckets=2, steps=(0, 1, 3)),
        arguments=SIZES, progress=lambda *about: made.append(about),
    )  # fmt: skip
    assert [method.name for method in plan.candidates] == ["dense", "paro", "paro"]
    assert plan.density == pytest.approx(0.5, abs=0.06)
    for title, index in (("transformer", 1), ("transformer_2", 2)):
        assert set(np.array(plan.transformers[title].choices).flat) == {index}
    assert [about for about in made if about[0] == "calibrate"][-1] == ("calibrate", 6, 6)
    # the paper's masks are made for the heads of one transformer
    assert plan.candidates[1].plan != plan.candidates[2].plan


def test_models_are_told_apart_by_their_weights():
    one, two = (fingerprint(tiny.transformer("wan", seed=seed)) for seed in (0, 1))
    assert one == fingerprint(tiny.transformer("wan")) and one["weights"] != two["weights"]
    assert (one["class"], one["config"]) == (two["class"], two["config"])
    with torch.device("meta"):
        assert fingerprint(tiny.transformer("wan"))["config"] == one["config"]


def test_arguments_of_any_kind_can_be_compared():
    image = np.arange(12, dtype=np.uint8)
    same = [plain({"a": (1, None), "image": image, "x": torch.ones(2, 3, dtype=torch.bfloat16)}) for _ in range(2)]
    assert same[0] == same[1] == json.loads(json.dumps(same[0]))
    assert plain(torch.ones(3)) != plain(torch.zeros(3)) and plain(image) != plain(image + 1)


def test_built_in_prompts():
    assert len(set(CALIBRATION_PROMPTS)) == len(CALIBRATION_PROMPTS) == 12


def test_paro_without_a_plan_is_no_candidate():
    with pytest.raises(RuntimeError, match=re.escape("cannot run on this model")):
        quick_search(pipeline(), ("a",), candidates=[get_method("paro")], cost=None)


def test_candidates_far_slower_than_dense_are_left_out_before_anything_is_scored(monkeypatch):
    slow = cost_of(CANDIDATES).timings[2]
    model = cost_of(CANDIDATES)
    seconds = TOO_SLOW * model.dense * 1.01
    slow = dataclasses.replace(slow, first=seconds, refreshed=seconds, reused=seconds)
    model = dataclasses.replace(model, timings=(*model.timings[:2], slow, *model.timings[3:]))
    runs, forward = [], Draft.forward
    monkeypatch.setattr(Draft, "forward", lambda self, *x: (runs.append(self.density), forward(self, *x))[1])
    plan = quick_search(pipeline(), ("a",), cost=model)
    assert set(runs) == {0.1, 0.6}
    assert 2 not in set(np.array(plan.transformers["transformer"].choices).flat)
    seconds = model.dense * 1.2
    timings = [dataclasses.replace(t, first=seconds, refreshed=seconds, reused=seconds) for t in model.timings[2:]]
    little = dataclasses.replace(model, timings=(*model.timings[:2], *timings))
    runs.clear()
    quick_search(pipeline(), ("a",), cost=little)
    assert len(set(runs)) == 3, "what takes little longer is scored"
    fast = dataclasses.replace(model.timings[0], first=1e-9, refreshed=1e-9, reused=1e-9)
    all_slow = dataclasses.replace(model, dense=1e-9, timings=(fast, *model.timings[1:]))
    with pytest.raises(
        ValueError, match="every candidate takes longer than dense attention on a device with 192 tokens"
    ):
        quick_search(pipeline(), ("a",), cost=all_slow)


def test_times_are_kept_with_the_scores(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(task, "measure_cost", lambda methods, *about, **options: measured.append(1) or cost_of(methods))
    plans = [quick_search(pipeline(), folder=tmp_path, cost=None, kernel=kernel) for kernel in (None, None, "cpu")]
    assert plans[0] == plans[1] and len(measured) == 2
    assert len(list(tmp_path.glob("cost-*.json"))) == 2 and not list(tmp_path.glob(".*"))
    next(tmp_path.glob("cost-*.json")).write_text("{")
    for path in tmp_path.glob("cost-*.json"):
        path.write_text("{")
    with pytest.raises(ValueError, match=r"cannot read a cost model from .*cost-"):
        quick_search(pipeline(), folder=tmp_path, cost=None)


def test_a_pipeline_that_cannot_run_sparse_says_why(monkeypatch):
    monkeypatch.setattr(Wan, "grid", lambda *about: "the grid is a secret")
    with pytest.warns(UserWarning, match="secret"), pytest.raises(ValueError, match="run sparse: the grid is a secret"):
        quick_search(pipeline())
