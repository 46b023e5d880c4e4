"""Rows are kept, left out when done, compared, and not written when they are wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastdit.bench.inputs.problems import find_problems
from fastdit.bench.jobs import Job, Outcome, run_job
from fastdit.bench.kernels import kernel_jobs
from fastdit.bench.measuring.contenders import Contender, Unavailable, contenders
from fastdit.bench.measuring.measure import Times
from fastdit.bench.report.columns import changes, compared, mean_rows
from fastdit.bench.report.result_store import Store, environment, latest, other_run, read_rows


def job(calls: list, parts=("a", "b"), **outcome) -> Job:
    def run(todo, advance):
        calls.append(list(todo))
        found = {part: {"value": 1.0} for part in parts if part not in outcome.get("faults", {})}
        return Outcome(**{"rows": found, **outcome})

    return Job("kernels", "job", parts, run)


def test_what_is_done_is_not_done_again(tmp_path):
    store, calls = Store(tmp_path / "rows.jsonl"), []
    run_job(job(calls, ("a",)), store, {"seed": 0})
    run_job(job(calls), store, {"seed": 0})
    run_job(job(calls), store, {"seed": 0})
    assert calls == [["a"], ["b"]]
    assert [row["part"] for row in store.read()] == ["a", "b"]
    assert all(row["run"] == {"seed": 0} for row in store.read())


def test_wrong_results_have_no_row_and_are_tried_again(tmp_path):
    store, calls = Store(tmp_path / "rows.jsonl"), []
    faults = run_job(job(calls, faults={"a": "off by one"}), store, {})
    assert faults == {"job, a": "off by one"}
    assert [row["part"] for row in store.read()] == ["b"]
    assert run_job(job(calls, faults={"a": "off by one"}), store, {})
    assert calls[-1] == ["a"]


def test_what_was_absent_is_tried_again(tmp_path):
    store, calls = Store(tmp_path / "rows.jsonl"), []
    for _ in range(2):
        run_job(job(calls, rows={"b": {"value": 1.0}}, absent={"a": "not installed"}), store, {})
    assert calls == [["a", "b"], ["a"]]
    assert [row["part"] for row in store.read()] == ["a", "b"]  # the same reason is not said twice
    run_job(job(calls, rows={}, absent={"a": "another reason"}), store, {})
    run_job(job(calls), store, {})
    run_job(job(calls), store, {})
    assert calls[2:] == [["a"], ["a"]]
    assert ["absent" in row for row in latest(store.read())] == [False, False]


def test_rows_of_another_run():
    run = environment("cpu", 3, torch.bfloat16)
    assert (run["dtype"], run["seed"]) == ("bfloat16", 3)
    rows = [{"run": run | {"time": "then", "commit": "older"}}, {"run": {"seed": 3}}, {}]
    assert other_run(rows, run) is None
    assert other_run([*rows, {"run": run | {"dtype": "float32"}}], run) == "dtype float32, this run has bfloat16"
    assert other_run([{"run": run | {"seed": 0}}], run) == "seed 0, this run has 3"
    assert other_run([{"run": run | {"device": "a GPU"}}], run).startswith("device a GPU")


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    store, calls = Store(path), []
    run_job(job(calls), store, {})
    path.write_text(path.read_text()[:-10])
    assert [row["part"] for row in store.read()] == ["a"]
    run_job(job(calls), store, {})
    assert calls[-1] == ["b"]
    assert [row["part"] for row in store.read()] == ["a", "b"]


ENDS_OF_LINES = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""What ``str.splitlines`` splits at."""


