"""Calls that are made up are sparse as real ones are, and methods are brought to one density on them."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from fastdit.attention import get_method
from fastdit.bench.e2e import amdahl
from fastdit.bench.inputs.settings import default_settings, find_settings
from fastdit.bench.inputs.synthetic import KINDS, synthetic
from fastdit.bench.measuring import clips
from fastdit.bench.measuring.clips import compare_clips, flicker, lpips_distance, strip
from fastdit.bench.measuring.measure import peak_memory, reset_peak
from fastdit.bench.methods import measure_call, method_jobs
from fastdit.bench.report.pictures import time_pictures
from fastdit.bench.report.result_store import Store
from fastdit.generation.loading import outline
from fastdit.generation.sources import find_model
from fastdit.tokens import TokenSpec, VideoGrid

TOKENS = TokenSpec(VideoGrid(6, 12, 12), 32)
SAMPLE = synthetic(TOKENS)
OTHER = synthetic(TOKENS, seed=1)


@cache
def demo() -> SimpleNamespace:
    return outline(find_model("demo"))


def weights() -> torch.Tensor:
    return (SAMPLE.q[0] @ SAMPLE.k[0].mT * SAMPLE.q.shape[-1] ** -0.5).softmax(-1)


def test_synthetic_heads_are_sparse_but_not_empty():
    top = weights().sort(-1, descending=True).values.cumsum(-1).mean(1)
    tokens = TOKENS.num_tokens
    assert SAMPLE.kinds == tuple(KINDS)
    assert (top[:, tokens // 5] > 0.85).all()  # a fifth of the keys has nearly everything
    assert (top[:, tokens // 500] < 0.6).all()  # and a few keys do not


def test_synthetic_heads_do_what_they_are_named_after():
    video = weights()[:, TOKENS.video, TOKENS.video].double()
    by_axes = video.unflatten(2, TOKENS.grid.shape).unflatten(1, TOKENS.grid.shape)
    heads = dict(zip(SAMPLE.kinds, by_axes, strict=True))
    same_frame = torch.einsum("fhwfij->", heads["spatial"]) / heads["spatial"].sum()
    same_row = torch.einsum("fhwgha->", heads["row"]) / heads["row"].sum()
    same_column = torch.einsum("fhwgaw->", heads["column"]) / heads["column"].sum()
    assert min(same_frame, same_row, same_column) > 0.6
    on_text = weights()[:, TOKENS.video, TOKENS.text].sum(-1).mean(-1)
    assert on_text.argmax() == SAMPLE.kinds.index("text") and on_text.max() > 0.15
    few = heads["stripes"].flatten(3).flatten(0, 2).mean(0).sort(descending=True).values
    assert few[: int(0.06 * len(few))].sum() / few.sum() > 0.6


def test_synthetic_is_seeded():
    again = synthetic(TOKENS)
    assert torch.equal(again.q, SAMPLE.q) and torch.equal(again.v, SAMPLE.v)
    assert not torch.equal(OTHER.q, SAMPLE.q)
    with pytest.raises(ValueError, match="at least 32 channels, got 16"):
        synthetic(TOKENS, head_dim=16)


@pytest.mark.parametrize("setting", default_settings(), ids=lambda setting: setting.name)
def test_settings_come_near_a_density(setting):
    method = setting.of_model(demo()).at(0.4, lambda every: [OTHER])
    row = measure_call(method, SAMPLE)
    # of so few frames radial attention keeps what it has to
    assert 0.3 < row["density"] < (0.6 if setting.method == "radial" else 0.5)
    assert 0 < row["error"] < 1 and len(row["heads"]) == len(KINDS)


def test_errors_by_hand():
    row = measure_call(get_method("draft", density=0.5, tile=(2, 4, 4)), SAMPLE)
    method = get_method("draft", density=0.5, tile=(2, 4, 4))
    from fastdit.attention import MethodState

    out = method.forward(SAMPLE.q, SAMPLE.k, SAMPLE.v, SAMPLE.call, MethodState())[0].double()
    exact = weights().double() @ SAMPLE.v[0].double()
    errors = (out - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    torch.testing.assert_close(torch.tensor(row["heads"]).double(), errors, rtol=1e-3, atol=1e-5)
    assert row["error"] == pytest.approx(float(errors.mean()), rel=1e-3)


def test_padded_keys_and_queries_do_not_count():
    tokens = TokenSpec(VideoGrid(3, 4, 4), 64)
    sample = synthetic(tokens, head_dim=32)
    padding = torch.zeros(1, tokens.num_tokens, dtype=torch.bool)
    padding[:, -48:] = True
    padded = replace(sample, call=replace(sample.call, key_padding=padding))
    whole = get_method("draft", density=1.0)
    assert measure_call(whole, sample)["error"] < 1e-5 and measure_call(whole, padded)["error"] < 1e-5
    real = tokens.num_tokens - 48
    q, k, v = (x[:, :, :real].double() for x in (sample.q, sample.k, sample.v))
    exact = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    torch.testing.assert_close(padded.dense()[:, :, :real].double(), exact, atol=1e-5, rtol=1e-4)
    off = padded.dense()
    off[:, 0] *= 1.5
    off[:, :, real:] = 7.0  # what padding asks for, nobody reads
    assert padded.errors(off, padded.dense()) == pytest.approx([0.5] + [0.0] * (len(KINDS) - 1), abs=1e-6)


def test_rows_of_methods(tmp_path):
    settings = find_settings(["draft-4x4x4", "sla"], means=True)
    assert [s.name for s in settings] == ["draft-4x4x4", "draft-4x4x4+mean", "sla", "sla+mean"]
    jobs = method_jobs(
        "made up", lambda: [SAMPLE], lambda: [OTHER], settings, densities=(0.3,), about={"x": 1}, target=demo
    )
    from fastdit.bench.jobs import run_job

    store = Store(tmp_path / "rows.jsonl")
    assert run_job(jobs[0], store, {}) == {}
    rows = {row["part"]: row for row in store.read()}
    assert set(rows) == {s.name for s in settings}
    row = rows["draft-4x4x4"]
    assert row["source"] == "made up" and row["asked"] == 0.3 and row["x"] == 1
    assert set(row["heads"]) == set(KINDS) and 0 < row["recall"] <= 1
    assert rows["sla+mean"]["error"] < rows["sla"]["error"]


def test_fixed_settings_run_once():
    settings = find_settings(["sla", "sla(density=0.3)", "default"])
    jobs = method_jobs(
        "made up", lambda: [SAMPLE], lambda: [OTHER], settings, densities=(0.2, 0.4), about={}, target=demo
    )
    assert {job.name: job.parts for job in jobs} == {
        "made up @0.2": ("sla", "default"),
        "made up @0.4": ("sla", "default"),
        "made up": ("sla(density=0.3)",),
    }
    assert jobs[-1].about["asked"] is None
    row = jobs[-1].run(jobs[-1].parts, lambda: None).rows["sla(density=0.3)"]
    assert row["setting"]["fields"]["density"] == 0.3


def test_a_method_that_gives_no_numbers_is_found():
    class Broken(type(get_method("dense"))):
        def forward(self, q, k, v, call, state):
            return q * torch.nan

    assert "NaN or Inf" in measure_call(Broken(), SAMPLE)["fault"]


def test_clips():
    skimage = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(4, 40, 48, 3, generator=generator).numpy()
    clip = (dense + 0.05 * torch.randn(4, 40, 48, 3, generator=generator).numpy()).clip(0, 1)
    row = compare_clips(clip, dense)
    assert row["psnr"] == pytest.approx(skimage.peak_signal_noise_ratio(dense, clip, data_range=1), abs=1e-4)
    how = {"gaussian_weights": True, "use_sample_covariance": False, "data_range": 1, "channel_axis": -1}
    by_frame = [skimage.structural_similarity(a, b, **how) for a, b in zip(dense, clip, strict=True)]
    assert row["ssim"] == pytest.approx(sum(by_frame) / 4, abs=1e-4)
    assert flicker(dense[:1].repeat(3, 0)) == 0 and row["flicker"] == pytest.approx(flicker(clip))
    step = torch.zeros(2, 4, 4, 3).numpy()
    step[1] = 0.5
    assert flicker(step) == 127.5
    assert strip(dense, clip).shape == (2 * 44, 6 * 52, 3)
    assert compare_clips(dense, dense)["psnr"] == float("inf")


def test_lpips_is_measured_or_says_why_not(monkeypatch):
    clip = torch.rand(3, 64, 80, 3, generator=torch.Generator().manual_seed(0)).numpy()
    monkeypatch.setattr(clips, "find_spec", lambda name: None)
    lpips_distance.cache_clear()
    row = compare_clips(clip, clip)
    assert row["lpips"] is None and row["lpips_absent"] == "the package lpips is not installed (fastdit[metrics])"

    class Network(torch.nn.Module):
        def forward(self, a, b):
            assert a.shape[1:] == (3, 64, 80) and -1 <= a.min() < 0
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    def without_net(**how):
        raise OSError("no route to host")

    monkeypatch.setattr(clips, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=without_net))
    lpips_distance.cache_clear()
    assert "cannot be loaded: OSError: no route" in compare_clips(clip, clip)["lpips_absent"]
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda **how: Network()))
    lpips_distance.cache_clear()
    row = compare_clips(clip / 2, clip)
    assert row["lpips"] == pytest.approx(clip.mean(), rel=1e-4) and "lpips_absent" not in row
    assert "64 pixels, the videos have 40" in compare_clips(clip[:, :40], clip[:, :40])["lpips_absent"]
    lpips_distance.cache_clear()


def test_amdahl():
    assert amdahl(0.5, 2.0) == pytest.approx(4 / 3)
    assert amdahl(0.0, 9.0) == 1 == amdahl(0.7, 1.0)


def test_quality_over_time_is_of_what_was_timed_and_compared():
    pytest.importorskip("matplotlib")
    named = {"setting": {"name": "draft"}, "model": "demo"}
    timed = [
        {"part": "dense", "model": "demo", "speedup": 1.0},
        {**named, "part": "draft@0.2", "speedup": 1.5},
        {**named, "part": "draft@0.4", "speedup": 1.2},
    ]
    compared = [{**named, "part": "draft@0.2", "psnr": 24.0}, {**named, "part": "draft@0.6", "psnr": 30.0}]
    ((title, picture),) = time_pictures(timed, compared)
    assert title == "demo: quality over time" and picture.startswith("<svg")
    assert time_pictures(timed, [{**named, "part": "draft@0.2", "psnr": "inf"}]) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody says what a process uses at most")
def test_peak_memory_begins_anew():
    size = 256 << 20
    reset_peak("cpu")
    before = peak_memory("cpu")
    block = torch.ones(size, dtype=torch.uint8)
    assert peak_memory("cpu") - before > size // 2
    del block
    reset_peak("cpu")
    assert peak_memory("cpu") - before < size // 2
