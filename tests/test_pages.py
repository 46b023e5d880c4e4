"""The scripts that put results into the pages: one definition of every number, and pages that are up to date."""

import importlib.util
import json
from pathlib import Path

import pytest

from fastdit.bench.report.columns import mean_rows

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare, results_script = script("compare"), script("results")


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
    assert compare.fill(text, mark, "").count(f"<!-- {mark}:start -->\n\n<!-- {mark}:end -->") == 1
    if not (compare.RESULTS / name).exists():
        pytest.skip(f"{name} is not kept")
    assert compare.fill(text, mark, table(name)) == text, "python docs/compare.py brings the pages up to date"


def test_what_a_search_took_is_read_from_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    found = {"search_seconds": 550.4, "density": 0.2012, "device": "cpu", "speedup_attention": 1.8}
    (tmp_path / "search.json").write_text(json.dumps(found))
    text = compare.costs("search.json")
    assert "plan of density 0.201 took 9 min 10 s on cpu." in text and "measured" not in text
    for run, speedup in ((1, 1.466), (2, 1.494)):
        (tmp_path / f"search-run-{run}.json").write_text(json.dumps({"speedup_attention": speedup}))
    text = compare.costs("search.json")
    assert "1.80 times as fast as dense; measured: 1.47 and 1.49." in text
    assert "[search-run-2.json](../benches/results/search-run-2.json)" in text


def report(**changes):
    """What ``fastdit generate --compare --report`` writes, as far as the README shows it."""
    clip = {"prompt": "a cat", "dense_file": "none.dense.mp4", "file": "none.mp4"}
    return {
        "method": "plan",
        "method_fields": {},
        "sparse_steps": [1, 2],
        "steps": 3,
        "frames": 5,
        "width": 48,
        "height": 32,
        "density": 0.2,
        "overall_density": 0.4,
        "speedup_attention": 2.0,
        "speedup_sparse_steps": 1.9,
        "speedup": 1.5,
        "psnr": 30.0,
        "ssim": 0.95,
        "device": "cpu (2 threads)",
        "seed": 0,
        "clips": [clip],
    } | changes


def test_the_readme_shows_what_is_kept(tmp_path, monkeypatch):
    folder = tmp_path / "benches" / "results"
    folder.mkdir(parents=True)
    readme, strip = tmp_path / "README.md", tmp_path / "strip.png"
    for name, value in (("ROOT", tmp_path), ("README", readme), ("STRIP", strip)):
        monkeypatch.setattr(results_script, name, value)
    readme.write_text(f"before\n{results_script.START}\nold\n{results_script.END}\nafter\n")
    files = [folder / "demo.json", tmp_path / "again.json"]
    for file, speedup in zip(files, (1.5, 1.7), strict=True):
        file.write_text(json.dumps(report(speedup=speedup)))
    results_script.main(*map(str, files))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and not strip.exists()
    assert "| time, dense over sparse | 1.90x | 1.50x |" in text and "each of 2 runs: 1.50x, 1.70x." in text
    assert "All numbers: [demo.json](benches/results/demo.json)." in text
    results_script.main(str(files[1]))
    assert "1.70x |" in readme.read_text() and "All numbers" not in readme.read_text()
