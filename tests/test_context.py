"""Steps, guidance passes and videos are told apart, whoever knows about them."""

import contextlib
import copy
import gc
from dataclasses import dataclass
from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F

import fastdit
from fastdit.pipelines.interception.installation import installed
from fastdit.pipelines.run_tracker import MAX_PARTS, MAX_PASSES, PassContext, Run

CFG = ("cond", "uncond")


def first_layer(recorder):
    return [(call.step, call.branch) for call in recorder.calls if call.layer == 0]


def hide_cache_context(pipe):
    """Let fastdit see what it sees of a pipeline that never calls ``cache_context``."""
    del pipe.transformer.__dict__["cache_context"]


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("name", "guidance", "branches"),
    [
        ("wan", 5.0, CFG),
        ("wan", 1.0, ("cond",)),
        ("wan_i2v", 5.0, CFG),
        ("vace", 5.0, CFG),
        ("cogvideox", 5.0, ("cond_uncond",)),
        ("hunyuan_video", 5.0, ("cond",)),
        ("mochi", 1.0, ("cond_uncond",)),
        ("ltx", 5.0, ("cond_uncond",)),
    ],
)
def test_steps_and_branches(name, guidance, branches, hidden):
    pipe = tiny.pipeline(name, layers=2 if name in ("vace", "hunyuan_video") else 1)
    recorder = tiny.Recorder()
    pipe.enable_sparse_attention(recorder, schedule=tiny.EVERY_STEP)
    if hidden:
        hide_cache_context(pipe)
        branches = branches if branches == CFG else ("cond",)
    for steps in (3, 2, 2) if name == "mochi" else (3, 1, 1):
        recorder.calls.clear()
        tiny.run(pipe, steps=steps, guidance=guidance, size=(9, 32, 32) if name == "ltx" else (9, 64, 64))
        assert first_layer(recorder) == [(step, branch) for step in range(steps) for branch in branches]
        assert {call.num_steps for call in recorder.calls} == {steps}


def test_second_order_scheduler_counts_every_model_evaluation():
    for hidden in (False, True):
        pipe = tiny.pipeline("wan", layers=1, scheduler=diffusers.FlowMatchHeunDiscreteScheduler())
        recorder = tiny.Recorder()
        pipe.enable_sparse_attention(recorder, schedule=tiny.EVERY_STEP)
        if hidden:
            hide_cache_context(pipe)
        tiny.run(pipe, steps=3)
        assert first_layer(recorder) == [(step, branch) for step in range(5) for branch in CFG]
        assert {call.num_steps for call in recorder.calls} == {5}


def test_multistep_scheduler():
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = tiny.pipeline("wan", layers=1, scheduler=scheduler)
    recorder = tiny.Recorder()
    pipe.enable_sparse_attention(recorder, schedule=tiny.EVERY_STEP)
    hide_cache_context(pipe)
    tiny.run(pipe, steps=4, guidance=1.0)
    assert first_layer(recorder) == [(step, "cond") for step in range(4)]


def test_patterns_are_refreshed_as_scheduled_and_anew_for_each_video():
    pipe = tiny.pipeline("wan", layers=1)
    recorder = tiny.Recorder()
    schedule = fastdit.Schedule(warmup_steps=1, refresh_steps=2)
    pipe.enable_sparse_attention(recorder, schedule=schedule)
    for _ in range(2):
        tiny.run(pipe, steps=5)
    refreshed = [(call.step, new) for call, new in zip(recorder.calls, recorder.refreshes, strict=True)]
    one_video = [(step, step in (1, 3)) for step in (1, 2, 3, 4) for _ in CFG]
    assert refreshed == 2 * one_video


@dataclass(frozen=True, kw_only=True, eq=False)
class Counting(fastdit.AttentionMethod):
    """Count calls in the method's own memory."""

    name = "counting"
    seen: tuple = (set(), [])

    def pattern(self, q, k, call, state):
        raise NotImplementedError

    def forward(self, q, k, v, call, state):
        state.memory["calls"] = state.memory.get("calls", 0) + 1
        self.seen[0].add(id(state))
        self.seen[1].append(state.memory["calls"])
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("hidden", [False, True])
def test_memory_lasts_one_video(hidden):
    pipe = tiny.pipeline("wan", layers=1)
    method = Counting(seen=(set(), []))
    handle = pipe.enable_sparse_attention(method, schedule=tiny.EVERY_STEP)
    if hidden:
        hide_cache_context(pipe)
    for _ in range(3):
        tiny.run(pipe, steps=2)
    assert method.seen[1] == [1, 1, 2, 2] * 3
    assert len(method.seen[0]) == 2
    handle.reset()
    tiny.run(pipe, steps=1)
    assert method.seen[1][-2:] == [1, 1]


def test_memory_does_not_outlive_a_change_of_batch():
    pipe = tiny.pipeline("cogvideox", layers=1)
    method = Counting(seen=(set(), []))
    fastdit.enable_sparse_attention(pipe.transformer, method)
    model = pipe.transformer
    for batch, timestep in ((2, 900), (2, 700), (1, 500), (1, 300)):
        arguments = tiny.arguments("cogvideox", batch=batch) | {"timestep": torch.full((batch,), float(timestep))}
        with torch.no_grad(), model.cache_context("cond_uncond"):
            model(**arguments)
    assert method.seen[1] == [1, 2, 1, 2]


