"""What users say is compared, at which density, and who of it is the nearest to dense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdit
from fastdit import Schedule, pattern
from fastdit.attention import MethodState, get_method
from fastdit.attention.per_head.table import Table
from fastdit.bench.inputs.capture import some_layers
from fastdit.bench.inputs.density_matching import at_density, radial_fields
from fastdit.bench.inputs.problems import PROBLEMS, find_problems
from fastdit.bench.inputs.settings import (
    DEFAULT_METHODS,
    SEARCH,
    default_settings,
    find_settings,
    settings_by_part,
)
from fastdit.bench.inputs.synthetic import synthetic
from fastdit.bench.methods import measure_call
from fastdit.bench.random_models import MODELS, problem_outline
from fastdit.bench.report.ranking import winners
from fastdit.search.candidates import SPARSE_VDIT as MODES
from fastdit.tokens import TokenSpec, VideoGrid
from tools.train_demo.models import build_pipeline

TOKENS = TokenSpec(VideoGrid(4, 8, 12))
SAMPLE = synthetic(TOKENS, head_dim=32)


def never(every: bool):
    raise AssertionError("there is nothing to match")


def find(text: str):
    (setting,) = find_settings([text])
    return setting


def test_default_is_what_a_pipeline_gets():
    pipe = build_pipeline()
    shipped = fastdit.enable_sparse_attention(pipe)
    setting = find("default")
    assert setting.at(0.2, never) is None
    assert setting.enable(pipe, None, None).method == shipped.method != setting.enable(pipe, None, 0.2).method
    asked = setting.enable(pipe, None, 0.2)
    users = fastdit.enable_sparse_attention(pipe, density=0.2)
    assert (asked.method, asked.schedule) == (users.method, users.schedule) and asked.method.density == 0.2
    assert setting.describe(asked.method, asked.schedule)["method"] == "profiled"
    changed = find("default(warmup_steps=3, density=0.4)").enable(pipe, None, None)
    assert changed.schedule == replace(users.schedule, warmup_steps=3) and changed.method.density == 0.4


def test_default_on_single_calls():
    demo, fourteen = (problem_outline(PROBLEMS[name]) for name in ("demo", "wan-14b-720p"))
    assert find("sla").of_model(demo) == find("sla")
    assert find("default").of_model(fourteen).method == "draft" and not find("default").of_model(fourteen).is_fixed
    found = find("default(refresh_steps=4, block_size=32)").of_model(demo)
    users = fastdit.choose(demo, block_size=32)
    method = users.methods["transformer"]
    assert found.method == method.name == "profiled" and "density" not in found.fields
    assert get_method("profiled", density=method.density, **found.fields) == method
    assert found.schedule == replace(users.schedule, refresh_steps=4)
    assert find("default(density=0.3)").of_model(demo).fields["density"] == 0.3
    assert problem_outline(find_problems(["2x4x4/1x32"])[0]).transformer.config == demo.transformer.config


def test_every_default_takes_the_fields_of_a_default():
    models = [problem_outline(problem) for name, problem in PROBLEMS.items() if name.startswith(("demo", *MODELS))]
    assert {choose.name for model in models for choose in fastdit.choose(model, density=0.2).methods.values()} == set(
        DEFAULT_METHODS
    )


def test_settings_are_read():
    setting = find("draft-4x4x4( per_row = True, compensate=mean, refresh_steps=4 )")
    assert setting.name == "draft-4x4x4(per_row=True, compensate=mean, refresh_steps=4)"
    assert setting.fields == {"tile": (4, 4, 4), "per_row": True, "compensate": "mean"}
    assert setting.schedule == Schedule(warmup_steps=0.3, refresh_steps=4)
    assert find("adaspa(warmup_steps=0.1)").schedule == replace(SEARCH, warmup_steps=0.1)
    assert find("diagonal").method == "diagonal"  # by the name of any method
    again = setting.changed(warmup_steps=2)
    assert again.name == setting.name[:-1] + ", warmup_steps=2)" and again.schedule.warmup_steps == 2
    assert setting.changed() is setting


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("drift", ValueError, "unknown setting 'drift'; settings are: .*default.*files of plans"),
        ("draft(tiles=(4, 4, 4))", TypeError, "tiles"),
        ("draft(density=2)", ValueError, "density must be in"),
        ("draft(refresh_steps=0)", ValueError, "refresh_steps must be at least 1"),
        ("draft(0.2)", ValueError, "cannot read 'draft"),
        ("nowhere.json", ValueError, "nowhere.json"),
        ("default(samples=0)", ValueError, "samples must be"),
        ("default(density=2)", ValueError, "density must be in"),
        ("default(decay=0.2)", TypeError, "decay"),
        ("a/dense.json", ValueError, "a/dense.json has the name of the setting 'dense'"),
        ("sla@0.2.json", ValueError, "rename it"),
    ],
)
def test_bad_settings(text, error, message):
    with pytest.raises(error, match=message):
        find_settings([text])


def test_settings_that_say_their_density_run_once():
    listed = find_settings(["sla", "sla(density=0.3)", "radial(decay=0.5)", "default"])
    parts = settings_by_part(listed, (0.1, 0.2))
    turned = {"sla@0.1": 0.1, "default@0.1": 0.1, "sla@0.2": 0.2, "default@0.2": 0.2}
    fixed = {"sla(density=0.3)": None, "radial(decay=0.5)": None, "default": None}
    assert {name: density for name, (_, density) in parts.items()} == turned | fixed

    assert listed[1].at(None, never) == get_method("sla", density=0.3)
    assert find("dense").at(0.2, lambda every: [SAMPLE]) == "dense has no density to set"


def test_sparse_vdit_gives_each_head_its_best_pattern():
    layers = [replace(SAMPLE, call=replace(SAMPLE.call, layer=i, num_layers=2)) for i in range(2)]
    layers[1] = replace(layers[1], q=SAMPLE.q.flip(1), k=SAMPLE.k.flip(1), v=SAMPLE.v.flip(1))
    table = at_density("sparse-vdit", {}, 0.3, layers)
    assert isinstance(table, Table) and [method.name for method in table.methods] == list(MODES)
    assert table.choices[0][1] == table.choices[0][0][::-1] and len(set(table.choices[0][0])) > 1
    errors = [measure_call(mode, SAMPLE)["heads"] for mode in table.methods]
    best = [min(column) for column in zip(*errors, strict=True)]
    assert measure_call(table, layers[0])["heads"] == pytest.approx(best, rel=1e-5)


def test_sparse_vdit_takes_its_density_from_a_field():
    setting = find("sparse-vdit(density=0.3)")
    assert setting.is_fixed and setting.is_calibrated
    asked = []
    table = setting.at(None, lambda every: asked.append(every) or [SAMPLE])
    assert isinstance(table, Table) and asked == [True]
    assert 0.25 < measure_call(table, SAMPLE)["density"] < 0.35


def test_radial_is_matched_with_the_fields_that_are_given():
    for given in ({"block_size": 128}, {"block_size": 16, "order": "tile", "tile": (1, 4, 4)}):
        method = at_density("radial", given, 0.7, [SAMPLE])
        assert given.items() <= vars(method).items()
        grid = SAMPLE.call.tokens.grid.shape
        fields = radial_fields(grid, 0.7, tuple(given.items()))
        near = abs(pattern("radial", grid=grid, **fields).density - 0.7)
        other = radial_fields(grid, 0.7, (("order", given.get("order", "raster")),))
        assert near <= abs(pattern("radial", grid=grid, **{**other, **given}).density - 0.7)
        assert measure_call(method, SAMPLE)["density"] == pytest.approx(pattern("radial", grid=grid, **fields).density)


def test_names_that_are_taken(tmp_path):
    with pytest.raises(ValueError, match="'sla' is named twice"):
        find_settings(["sla", "draft", "sla"])
    shipped = next((Path(fastdit.__file__).parent / "plans" / "data").glob("*.json"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(shipped.read_text())
    assert find(str(tmp_path / "a" / "plan.json")).name == "plan"
    with pytest.raises(ValueError, match="'plan' is named twice"):
        find_settings([str(tmp_path / name / "plan.json") for name in ("a", "b")])


def test_paro_is_calibrated_for_parts_of_a_run():
    calls = [replace(SAMPLE, call=replace(SAMPLE.call, step=step, num_steps=10)) for step in (4, 8)]
    assert at_density("paro", {}, 0.3, calls).plan.edges == (0.6, 1.0)
    assert at_density("paro", {}, 0.3, calls[:1]).plan.edges == (1.0,)


def test_some_layers():
    calls = [replace(SAMPLE, call=replace(SAMPLE.call, layer=i, num_layers=5)) for i in range(5)]
    assert some_layers(calls, False) == [calls[2]] and some_layers(calls, True) == calls


def test_every_default_setting_has_a_name_of_its_own():
    names = [setting.name for setting in find_settings(None, means=True)]
    assert len(names) == len(set(names)) and {s.name for s in default_settings()} < set(names)
    assert "default+mean" not in names and "sparse-vdit+mean" not in names and "radial+mean" in names


def test_a_pattern_of_a_table_is_measured():
    table = at_density("sparse-vdit", {}, 0.3, [SAMPLE])
    out = table.forward(SAMPLE.q, SAMPLE.k, SAMPLE.v, SAMPLE.call, MethodState())
    dense = torch.nn.functional.scaled_dot_product_attention(SAMPLE.q, SAMPLE.k, SAMPLE.v)
    error = ((out - dense).flatten(2).norm(dim=2) / dense.flatten(2).norm(dim=2)).mean()
    row = measure_call(table, SAMPLE)
    assert row["error"] == pytest.approx(float(error), rel=1e-3) and 0.25 < row["density"] < 0.35


def method_row(name: str, error: float, density: float = 0.2, asked: float | None = 0.2) -> dict[str, Any]:
    about = {"benchmark": "methods", "source": "made up", "part": name, "asked": asked, "setting": {"name": name}}
    return about | {"job": f"made up @{asked}", "error": error, "density": density}


def test_winners():
    rows = [method_row("paro", 0.2), method_row("default", 0.3, 0.21), method_row("radial", 0.1, 0.35)]
    (sentence,) = winners(rows)
    assert sentence == (
        "made up, density 0.2: nearest to dense is paro (relative L2 0.200); "
        "default (relative L2 0.300) is number 2 of 2."
    )
    (sentence,) = winners([*rows[1:], method_row("sla", 0.4)])
    assert sentence.endswith("nearest to dense is default (relative L2 0.300), then sla (relative L2 0.400).")
    (sentence,) = winners([rows[0], rows[2]])  # without the default, equal means near the least of all
    assert sentence.endswith("nearest to dense is paro (relative L2 0.200).")
    (sentence,) = winners([method_row("paro", 0.2), method_row("default", 0.3, 0.17)])  # blocks are coarse
    assert "nearest to dense is paro" in sentence
    assert winners(rows[:1]) == [] == winners([method_row("plan", 0.1, asked=None), method_row("sla", 0.2, asked=None)])
    assert winners([{"benchmark": "kernels"}]) == [] == winners([])


def test_what_says_its_density_is_in_each_contest():
    rows = [
        method_row(name, error, asked, asked)
        for asked in (0.2, 0.4)
        for name, error in (("default", 0.3), ("sla", 0.4))
    ]
    rows.append(method_row("plan", 0.1, 0.3, None))
    first, second = winners(rows)
    assert "density 0.2: nearest to dense is default (relative L2 0.300), then sla" in first  # the plan computed more
    assert "density 0.4: nearest to dense is plan (relative L2 0.100); default" in second


def clip_row(
    part: str, prompt: str, psnr: float | str, density: float = 0.2, asked: float | None = 0.2
) -> dict[str, Any]:
    about = {"benchmark": "quality", "model": "demo", "part": part, "prompt": prompt, "clip_seed": 0, "asked": asked}
    about |= {"job": f"demo | {prompt} | 0", "setting": {"name": part.partition("@")[0]}}
    return about | {"density": density, "overall_density": 0.44, "psnr": psnr, "flicker": 1.0, "dense_flicker": 1.0}


def test_winners_of_videos():
    rows = [
        clip_row("adaspa@0.2", "a", 29.0, 0.3),
        clip_row("default@0.2", "a", 29.5),
        clip_row("dense@0.2", "a", "inf"),
    ]
    (sentence,) = winners(rows)
    assert sentence == "demo, density 0.2: nearest to dense is default@0.2 (29.5 dB), then adaspa@0.2 (29.0 dB)."
    # a break has left one of them without the harder of two clips
    rows = [clip_row("sla@0.2", "a", 30.0), clip_row("default@0.2", "a", 31.0), clip_row("default@0.2", "b", 20.0)]
    (sentence,) = winners(rows)
    assert sentence == (
        "demo, density 0.2 (1 of 2 clips): nearest to dense is default@0.2 (31.0 dB), then sla@0.2 (30.0 dB)."
    )
    (sentence,) = winners([*rows, clip_row("sla@0.2", "b", 22.0), clip_row("default", "c", 99.0, asked=None)][:4])
    assert "nearest to dense is sla@0.2" in sentence and "clips" not in sentence