def test_texts_may_have_any_letter(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    jobs = [f"a{end}b" for end in (*ENDS_OF_LINES, "\udcff", "\0")]
    store.add([{"benchmark": "methods", "job": name, "part": "p"} for name in jobs])
    assert [row["job"] for row in store.read()] == jobs


@pytest.mark.parametrize("text", ["猫", "𝒂", "é"])
def test_a_row_that_was_cut_in_a_letter_is_measured_again(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    store, rows = Store(path), [{"benchmark": "b", "job": name, "part": "p"} for name in ("whole", text)]
    store.add(rows)
    whole = path.read_bytes()
    for size in range(whole.index(text.encode()) + 1, whole.index(text.encode()) + len(text.encode())):
        path.write_bytes(whole[:size])
        assert store.read() == rows[:1]
        store.add(rows[1:])
        assert store.read() == rows


def test_a_full_disk_is_an_error(tmp_path):
    resource = pytest.importorskip("resource")
    store = Store(tmp_path / "rows.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        with pytest.raises(OSError, match="No space left"):
            store.add([{"benchmark": "b", "job": "j", "part": "p"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.read() == []


@pytest.mark.parametrize("text", ["my notes\n", '{"benchmark": [], "job": "j", "part": "p"}\n', "ftypisom"])
def test_rows_are_not_added_to_another_file(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1: this is no"):
        run_job(job([]), Store(path), {})
    assert path.read_text() == text


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1: this is no result"):
        read_rows(path)


def test_numbers_that_json_lacks(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    store.add([{"benchmark": "quality", "job": "j", "part": "p", "psnr": float("inf"), "x": [float("nan")]}])
    (row,) = store.read()
    assert (row["psnr"], row["x"]) == ("inf", [None])


def kernel_row(seconds: float, spread: float, **more) -> dict:
    row = {"benchmark": "kernels", "job": "j", "part": "p", "seconds": seconds, "seconds_spread": spread}
    return {**row, "density": 0.2, "repeats": 5, **more}


@pytest.mark.parametrize(
    ("old", "new", "better"),
    [
        ((1.0, 0.001), (1.01, 0.001), None),  # below 2 %
        ((1.0, 0.05), (1.2, 0.05), None),  # within three deviations
        ((1.0, 0.01), (1.2, 0.01), False),
        ((1.0, 0.01), (0.8, 0.01), True),
    ],
)
def test_changes_beyond_noise(old, new, better):
    found = changes([kernel_row(*old)], [kernel_row(*new)])
    assert [each["better"] for each in found if each["column"] == "ms"] == ([] if better is None else [better])


def test_few_repeats_have_no_verdict():
    once = kernel_row(1.0, 0.0, repeats=1)
    assert changes([once], [kernel_row(2.0, 0.01)]) == [] == changes([kernel_row(2.0, 0.01)], [once])
    assert changes([once | {"repeats": 2}], [kernel_row(2.0, 0.01)]) == []
    assert changes([once | {"seconds_spread": None}], [once | {"seconds": 3.0}]) == []
    assert Times((1.0,)).spread is None is Times((1.0, 2.0)).spread
    assert Times((1.0, 1.0, 1.0)).spread == 0 < (Times((1.0, 2.0, 3.0)).spread or 0)


def test_rows_that_are_compared():
    old = [kernel_row(1.0, 0.01), kernel_row(1.0, 0.01, part="gone")]
    new = [kernel_row(3.0, 0.01), kernel_row(1.0, 0.01, part="new")]
    assert compared(old, new) == [(old[0], new[0])]


def test_changes_of_what_has_no_noise():
    old = {"benchmark": "methods", "job": "j", "part": "p", "error": 0.3, "recall": 0.9, "density": 0.2}
    assert changes([old], [old | {"error": 0.3001}]) == []
    found = changes([old], [old | {"error": 0.32, "recall": 0.91}, old | {"part": "only here"}])
    assert {each["column"]: each["better"] for each in found} == {"relative L2": False, "recall": True}
    gone = {"benchmark": "methods", "job": "j", "part": "p", "absent": "why"}
    assert [each["better"] for each in changes([old], [gone])] == [False]
    assert changes([gone, old], [old]) == []  # the last row of a measurement is the one that counts


def test_clips_are_averaged():
    rows = [
        {"benchmark": "quality", "job": str(i), "part": "sla@0.2", "model": "demo", "psnr": psnr, "ssim": 0.5 + i / 4}
        | {"flicker": 2.0 + i, "dense_flicker": 2.0, "density": 0.2}
        for i, psnr in enumerate((20.0, 30.0))
    ]
    (mean,) = mean_rows(rows)
    assert mean["clips"] == 2 and mean["ssim"] == 0.625 and mean["flicker_ratio"] == 1.25
    assert mean["psnr"] == pytest.approx(-10 * np.log10((1e-2 + 1e-3) / 2))
    assert mean_rows([rows[0] | {"psnr": "inf"}])[0]["psnr"] == "inf"


def wrong(q, k, v, mask):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return lambda: out


def test_a_wrong_kernel_gets_no_row(tmp_path):
    known = [c for c in contenders() if c.name in ("sdpa-flash", "fastdit-cpu")]
    known.append(Contender("wrong", True, wrong))
    (only,) = kernel_jobs(
        find_problems(["2x8x8/2x32"]),
        known,
        densities=(0.5,),
        blocks=(16, 32),
        dtype=torch.float32,
        device="cpu",
        repeats=1,
    )
    store = Store(tmp_path / "rows.jsonl")
    faults = run_job(only, store, {})
    assert list(faults) == ["2x8x8/2x32 float32 16x32, wrong@0.5"]
    rows = {row["part"]: row for row in store.read()}
    assert set(rows) == {"sdpa-flash", "fastdit-cpu@0.5"}
    ours = rows["fastdit-cpu@0.5"]
    assert ours["density"] == 0.5 and ours["dense"] == "sdpa-flash"
    assert ours["speedup"] == pytest.approx(ours["dense_seconds"] / ours["seconds"])
    assert ours["ideal"] == pytest.approx(ours["speedup"] * 0.5)
    assert ours["tflops"] == pytest.approx(0.5 * 4 * 2 * 128**2 * 32 / ours["seconds"] / 1e12)
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["problem"]["tokens"] == 128


def test_a_kernel_of_ours_that_fails_is_a_fault(tmp_path):
    class CompilationError(Exception):  # Triton's is no RuntimeError
        pass

    def fails(q, k, v, mask):
        def run():
            raise CompilationError("at 3:4\nmore")

        return run

    def refuses(q, k, v, mask):
        raise Unavailable("no such device")

    known = [
        Contender("ours", True, fails, ours=True),
        Contender("refuses", True, refuses, ours=True),
        Contender("foreign", True, fails),
    ]
    problems, how = find_problems(["2x8x8/2x32"]), {"blocks": (16, 32), "dtype": torch.float32, "device": "cpu"}
    (only,) = kernel_jobs(problems, known, densities=(0.5,), repeats=1, **how)
    outcome = only.run(only.parts, lambda: None)
    assert outcome.faults == {"ours@0.5": "CompilationError: at 3:4"} and not outcome.rows
    assert outcome.absent == {"refuses@0.5": "no such device", "foreign@0.5": "CompilationError: at 3:4"}


def test_latest():
    rows = [{"benchmark": "b", "job": "j", "part": p, "n": n} for n, p in enumerate("aba")]
    assert [(row["part"], row["n"]) for row in latest(rows)] == [("a", 2), ("b", 1)]