def test_guidance_that_ends_in_mid_run_keeps_the_draft_usable():
    model = tiny.transformer("cogvideox")
    fastdit.enable_sparse_attention(model, **tiny.DRAFT, schedule=fastdit.Schedule(refresh_steps=100))
    for batch, timestep in ((2, 900), (2, 700), (1, 500)):
        arguments = tiny.arguments("cogvideox", batch=batch) | {"timestep": torch.full((batch,), float(timestep))}
        with torch.no_grad():
            out = model(**arguments).sample
    with fastdit.sparse_attention(model, **tiny.DRAFT), torch.no_grad():
        torch.testing.assert_close(model(**arguments).sample, out)


def test_error_in_mid_run_leaves_no_trace():
    pipe = tiny.pipeline("wan", layers=1)
    with fastdit.sparse_attention(pipe, **tiny.DRAFT, schedule=tiny.EVERY_STEP):
        expected = tiny.run(pipe)
    recorder = tiny.Recorder()

    def fail(pipe, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    for hidden in (False, True):
        pipe.enable_sparse_attention(recorder, schedule=tiny.EVERY_STEP)
        if hidden:
            hide_cache_context(pipe)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(pipe, callback_on_step_end=fail)
        recorder.calls.clear()
        tiny.run(pipe)
        assert first_layer(recorder) == [(step, branch) for step in range(3) for branch in CFG]
    pipe.enable_sparse_attention(**tiny.DRAFT, schedule=tiny.EVERY_STEP)
    attention = pipe.transformer.blocks[0].attn1
    stock, attention.norm_q.forward = attention.norm_q.forward, None
    with pytest.raises(TypeError):
        tiny.run(pipe)
    attention.norm_q.forward = stock
    assert torch.equal(tiny.run(pipe), expected)


def test_another_pipeline_with_the_same_transformer():
    pipe = tiny.pipeline("wan", layers=1)
    other = diffusers.WanPipeline(**pipe.components | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()})
    other.set_progress_bar_config(disable=True)
    recorder = tiny.Recorder()
    handle = pipe.enable_sparse_attention(recorder, schedule=tiny.EVERY_STEP)
    assert other.sparse_attention is handle
    hide_cache_context(pipe)
    tiny.run(pipe, steps=2, guidance=1.0)
    recorder.calls.clear()
    tiny.run(other, steps=3, guidance=1.0)
    assert [call.step for call in recorder.calls] == [0, 1, 2]
    assert {call.num_steps for call in recorder.calls} == {3}


def follow(run, timesteps, said=None):
    seen = []
    for timestep in timesteps:
        position = run.begin(timestep, said)
        seen.append((position.video, position.step, position.branch))
    return seen


def test_bare_transformer_follows_the_timestep():
    run = Run()
    tensor = torch.tensor([500.0, 500.0])
    assert follow(run, [1000, 1000, 750.0, 750.0, tensor, tensor]) == [
        (0, step, branch) for step in range(3) for branch in CFG
    ]
    assert follow(run, [1000, 750]) == [(1, 0, "cond"), (1, 1, "cond")]
    assert run.begin(500).num_steps is None


def test_timesteps_may_rise():
    assert follow(Run(), [0, 250, 500, 0, 250]) == [
        (0, 0, "cond"),
        (0, 1, "cond"),
        (0, 2, "cond"),
        (1, 0, "cond"),
        (1, 1, "cond"),
    ]


@pytest.mark.parametrize("frames", [[(0.0, 900.0, 900.0), (0.0, 600.0, 600.0)], [(900.0, 900.0), (600.0, 900.0)]])
def test_timesteps_per_frame_move_when_any_of_them_does(frames):
    """A known first frame stays at 0, and in diffusion forcing later frames wait for earlier ones."""
    timesteps = [torch.tensor([frames[i]]) for i in (0, 0, 1)]
    assert [step for _, step, _ in follow(Run(), timesteps)] == [0, 0, 1]


@pytest.mark.parametrize("said", [None, PassContext("cond")])
def test_constant_timesteps_do_not_pile_up_passes(said):
    run = Run()
    positions = [run.begin(1000, said) for _ in range(50)]
    assert {position.step for position in positions} == {0}
    assert max(position.turn for position in positions) < MAX_PASSES
    assert {position.branch for position in positions} <= {"cond", "uncond", "pass 2", "pass 3"}
    assert positions[-1].video == 49 // MAX_PASSES


def test_many_parts_of_a_batch_keep_their_step():
    steps = [step for _, step, _ in follow(Run(), [t for t in (900, 600, 300) for _ in range(10)])]
    assert steps == [0] * 10 + [1] * 10 + [2] * 10


def test_no_timestep_at_all():
    assert follow(Run(), [None, None])[0] == (0, 0, "cond")


