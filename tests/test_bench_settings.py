"""What users say is compared, at which density, and who of it is the nearest to dense."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastdit import Schedule
from fastdit.attention import MethodState, get_method
from fastdit.attention.table import Table
from fastdit.bench.adjust import MODES, at_density
from fastdit.bench.capture import some_layers
from fastdit.bench.methods import measure_call
from fastdit.bench.settings import SEARCH, default_settings, find_settings, settings_by_part
from fastdit.bench.synthetic import synthetic
from fastdit.bench.winners import winners
from fastdit.demo import WEIGHTS
from fastdit.pipelines.presets import find_preset
from fastdit.tokens import TokenSpec, VideoGrid

TOKENS = TokenSpec(VideoGrid(4, 8, 12))
SAMPLE = synthetic(TOKENS, head_dim=32)


def find(text: str):
    (setting,) = find_settings([text])
    return setting


def test_default_is_what_the_demo_gets():
    config = json.loads((WEIGHTS / "transformer" / "config.json").read_text())
    family: Any = SimpleNamespace(name="wan")
    demo: Any = SimpleNamespace(config=SimpleNamespace(**config))
    preset = find_preset(family, demo)
    setting = find("default")
    assert setting.method == preset.method
    assert setting.fields == {name: value for name, value in preset.fields.items() if name != "density"}


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
    ],
)
def test_bad_settings(text, error, message):
    with pytest.raises(error, match=message):
        find_settings([text])


def test_settings_that_say_their_density_run_once():
    listed = find_settings(["sla", "sla(density=0.3)", "radial(decay=0.5)", "default"])
    parts = settings_by_part(listed, (0.1, 0.2))
    turned = {"sla@0.1": 0.1, "default@0.1": 0.1, "sla@0.2": 0.2, "default@0.2": 0.2}
    fixed = {"sla(density=0.3)": None, "radial(decay=0.5)": None}
    assert {name: density for name, (_, density) in parts.items()} == turned | fixed

    def never(every: bool):
        raise AssertionError("there is nothing to match")

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
    about = {"benchmark": "methods", "source": "made up", "asked": asked, "setting": {"name": name}}
    return about | {"error": error, "density": density}


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
    clips = [
        {"benchmark": "quality", "model": "demo", "asked": 0.2, "setting": {"name": name}}
        | {"density": density, "overall_density": 0.44, "psnr": psnr}
        for name, density, psnr in (("adaspa", 0.3, 29.0), ("default", 0.2, 29.5), ("dense", 0.2, "inf"))
    ]
    assert winners(clips) == ["demo, density 0.2: nearest to dense is default (29.5 dB), then adaspa (29.0 dB)."]
    assert winners([{"benchmark": "kernels"}]) == [] == winners([])
