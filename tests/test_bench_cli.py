"""``fastdit bench`` as its users see it: rows, exit codes, breaks, reports, several processes."""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli_runs import SIZE, folder, run, run_json, spawn

import fastdit.bench.jobs
import fastdit.bench.measuring.contenders
import fastdit.bench.quality
import fastdit.bench.suites
from fastdit.attention import get_method
from fastdit.bench.inputs.settings import find_settings
from fastdit.bench.measuring.contenders import Contender
from fastdit.bench.model import Model
from fastdit.bench.quality import Studio, quality_jobs
from fastdit.bench.report.result_store import read_rows
from fastdit.cli.assemble import command
from fastdit.files import folded

KERNELS = ("bench", "kernels", "--densities", "0.5", "--contenders", "sdpa-flash,fastdit-cpu,fa3", "--repeats", "1")
SMALL = ("--problems", "2x8x8/2x32")


def parts(path) -> list[str]:
    return [row["part"] for row in read_rows(path)]


def test_kernels(tmp_path):
    file = tmp_path / "rows.jsonl"
    value = run_json(*KERNELS, *SMALL, "-o", file)
    rows = {row["part"]: row for row in value["rows"]}
    assert set(rows) == {"sdpa-flash", "fa3", "fastdit-cpu@0.5"} == set(parts(file))
    assert rows["fa3"]["absent"].startswith("not installed")
    about = rows["sdpa-flash"]["run"]
    assert about["seed"] == 0 and about["versions"]["torch"] and {"commit", "device", "time"} <= set(about)
    assert about["dtype"] == "float32"
    again = run(*KERNELS, *SMALL, "-o", file)
    assert again.exit_code == 2 and "--resume" in again.stderr
    other = run(*KERNELS, *SMALL, "-o", file, "--resume", "--seed", "1")
    assert other.exit_code == 2 and "rows of another run: seed 0, this run has 1" in other.stderr
    resumed = run(*KERNELS, *SMALL, "-o", file, "--resume", "--against", file)
    assert resumed.exit_code == 0 and "3 rows compared" in resumed.stdout
    assert len(parts(file)) == 3
    command = ("bench", "kernels", "--densities", "0.5", "--problems", "2x8x8/1x32", "--repeats", "1")
    result = run(*command, "--contenders", "fastdit-cpu", "--against", file, "-o", tmp_path / "own.jsonl")
    assert result.exit_code == 0 and "none of these rows is in" in result.stdout
    ours = next(row for row in read_rows(tmp_path / "own.jsonl") if row["part"] == "fastdit-cpu@0.5")
    assert ours["speedup"] > 0 and ours["dense"] == "sdpa-flash"  # never without a dense one beside it


@dataclass(frozen=True)
class Side:
    width: int = 8


@dataclass(frozen=True)
class Size:
    height: int
    side: Side = Side()


def test_options_are_assembled():
    made = []

    @command
    def draw(*, name: str, size: Size = Size(4), debug: bool = False) -> None:
        """Do it."""
        made.append((name, size, debug))

    parameters = inspect.signature(draw).parameters
    assert list(parameters) == ["name", "height", "width", "debug"] and draw.__doc__ == "Do it."
    assert (parameters["height"].default, parameters["height"].annotation) == (4, int)
    assert parameters["width"].default == 8
    draw(name="a", height=2, width=3, debug=True)
    assert made == [("a", Size(2, Side(3)), True)]


def test_dry_run_computes_nothing(tmp_path):
    file = tmp_path / "rows.jsonl"
    value = run_json(*KERNELS, *SMALL, "-o", file, "--dry-run")
    (job,) = value["jobs"]
    assert set(job["parts"]) == {"sdpa-flash", "fa3", "fastdit-cpu@0.5"}
    assert job["seconds"] > 0 and not file.exists()
    jobs = run_json("bench", "all", "--quick", "--dry-run", "-o", file)["jobs"]
    assert {each["benchmark"] for each in jobs} == {"kernels", "methods", "quality", "e2e"}


