"""Calls can be observed in a run that is not changed by it, or ended, or given another output."""

import pytest
import tiny
import torch

import fastdit
from fastdit.pipelines.observe import observe
from fastdit.search.sampling import SampledSteps, Sampling


@pytest.mark.parametrize("kind", tiny.PIPELINES)
def test_a_run_is_not_changed(kind):
    pipe, calls = tiny.pipeline(kind), []
    expected = tiny.run(pipe, steps=2)
    with observe(pipe, calls.append):
        assert torch.equal(tiny.run(pipe, steps=2), expected)
    assert {(seen.call.step, seen.call.layer) for seen in calls} >= {
        (step, layer) for step in (0, 1) for layer in (0, 1)
    }
    assert all(seen.q.shape == seen.k.shape == seen.v.shape == seen.out.shape for seen in calls)
    assert pipe.sparse_attention is None and torch.equal(tiny.run(pipe, steps=2), expected)


def test_the_schedule_says_which_calls_are_observed_and_every_run_shows_the_same():
    pipe = tiny.pipeline("wan22")
    expected = tiny.run(pipe, steps=3)
    runs = []
    for _ in range(2):
        calls = []
        with observe(pipe, calls.append, schedule=SampledSteps(sampling=Sampling(steps=(0, 2)))):
            assert torch.equal(tiny.run(pipe, steps=3), expected)
        runs.append(calls)
    assert [(seen.title, seen.call.step, seen.call.branch, seen.call.layer) for seen in runs[0]] == [
        (title, step, branch, layer)
        for title, step in (("transformer", 0), ("transformer_2", 2))
        for branch in ("cond", "uncond")
        for layer in (0, 1)
    ]
    assert all(torch.equal(a.q, b.q) for a, b in zip(*runs, strict=True))


def test_an_exception_ends_the_run():
    pipe, calls = tiny.pipeline("wan"), []

    def stop(seen):
        calls.append(seen.call)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), observe(pipe, stop):
        tiny.run(pipe)
    assert len(calls) == 1 and pipe.sparse_attention is None


def test_the_callback_may_give_another_output():
    pipe = tiny.pipeline("wan")
    dense = tiny.run(pipe, steps=1)
    with fastdit.sparse_attention(pipe, "skip", schedule=fastdit.Schedule(dense_layers=(0,))):
        expected = tiny.run(pipe, steps=1)
    with observe(pipe, lambda seen: torch.zeros_like(seen.v) if seen.call.layer == 1 else None):
        got = tiny.run(pipe, steps=1)
    assert torch.equal(got, expected) and not torch.equal(got, dense)


def test_sparse_attention_is_not_observed():
    pipe = tiny.pipeline("wan")
    handle = fastdit.enable_sparse_attention(pipe, "radial")
    with pytest.raises(ValueError, match="enabled on this pipeline"), observe(pipe, print):
        pass
    assert pipe.sparse_attention is handle
