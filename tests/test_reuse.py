"""Dynamic patterns live from one denoising step to another, for every method that has them."""

import pytest
import test_methods
import tiny
import torch

import fastdit
from fastdit import Schedule
from fastdit.attention import list_methods, method_class
from fastdit.pipelines.runtime import Layer

EVERY_SECOND = Schedule(warmup_steps=1, refresh_steps=2)

DYNAMIC = [name for name in list_methods() if not (method_class(name).static or method_class(name).stock)]


def fields(name):
    return {"density": 0.4} | test_methods.SMALL.get(name, {})


@pytest.fixture(params=[name for name in DYNAMIC if name != "paro"])
def name(request):
    return request.param


@pytest.fixture
def builds(monkeypatch):
    """Steps at which a pattern came to be, as (step, branch), of the first layer of each transformer."""
    built, latest, kept = [], {}, []
    run_sparse = Layer.run_sparse

    def spy(self, q, k, v, call):
        out = run_sparse(self, q, k, v, call)
        pattern = self.memories[call.branch, 0].state.pattern
        assert pattern is not None, "a dynamic method leaves its pattern in its state"
        kept.append(pattern)  # so that no two patterns ever have one id
        key = (self.runtime.title, call.branch)
        if call.layer == 0 and latest.get(key) is not pattern:
            built.append((call.step, call.branch))
            latest[key] = pattern
        return out

    monkeypatch.setattr(Layer, "run_sparse", spy)
    return built


@pytest.mark.parametrize(
    ("kind", "guidance", "branches"),
    [("wan", 5.0, ("cond", "uncond")), ("wan", 1.0, ("cond",)), ("cogvideox", 5.0, ("cond_uncond",))],
    ids=["sequential", "none", "batched"],
)
def test_guidance_in_any_form(name, kind, guidance, branches, builds):
    pipe = tiny.pipeline(kind, layers=1)
    pipe.enable_sparse_attention(name, schedule=EVERY_SECOND, **fields(name))
    tiny.run(pipe, steps=6, guidance=guidance)
    one_video = [(step, branch) for step in (1, 3, 5) for branch in branches]
    assert builds == one_video
    tiny.run(pipe, steps=6, guidance=guidance)
    assert builds == one_video + one_video


def test_guidance_that_stops_in_mid_run(name, builds):
    pipe = tiny.pipeline("wan", layers=1)
    pipe.enable_sparse_attention(name, schedule=EVERY_SECOND, **fields(name))

    def stop(pipe, step, timestep, tensors):
        pipe._guidance_scale = 5.0 if step < 2 else 1.0
        return tensors

    tiny.run(pipe, steps=6, callback_on_step_end=stop)
    assert builds == [(1, "cond"), (1, "uncond"), (3, "cond"), (5, "cond")]


def test_two_transformers(name, builds):
    pipe = tiny.pipeline("wan22", layers=1)
    pipe.enable_sparse_attention(name, schedule=Schedule(refresh_steps=100), **fields(name))
    tiny.run(pipe, steps=5, guidance=1.0)
    assert len(builds) == 2 and builds[0] == (0, "cond") and builds[1][0] > 0


def test_a_step_that_fails(name, builds):
    pipe = tiny.pipeline("wan", layers=1)
    pipe.enable_sparse_attention(name, schedule=Schedule(refresh_steps=100), **fields(name))
    expected = tiny.run(pipe, steps=4)

    def fail(pipe, step, timestep, tensors):
        if step == 1:
            raise RuntimeError("out of patience")
        return tensors

    with pytest.raises(RuntimeError, match="out of patience"):
        tiny.run(pipe, steps=4, callback_on_step_end=fail)
    assert torch.equal(tiny.run(pipe, steps=4), expected)
    assert builds == [(0, "cond"), (0, "uncond")] * 3


def test_another_resolution_next(name, builds):
    pipe = tiny.pipeline("wan", layers=1)
    handle = pipe.enable_sparse_attention(name, schedule=Schedule(refresh_steps=100), **fields(name))
    for size in ((9, 128, 128), (5, 96, 128), (9, 128, 128)):
        tiny.run(pipe, steps=2, size=size)
    assert builds == [(0, "cond"), (0, "uncond")] * 3
    assert handle.report()["totals"]["fallbacks"] == {}


def test_disabling_frees_everything(name):
    pipe = tiny.pipeline("wan", layers=1)
    handle = pipe.enable_sparse_attention(name, schedule=tiny.EVERY_STEP, **fields(name))
    tiny.run(pipe, steps=2)
    layers = handle._layers()
    assert any(layer.memories for layer in layers)
    fastdit.disable_sparse_attention(pipe)
    assert not any(layer.memories for layer in layers)
