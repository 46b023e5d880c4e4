"""Transformers with random weights: which steps are run, and what a whole video is said to take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cli_runs import run, run_json

import fastdit.bench.suites
from fastdit import Schedule
from fastdit.attention.methods import adaspa, profiled
from fastdit.bench import random_models
from fastdit.bench.e2e import e2e_jobs
from fastdit.bench.inputs.problems import find_problems
from fastdit.bench.inputs.settings import find_settings
from fastdit.bench.random_models import MODELS, model_of, random_subject, step_kinds

SMALL = {"num_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
PROBLEM = replace(find_problems(["4x8x8/2x128"])[0], name="wan-1.3b-tiny", steps=10, passes=2)


def subject():
    return random_subject(PROBLEM, dtype=torch.float32, device="cpu", changes=SMALL)


def measure(*texts: str, densities: tuple[float, ...] = ()) -> dict[str, Any]:
    (job,) = e2e_jobs("tiny", subject, find_settings(texts), densities=densities, about={}, repeats=1)
    outcome = job.run(job.parts, lambda: None)
    assert not outcome.faults and not outcome.absent
    return outcome.rows


def test_kinds_of_steps():
    schedule = Schedule(warmup_steps=0.2, tail_steps=1, dense_layers=(0,), refresh_steps=(0.2, 0.6))
    assert step_kinds(schedule, 10) == ["dense"] * 2 + ["first"] + ["reused"] * 3 + ["rebuilt"] + ["reused"] * 2 + [
        "dense"
    ]
    assert step_kinds(Schedule(), 3) == ["first", "rebuilt", "rebuilt"]
    assert step_kinds(Schedule(warmup_steps=1.0), 2) == ["dense"] * 2


def test_a_video_is_the_sum_of_its_steps():
    schedule = Schedule(warmup_steps=0.2, refresh_steps=(0.2, 0.6))
    seconds = {0: 5.0, 2: 4.0, 3: 1.0, 6: 2.0}
    # one layer, one call a step: the first sparse one keeps everything, others a quarter
    kept = {0: None, 2: 1.0, 3: 0.25, 6: 0.25}
    done: list[int] = []

    class Handle:
        attention_seconds = property(lambda self: sum(seconds[step] / 2 for step in done))
        density = property(
            lambda self: sum(found := [kept[s] for s in done if kept[s]]) / len(found) if len(done) > 1 else None
        )

        def __init__(self):
            self.schedule = schedule

        def report(self):
            return {"totals": {"calls": len(done), "sparse_calls": sum(kept[step] is not None for step in done)}}

    def run_step(step: int) -> float:
        done.append(step)
        return seconds[step]

    handle: Any = Handle()
    timing = random_models._video(handle, 10, run_step)
    assert done == [0, 2, 3, 6]
    assert timing.seconds == pytest.approx(2 * 5 + 4 + 6 * 1 + 2)
    assert timing.attention_seconds == pytest.approx(timing.seconds / 2)
    assert sorted(timing.steps) == [1.0] * 6 + [2.0, 4.0, 5.0, 5.0]
    assert timing.density == pytest.approx((1 + 7 * 0.25) / 8)
    assert timing.overall_density == pytest.approx((2 + 1 + 7 * 0.25) / 10)


def test_first_calls_count_once(monkeypatch):
    searches, profiles = [], []
    stock, profile = adaspa.AdaSpa._attend, profiled.Profiled._choose
    monkeypatch.setattr(profiled.Profiled, "_choose", lambda *args: profiles.append(args[-2].branch) or profile(*args))
    monkeypatch.setattr(adaspa.AdaSpa, "_attend", lambda *args: searches.append(args[-2].branch) or stock(*args))
    rows = measure("adaspa(density=0.2, block_size=16)", "profiled(density=0.25, block_size=16)")
    assert searches == profiles == ["cond", "uncond"] * 2  # of two videos, one of which is the warm-up
    row = rows["adaspa(density=0.2, block_size=16)"]
    assert row["density"] == pytest.approx((1 + 7 * 3 / 16) / 8)  # eight sparse steps, of which the first searches
    assert rows["dense"]["density"] == 1 == rows["dense"]["speedup"]


def test_default_is_that_of_the_model(monkeypatch):
    row = measure("default")["default"]
    assert row["setting"]["method"] == "profiled" and row["setting"]["schedule"]["refresh_steps"] == 2
    assert row["asked"] is None and row["weights"] == "random" and 0.2 < row["overall_density"] < 1


def test_rows_of_the_command(tmp_path, monkeypatch):
    stock = random_subject
    monkeypatch.setattr(
        fastdit.bench.suites, "random_subject", lambda problem, **how: stock(problem, changes=SMALL, **how)
    )
    monkeypatch.setattr(fastdit.bench.suites, "find_problems", lambda names: [PROBLEM] if list(names) else [])
    place = ("--problems", "tiny", "--repeats", "1", "-o", tmp_path / "rows.jsonl")
    refused = run("bench", "e2e", "--settings", "draft", *place)
    assert refused.exit_code == 2 and "draft needs a density; pass --densities" in refused.stderr
    dense, row = run_json("bench", "e2e", *place)["rows"]
    assert row["weights"] == "random" and row["job"] == "wan-1.3b-tiny, random weights" and "psnr" not in row
    assert row["speedup"] == pytest.approx(dense["seconds"] / row["seconds"])


def test_every_model_is_a_class_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, model.class_name) for model in MODELS.values())


def test_model_of_a_problem():
    assert model_of(PROBLEM) is MODELS["wan-1.3b"] and model_of(replace(PROBLEM, name="wan")) is None