def test_a_pipeline_that_skips_the_first_timesteps():
    timesteps = torch.linspace(1000, 100, 10)
    scheduler, run, seen = SimpleNamespace(timesteps=timesteps, step_index=None), Run(), []
    for index, value in ((None, 3), (4, 4), (5, 5), (6, 6)):
        scheduler.step_index = index
        position = run.begin(timesteps[value].clone(), scheduler=scheduler, num_steps=7)
        seen.append((position.step, position.num_steps))
    assert seen == [(0, 7), (1, 7), (2, 7), (3, 7)]


def test_an_entry_of_the_list_of_timesteps_says_its_index_without_a_look_at_values():
    timesteps = torch.linspace(1000, 100, 10)
    scheduler, run = SimpleNamespace(timesteps=timesteps), Run()
    for index, timestep in enumerate(timesteps[3:]):
        position = run.begin(timestep.expand(2), scheduler=scheduler, num_steps=7)
        assert (position.step, position.num_steps) == (index, 7)


def test_a_scheduler_whose_copies_are_stepped_in_its_place():
    """Diffusion forcing has a scheduler for each frame, and the pipeline's own never leaves its first step."""
    scheduler, run, seen = SimpleNamespace(timesteps=torch.linspace(1000, 100, 4), step_index=None), Run(), []
    for value in (900, 900, 600, 600, 300, 300):
        position = run.begin(torch.full((1, 3), float(value)), scheduler=scheduler)
        seen.append((position.step, position.branch, position.turn, position.num_steps))
    assert seen == [(step, branch, 0, 4) for step in range(3) for branch in CFG]
    scheduler.timesteps = scheduler.timesteps.clone()
    assert run.begin(900.0, scheduler=scheduler).step == 0


def test_passes_of_a_pipeline_are_bounded_where_no_list_of_timesteps_is_new():
    scheduler, run = SimpleNamespace(timesteps=torch.tensor([1000.0]), step_index=None), Run()
    turns = {run.begin(scheduler.timesteps[0], PassContext("cond"), scheduler).turn for _ in range(3 * MAX_PARTS)}
    assert turns == set(range(MAX_PARTS))


def loop(pipe, steps):
    """A loop of the user's own with the scheduler of the pipeline; the number of steps is not the pipeline's."""
    pipe.scheduler.set_timesteps(steps)
    arguments = tiny.arguments("wan")
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            out = pipe.transformer(**arguments | {"timestep": timestep.expand(1)}).sample
            pipe.scheduler.step(out, timestep, arguments["hidden_states"])


def test_a_loop_with_the_scheduler_of_the_pipeline_knows_its_steps():
    pipe = tiny.pipeline("wan", layers=1)
    recorder = tiny.Recorder()
    pipe.enable_sparse_attention(recorder, schedule=fastdit.Schedule(warmup_steps=0.25))
    tiny.run(pipe, steps=3)
    recorder.calls.clear()
    for _ in range(2):
        loop(pipe, 8)
    assert [(call.step, call.num_steps) for call in recorder.calls] == 2 * [(step, 8) for step in range(2, 8)]


def view(pipe):
    """Another pipeline over the same parts, with a scheduler of its own, as servers make one for each request."""
    other = type(pipe)(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    return other


def interrupted(pipe, step, timestep, tensors):
    if step == 1:
        raise InterruptedError
    return tensors


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("kind", tiny.PIPELINES)
def test_every_pipeline_has_the_steps_of_its_own_run(kind, hidden):
    """Whatever an earlier run, of this pipeline or another over the same transformer, left behind."""
    pipe = tiny.pipeline(kind)
    recorder = tiny.Recorder()
    pipe.enable_sparse_attention(recorder, schedule=fastdit.Schedule(warmup_steps=0.25))
    if hidden:
        hide_cache_context(pipe)
    other = view(pipe)
    runs = ((pipe, 3, False), (other, 5, False), (pipe, 6, True), (other, 2, True), (pipe, 4, False), (other, 5, False))
    for caller, steps, breaks in runs:
        recorder.calls.clear()
        if breaks:
            with pytest.raises(InterruptedError):
                tiny.run(caller, steps=steps, callback_on_step_end=interrupted)
        else:
            tiny.run(caller, steps=steps)
        warmup = -(-steps // 4)
        found = sorted({call.step for call in recorder.calls})
        assert found == list(range(warmup, 2 if breaks else steps)), (caller is pipe, steps)
        assert {call.num_steps for call in recorder.calls} <= {steps}


def test_pipelines_that_are_gone_leave_nothing():
    pipe = tiny.pipeline("wan", layers=1)
    pipe.enable_sparse_attention(**tiny.DRAFT, schedule=tiny.EVERY_STEP)
    runtime, kept = installed(pipe.transformer).runtime, []
    for _ in range(4):
        for options in ({}, {"callback_on_step_end": interrupted}):
            with contextlib.suppress(InterruptedError):
                tiny.run(view(pipe), steps=3, **options)
        gc.collect()
        kept.append((sum(len(layer.memories) for layer in runtime.layers), len(runtime.cache.entries)))
    assert kept[1:] == kept[:-1]
