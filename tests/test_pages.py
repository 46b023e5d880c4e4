"""The scripts that put results into the pages: one definition of every number, and pages that are up to date."""

import importlib.util
import json
from pathlib import Path

import pytest

from fastdit.bench.columns import mean_rows

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = script("compare")


def row(part, prompt, psnr, **changes):
    """A row as ``fastdit bench quality`` writes it."""
    fields = {"density": 0.2, "tile": [4, 4, 4], "per_row": False, "parts": 1, "compensate": None}
    return {
        "benchmark": "quality",
        "model": "demo",
        "job": prompt,
        "part": part,
        "prompt": prompt,
        "setting": {"name": part, "method": "draft", "fields": fields, "schedule": {"refresh_steps": 1}},
        "asked": 0.2,
        "density": 0.2,
        "overall_density": 0.4,
        "psnr": psnr,
        "ssim": 0.9,
        "accuracy": 1.0,
        "flicker": 1.0,
        "dense_flicker": 1.0,
    } | changes


def plan_row(prompt, psnr):
    setting = {"name": "plan", "method": "plan", "fields": {"plan": "plan.json"}, "schedule": None}
    return row("plan", prompt, psnr, setting=setting, asked=None)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A function that writes rows to a file of results."""
    monkeypatch.setattr(compare, "RESULTS", tmp_path)

    def write(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        return "rows.jsonl"

    return write


@pytest.mark.parametrize(("values", "expected"), [((20.0, 40.0), 22.967), ((30.0, "inf"), 33.010), (("inf",), None)])
def test_clips_are_averaged_as_the_report_of_a_benchmark_does(results, values, expected):
    rows = [row("draft@0.2", str(index), value) for index, value in enumerate(values)]
    (found,) = compare.settings(compare.read(results(*rows)))
    (reported,) = mean_rows(rows)
    assert found["psnr"] == pytest.approx(float(reported["psnr"])) and found["clips"] == len(values)
    assert found["psnr"] == (float("inf") if expected is None else pytest.approx(expected, abs=1e-3))


def test_settings_are_named_by_what_their_blocks_hold(results):
    fields = row("", "", 0)["setting"]["fields"]

    def named(method, **changes):
        return compare.order_of(method, {**fields, **changes})

    assert named("draft") == "tile 4x4x4" != named("draft", tile=[1, 8, 16]) == "tile 1x8x16"
    assert named("draft", per_row=True, parts=8) == "tile 4x4x4, per row, 8 means"
    assert (named("radial"), named("sla", order="tile"), named("plan")) == ("raster", "tile 4x4x4", "searched")
    earlier = {
        "setting": "radial(block_size=64,compensate=mean,order=tile,tile=(1, 8, 8))@0.2/tile/refresh=1/steps=None",
        "method": "radial",
        "right": {"color": True, "shape": False, "motion": False, "background": True},
    }
    (found,) = compare.read(results(earlier))
    assert found["order"] == "tile 1x8x8" and found["accuracy"] == pytest.approx(2 / 3)


def test_a_plan_is_held_against_the_best_that_computes_no_more(results):
    rows = [plan_row("a", 30.0), plan_row("b", 20.0)]
    rows += [
        row("draft@0.2", "a", 30.0),
        row("draft@0.2", "b", 17.0),
        row("sla@0.2", "a", 21.0),
        row("sla@0.2", "b", 21.0),
    ]
    rows += [row("adaspa@0.2", prompt, 50.0, density=0.3) for prompt in "ab"]
    (line,) = compare.margins_table(results(*rows)).splitlines()[2:]
    assert "22.6 dB" in line and "21.0 dB" in line and "| 1.6 dB | +9.0, -1.0 dB |" in line


@pytest.mark.parametrize(("page", "mark", "name", "table"), compare.TABLES, ids=lambda value: str(value)[:20])
def test_tables_are_those_of_the_results(page, mark, name, table):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert compare.fill(text, mark, table(name)) == text, "python docs/compare.py brings the pages up to date"
