"""The unattended GPU run, tried in Triton's interpreter; its times say nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benches import gpu_suite

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
    job = gpu_suite.check_job(64, torch.bfloat16, "cpu", tiny=True)
    outcome = job.run(job.parts, lambda: None)
    assert not outcome.rows and set(outcome.faults) == set(job.parts)


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
