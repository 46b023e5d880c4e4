"""Dynamic patterns live from one denoising step to another, for every method that has them."""

import pytest
import test_methods
import tiny
import torch

import fastdit
from fastdit import Schedule
from fastdit.attention import MethodState, list_methods, method_class
from fastdit.attention.per_head.table import Table
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
    forget = Layer._forget

    def spy(self, state, call):
        states = [state, *(own for own in state.memory.values() if isinstance(own, MethodState))]
        pattern = next((own.pattern for own in states if own.pattern is not None), None)
        assert pattern is not None, "a dynamic method leaves its pattern in its state, or in those of its samples"
        kept.append(pattern)  # so that no two patterns ever have one id
        key = (self.runtime.title, call.branch)
        if call.layer == 0 and latest.get(key) is not pattern:
            built.append((call.step, call.branch))
            latest[key] = pattern
        forget(self, state, call)

    monkeypatch.setattr(Layer, "_forget", spy)
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


def held(handle):
    """Patterns that the layers hold, those of groups of heads too."""
    states = [memory.state for layer in handle._layers() for memory in layer.memories]
    states += [
        own for state in states for groups in state.memory.values() for own in getattr(groups, "states", {}).values()
    ]
    return sum(state.pattern is not None for state in states)


@pytest.mark.parametrize("refresh_steps", [1, 2])
def test_what_no_later_step_uses_is_freed(name, refresh_steps):
    """Patterns of all layers are gigabytes: they are held from one step to the next only if that uses them."""
    pipe = tiny.pipeline("wan", layers=2)
    handle = pipe.enable_sparse_attention(name, schedule=Schedule(refresh_steps=refresh_steps), **fields(name))
    between = []

    def look(pipe, step, timestep, tensors):
        between.append(held(handle))
        return tensors

    tiny.run(pipe, steps=4, callback_on_step_end=look)
    assert between == ([0, 0, 0, 0] if refresh_steps == 1 else [4, 0, 4, 0])
    assert all(not memory.state.memory for layer in handle._layers() for memory in layer.memories)


def test_groups_of_heads_are_freed_too():
    cut, flat = (fastdit.attention.get_method("draft", density=0.4, tile=tile) for tile in ((2, 4, 4), (1, 4, 8)))
    table = Table(edges=(1.0,), methods=(cut, flat), choices=(((0, 1),) * 2,))
    pipe = tiny.pipeline("wan", layers=2)
    handle = pipe.enable_sparse_attention(table, schedule=Schedule(refresh_steps=2))
    between = []

    def look(pipe, step, timestep, tensors):
        between.append(held(handle))
        return tensors

    tiny.run(pipe, steps=4, callback_on_step_end=look)
    assert between == [8, 0, 8, 0]


def test_parts_of_a_batch_have_patterns_of_their_own():
    """Loops may go through samples one by one, under the same name in the same step."""
    pipe = tiny.pipeline("wan", layers=1)
    handle = pipe.enable_sparse_attention("draft", density=0.4, tile=(2, 4, 4), schedule=Schedule(refresh_steps=100))
    samples = [tiny.arguments("wan", seed=seed) for seed in range(2)]
    model = pipe.transformer
    with torch.no_grad():
        alone = []
        for sample in samples:
            handle.reset()
            with model.cache_context("cond"):
                alone.append(model(**sample)[0])
        handle.reset()
        for _ in range(2):
            together = []
            for sample in samples:
                with model.cache_context("cond"):
                    together.append(model(**sample)[0])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_training_by_hand_keeps_nothing_of_forwards_that_are_over():
    """Before its first video, and after one that broke, a pipeline does not know the step."""
    pipe = tiny.pipeline("wan", layers=1)
    handle = pipe.enable_sparse_attention("sla", density=0.4, block_size=16)
    sample = tiny.arguments("wan")
    times = torch.randint(0, 1000, (12,), generator=torch.Generator().manual_seed(0))

    def train():
        for time in times:
            pipe.transformer(**{**sample, "timestep": time[None].float()})[0].square().mean().backward()

    def fail(pipe, step, timestep, tensors):
        raise RuntimeError("out of patience")

    train()
    assert len(handle._layers()[0].memories) <= 4
    assert handle.report()["totals"]["sparse_calls"] == len(times)
    with pytest.raises(RuntimeError, match="out of patience"):
        tiny.run(pipe, steps=4, callback_on_step_end=fail)
    train()
    assert len(handle._layers()[0].memories) <= 6


def test_a_validation_in_inference_mode_comes_before_training(name):
    pipe = tiny.pipeline("wan", layers=1)
    pipe.enable_sparse_attention(name, schedule=Schedule(refresh_steps=1), **fields(name))
    sample = tiny.arguments("wan")
    with torch.inference_mode():
        pipe.transformer(**sample)
    pipe.transformer(**{**sample, "timestep": sample["timestep"] * 0.5})[0].square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in pipe.transformer.parameters())
    assert pipe.transformer.patch_embedding.weight.grad.abs().sum() > 0