def test_a_wrong_kernel_is_a_failure(tmp_path, monkeypatch):
    known = fastdit.bench.measuring.contenders.contenders()

    def prepare(q, k, v, mask):
        return lambda: q + 0.1

    monkeypatch.setattr(fastdit.bench.suites, "contenders", lambda: [*known, Contender("wrong", True, prepare)])
    file = tmp_path / "rows.jsonl"
    result = run("bench", "kernels", *SMALL, "--densities", "0.5", "--contenders", "sdpa-flash,wrong", "-o", file)
    assert result.exit_code == 1
    assert "wrong@0.5: error" in result.stderr and "1 results were wrong" in result.stderr
    assert parts(file) == ["sdpa-flash"]


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch):
    stock, seen = fastdit.bench.jobs.run_job, []

    def run_job(job, *args):
        if seen:
            raise KeyboardInterrupt
        seen.append(job)
        return stock(job, *args)

    monkeypatch.setattr(fastdit.bench.jobs, "run_job", run_job)
    file = tmp_path / "rows.jsonl"
    both = ("--problems", "2x8x8/2x32,2x8x8/1x32")
    result = run(*KERNELS, *both, "-o", file)
    assert result.exit_code == 130 and "--resume to continue" in result.stderr
    assert len(parts(file)) == 3
    monkeypatch.undo()
    assert run(*KERNELS, *both, "-o", file, "--resume").exit_code == 0
    assert len(parts(file)) == 6


def test_ctrl_c_between_videos(tmp_path, monkeypatch):
    stock, made = fastdit.bench.quality._video, []

    def video(studio, prompt, seed, enable):
        made.append(enable(studio.pipeline).method.name)
        if len(made) == 4:
            raise KeyboardInterrupt
        return stock(studio, prompt, seed, enable)

    monkeypatch.setattr(fastdit.bench.quality, "_video", video)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    command = ("bench", "quality", "--model", folder(), *SIZE, "--prompts", tmp_path / "prompts.txt", "--resume")
    command += ("--settings", "sla(density=0.5), draft(density=0.5), default(density=0.5)", "--densities", "0.5")
    assert run(*command, "-o", tmp_path / "rows.jsonl").exit_code == 130
    assert made == ["dense", "sla", "draft", "profiled"]  # one dense video serves all of a prompt
    assert parts(tmp_path / "rows.jsonl") == ["sla(density=0.5)", "draft(density=0.5)"]
    assert run(*command, "-o", tmp_path / "rows.jsonl").exit_code == 0
    assert made[4:] == ["dense", "profiled"] and len(parts(tmp_path / "rows.jsonl")) == 3


def test_what_is_learned_from_is_not_compared(monkeypatch):
    seen = []
    monkeypatch.setattr(
        fastdit.bench.suites,
        "quality_jobs",
        lambda studio, prompts, seeds, *_, **__: seen.append((list(prompts), list(seeds), studio.args[2])) or [],
    )
    session: Any = SimpleNamespace(seed=5, device="cpu", rows=[])
    model = Model.find(str(folder()))
    for prompts, count in ((["a", "b", "c"], 2), (["a", "b"], None)):
        fastdit.bench.suites.build_quality(session, model, prompts, count, 2, [], (), None)
    assert seen == [(["a", "b"], [5, 6], ("c", 7)), (["a", "b"], [5, 6], ("a", 7))]


def test_captured_calls_are_of_two_videos(monkeypatch):
    made = []
    studio: Any = SimpleNamespace(
        pipeline=SimpleNamespace(transformer=None), make=lambda *video: made.append(video), calibration_steps=(1,)
    )
    build = fastdit.bench.suites
    monkeypatch.setattr(build, "open_studio", lambda *_: studio)
    monkeypatch.setattr(build, "capture", lambda pipeline, make, *_, **__: make() or [])
    monkeypatch.setattr(build, "method_jobs", lambda name, measured, calibration, *_, **__: (measured(), calibration()))
    session: Any = SimpleNamespace(seed=5, device="cpu")
    build._captured(session, Model.find(str(folder())), ["a"], [], ())
    build._captured(session, Model.find("demo"), ["a", "b"], [], ())
    assert made == [("a", 5), ("a", 6), ("a", 5), ("b", 6)]


