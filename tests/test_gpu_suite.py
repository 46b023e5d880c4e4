"""The unattended GPU run, tried in Triton's interpreter; its times say nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from benches import gpu_sla, gpu_suite, gpu_times
from fastdit.bench.jobs import Job, Outcome
from fastdit.bench.measuring.contenders import Contender

ROOT = Path(__file__).parent.parent


def suite(*arguments, **environment):
    command = [sys.executable, "-m", "benches.gpu_suite", *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_tiny_run_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    arguments = ("--device", "cpu", "--tiny", "--out", tmp_path)
    done = suite(*arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "gpu.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    made = {(row["benchmark"], row["part"]) for row in rows if "absent" not in row}
    for part in (("check", "tma"), ("forward", "fastdit-triton@0.1"), ("variants", "128x64x8x2-tma@0.1")):
        assert part in made
    assert {("methods", "draft choice"), ("backward", "sdpa-flash")} <= made
    # started again, it measures nothing twice
    (tmp_path / "gpu.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    assert suite(*arguments, TRITON_INTERPRET="1").returncode == 0
    again = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert [line for line in again if line in lines[:-1]] == lines[:-1]
    assert json.loads(again[-1])["part"] == rows[-1]["part"]


def test_a_wrong_kernel_gives_no_row(monkeypatch):
    def wrong(q, k, v, mask, kernel=None, right=gpu_suite.block_sparse_attention, **options):
        if kernel == "reference":
            return right(q, k, v, mask, kernel=kernel, **options)
        return torch.ones_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setattr(gpu_suite, "block_sparse_attention", wrong)
    monkeypatch.setattr(gpu_suite, "_refusal", lambda *_, **__: None)
    job = gpu_suite.check_job(64, torch.bfloat16, "cpu", tiny=True)
    outcome = job.run(job.parts, lambda: None)
    assert not outcome.rows and set(outcome.faults) == set(job.parts)


class CompilationError(Exception):
    """Stand in for Triton's, which is no RuntimeError either."""


def fail(*_, **__):
    raise CompilationError("at 3:4\nmore")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_only_what_a_kernel_refuses_is_absent(monkeypatch):
    job = gpu_suite.check_job(64, torch.bfloat16, "cpu", tiny=True)
    refused = job.run(job.parts, lambda: None)
    assert set(refused.absent) == set(job.parts) and not refused.faults
    monkeypatch.setattr(gpu_suite, "_refusal", lambda *_, **__: None)
    monkeypatch.setattr(gpu_suite, "block_sparse_attention", fail)
    crashed = job.run(("tma", "mean"), lambda: None)
    assert crashed.faults == dict.fromkeys(("tma", "mean"), "CompilationError: at 3:4") and not crashed.absent


def test_a_crash_is_a_fault_and_the_rest_is_timed(monkeypatch):
    timed = gpu_times.times_of({"broken": fail, "sound": lambda: None}, "cpu", 1, lambda: None)
    assert timed.faults == {"broken": "CompilationError: at 3:4"} and set(timed.rows) == {"sound"}
    problem = gpu_suite.problem_of(256, 16, 1)
    for name in ("linear_attention", "join_linear_attention"):
        monkeypatch.setattr(gpu_sla, name, fail)
    checks = gpu_sla.sla_check_job(16, torch.float32, "cpu")
    assert set(checks.run(checks.parts, lambda: None).faults) == set(checks.parts)
    known = [Contender("fastdit-triton", True, fail, ours=True), Contender("sdpa-flash", False, fail)]
    monkeypatch.setattr(gpu_suite, "contenders", lambda: known)
    outcome = gpu_suite.backward_job(problem, 1.0, "cpu", 1).run(("fastdit-triton", "sdpa-flash"), lambda: None)
    assert set(outcome.faults) == {"fastdit-triton"} and set(outcome.absent) == {"sdpa-flash"}


def test_a_job_that_crashes_does_not_end_the_run(monkeypatch, tmp_path, capsys):
    jobs = [
        Job("check", "broken", ("a",), fail),
        Job("check", "sound", ("a",), lambda todo, advance: Outcome({"a": {"right": True}})),
    ]
    monkeypatch.setattr(gpu_suite, "suite", lambda *_, **__: jobs)
    with pytest.raises(typer.Exit) as end:
        gpu_suite.main(tmp_path, device="cpu")
    assert end.value.exit_code == 1
    assert "wrong: broken: CompilationError: at 3:4" in capsys.readouterr().err
    assert [json.loads(line)["job"] for line in (tmp_path / "gpu.jsonl").read_text().splitlines()] == ["sound"]


def test_methods_have_dense_attention_beside_them():
    job = gpu_suite.method_job(gpu_suite.problem_of(512, 64, 1), "cpu", 1)
    assert set(job.run(("dense", "draft choice"), lambda: None).rows) == {"dense", "draft choice"}


def test_what_is_not_written_shows():
    with gpu_suite.poisoned_empty():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    job = gpu_suite.check_job(64, torch.float32, "cpu", tiny=True)
    assert "tma" in job.parts and "int8" in job.parts


def test_jobs_are_told_apart():
    jobs = gpu_suite.suite("cpu")
    assert len({(job.benchmark, job.name) for job in jobs}) == len(jobs)
    assert [job.benchmark for job in jobs][:10] == ["check"] * 9 + ["forward"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = suite("--out", tmp_path)
    assert done.returncode == 2 and "no CUDA device; --dry-run lists" in done.stderr
    assert "forward" in suite("--out", tmp_path, "--dry-run").stdout