def test_packages_of_the_report_are_looked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("fastdit.cli.bench"), "find_spec", lambda name: None)
    for words in (("all", "--quick"), ("report", tmp_path / "rows.jsonl")):
        result = run("bench", *words, "-o", tmp_path / ("rows.jsonl" if words[0] == "all" else "page.html"))
        assert result.exit_code == 2 and "jinja2 and matplotlib; install fastdit[bench]" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("kernels", "--problems", "wan"), "unknown problem 'wan'"),
        (("kernels", "--densities", "0"), r"density must be in \(0, 1\]"),
        (("kernels", "--densities", "much"), "separated by commas"),
        (("kernels", "--blocks", "64"), "blocks are QUERIESxKEYS"),
        (("kernels", "--contenders", "fa9"), "unknown contender 'fa9'"),
        (("methods", "--settings", "drift"), "unknown setting 'drift'"),
        (("e2e", "--problems", "demo"), "no configuration for demo"),
        (("quality", "--score-with", "no-such-program {folder}"), "no program 'no-such-program' was found"),
        (("quality", "--score-with", "true"), "has no {folder}"),
        (("kernels", "--against", "nowhere.jsonl"), "cannot read results"),
        (("kernels", "--against", "/dev/null"), "/dev/null has no results"),
        (("kernels", "-o", "nowhere/rows.jsonl"), "the folder nowhere does not exist"),
        (("kernels", "-o", "/dev"), "it is a folder"),
        (("methods", "--problems", "2x4x4/0x32"), "at least one head"),
        (("methods", "--model", folder()), 'one with --prompt "..."'),
        (("e2e", "--model", folder()), 'one with --prompt "..."'),
        (("quality", "--model", folder()), "some with --prompts FILE"),
        (("report", "nowhere.jsonl"), "cannot read results"),
        (("quality", "--score-with", "'{folder}"), "No closing quotation"),
        (("quality", "--seed", 2**64 - 1), f"got {2**64 - 1} to {2**64}"),
        (("methods", "--seed", 2**64 - 1), f"got {2**64 - 1} to {2**64}"),
        (("quality", "--videos", "notes.txt"), "is a file, not a folder; pass another path to --videos"),
        (("quality", "--videos", "."), "already exists"),
        (
            ("quality", "--prompts", "notes.txt", "-o", "notes.txt", "--resume"),
            "--output and --prompts are the same file",
        ),
        (("kernels", "-o", "notes.txt", "--resume"), "line 1: this is no JSON object"),
        (("kernels", "--blocks", f"{10**30}x64"), "at most 100000"),
        (("methods", "--prompt", " "), "the prompt is empty"),
        (("all", "-o", "rows.html", "--dry-run"), "the report and --output are the same file"),
    ],
)
def test_bad_input(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a cat\n")
    place = () if arguments[0] == "report" or "-o" in arguments else ("-o", tmp_path / "rows.jsonl")
    result = run("bench", *arguments, *place)
    assert result.exit_code == 2, result.stderr
    assert re.search(text, result.stderr)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "a cat\n"


def test_a_report_is_not_written_over_its_rows(tmp_path):
    path = tmp_path / "rows.md"
    path.write_text('{"benchmark": "kernels", "job": "j", "part": "p"}\n')
    for output, text in (
        (path, "--output and the results are the same file"),
        (tmp_path / "x.md", "lacks fields that a report"),
    ):
        result = run("bench", "report", path, "-o", output)
        assert result.exit_code == 2 and text in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["rows.md"] and path.read_text().startswith("{")


def test_videos_of_prompts_that_differ_little(tmp_path, monkeypatch):
    clip, handle = (
        np.zeros((1, 16, 16, 3), np.float32),
        SimpleNamespace(density=0.5, overall_density=0.5, schedule=None),
    )
    handle.method = get_method("draft", density=0.5)
    monkeypatch.setattr(fastdit.bench.quality, "_video", lambda *arguments: (clip, handle))
    studio = Studio(None, None, 2, ("", 0), tmp_path, lambda frames, path: path.touch())
    prompts = [
        "a bird!",
        "a cat",
        "a cat?",
        "a cat!",
        "A dog",
        "a dog",
        "b" * 300,
        "b" * 301,
        "猫" * 100,
        "猫" * 101,
        ".",
        "c-",
        "c",
    ]
    settings = find_settings(["draft(density=0.5)"])
    how = {"densities": (), "model": "m", "about": {}, "others": ["a bird?"]}
    rows = [
        row
        for job in quality_jobs(lambda: studio, prompts, (-1, 1), settings, **how)
        for row in job.run(job.parts, lambda: None).rows.values()
    ]
    for kind in ("video", "side_by_side", "strip"):
        names = [Path(row[kind]).name for row in rows]
        assert len({folded(name) for name in [*names, "a bird_-1.mp4"]}) == 1 + 2 * len(prompts)
        assert max(len(name.encode()) for name in names) <= 255 and not any(name.startswith(".") for name in names)
    assert Path(rows[2]["video"]) == tmp_path / "draft_density_0.5_" / "a cat--1.mp4"


class Check(HTMLParser):
    """Collect what a page loads from elsewhere, and its texts."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.loads += [v for k, v in values.items() if k in ("src", "href") and not v.startswith(("data:", "#"))]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Rows of all benchmarks on an untrained pipeline, with videos."""
    place = tmp_path_factory.mktemp("bench")
    file, prompts = place / "rows.jsonl", place / "prompts.txt"
    prompts.write_text("a red circle\n<b>a blue square\n")
    settings = ("--settings", "draft-4x4x4,sla", "--densities", "0.5", "-o", file, "--resume", "--quiet")
    model = ("--model", folder(), *SIZE)
    for arguments in (
        (*KERNELS, *SMALL, "-o", file, "--quiet"),
        ("bench", "methods", "--problems", "2x8x8/1x32", *settings),
        ("bench", "quality", *model, "--prompts", prompts, *settings, "--score-with", "ls {folder}"),
        ("bench", "e2e", *model, "--prompt", "a red circle", "--repeats", "1", *settings),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
    return file


def test_quality(videos):
    rows = [row for row in read_rows(videos) if row["benchmark"] == "quality"]
    assert [row["part"] for row in rows] == ["draft-4x4x4@0.5", "sla@0.5"] * 2
    place = videos.with_suffix(".videos")
    label = f"{folder().name}, height=32, width=48, frames=5, steps=3"
    for row in rows:
        assert row["model"] == label and row["accuracy"] is None and row["lpips"] is None
        assert 0 < row["density"] <= 1 and row["arguments"]["num_inference_steps"] == 3
        assert row["psnr"] == "inf" or row["psnr"] > 20  # the video is one block, so nothing can be left out
    names = {path.name for path in place.iterdir()}
    assert names == {"dense", "draft-4x4x4@0.5", "sla@0.5", "side-by-side"}
    assert {path.name for path in (place / "dense").iterdir()} == {
        "a red circle-0.mp4",
        "_b_a blue square-0.mp4",
        "scores.txt",
    }
    assert "a red circle-0.mp4" in (place / "sla@0.5" / "scores.txt").read_text()


def test_e2e(videos):
    rows = {row["part"]: row for row in read_rows(videos) if row["benchmark"] == "e2e"}
    assert set(rows) == {"dense", "draft-4x4x4@0.5", "sla@0.5"}
    dense = rows["dense"]
    assert dense["speedup"] == 1 == dense["predicted_speedup"] and 0 < dense["attention_share"] < 1
    assert all(row["seconds"] > row["step_seconds"] > 0 and row["cold_seconds"] > 0 for row in rows.values())
    assert sys.platform != "linux" or all(row["peak_bytes"] > 100 << 20 for row in rows.values())


def test_report(videos):
    page, tables = videos.with_name("report.html"), videos.with_name("report.md")
    for output in (page, tables):
        assert run("bench", "report", videos, "-o", output).exit_code == 0
    text, check = page.read_text(), Check()
    check.feed(text)
    assert check.loads == []
    assert check.tags.count("img") == 4 and check.tags.count("svg") >= 4 and "b" not in check.tags
    comparable = [row for row in read_rows(videos) if row["benchmark"] == "quality" and isinstance(row["psnr"], float)]
    assert ("quality over time" in text) == bool(comparable)
    assert "prefers-color-scheme: dark" in text and "currentColor" in text
    markdown = tables.read_text()
    assert "- `LPIPS`: it takes 64 pixels, the videos have 32" in markdown
    assert "### Whole videos" in markdown and "| `sla@0.5` |" in markdown and "- `fa3`: not installed" in markdown
    assert run("bench", "report", videos, "-o", videos.with_name("report.txt")).exit_code == 2


@pytest.mark.slow
def test_processes_share_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "fastdit")
    command = ("bench", "quality", "--model", folder(), *SIZE, "--prompts", "prompts.txt", "--settings", "sla")
    done = spawn(*command, "--densities", "0.5", "-o", "rows.jsonl", "--json", cwd=tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout[done.stdout.index("{") :])["rows"]
    assert {row["prompt"] for row in rows} == {"one", "two", "three"} and len(rows) == 3
