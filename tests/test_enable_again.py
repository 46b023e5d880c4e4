"""Enabling again: what is replaced, and what stays when it fails."""

import pytest
import tiny
import torch
from diffusers import WanTransformer3DModel
from torch.nn import Module

import fastdit
from fastdit.pipelines.families.family import Boundary, find_family


class Foreign:
    """Stand for a processor that cannot be intercepted."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return hidden_states


class Bare(Module):
    """Stand for a transformer without ``cache_context`` and what else comes with the base classes of diffusers."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        for name, part in model.named_children():
            setattr(self, name, part)

    def forward(self, **arguments):
        return self.model(**arguments)


Bare.__name__ = WanTransformer3DModel.__name__


def forward(model, kind="wan"):
    with torch.no_grad():
        return model(**tiny.arguments(kind, grid=(2, 4, 6))).sample


def plan_of_another_model():
    from test_plan import plan

    return plan()


FAILURES = {
    "method": ({"method": "unknown"}, ValueError),
    "field": ({"method": "draft", "densitty": 0.5}, TypeError),
    "value": ({"method": "draft", "density": 2.0}, ValueError),
    "layer": ({"method": "radial", "schedule": fastdit.Schedule(dense_layers=(7,))}, ValueError),
    "schedule": ({"method": "radial", "schedule": "none"}, TypeError),
    "kernel": ({"method": "radial", "kernel": "unknown"}, ValueError),
    "kernel of a GPU": ({"method": "radial", "kernel": "fa4"}, RuntimeError),
    "precision": ({"method": "radial", "precision": "int3"}, ValueError),
    "plan": ({"method": plan_of_another_model}, ValueError),
    "file": ({"method": "absent.json"}, Exception),
    "weights": ({"method": "sla", "weights": "absent.safetensors"}, FileNotFoundError),
    "processor": ({"method": "radial"}, RuntimeError),
    "boundary": ({"method": "radial"}, RuntimeError),
}


@pytest.mark.parametrize(
    "before", [tiny.DRAFT, {"method": "sla", "density": 0.3, "block_size": 16}], ids=["draft", "sla"]
)
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_changes_nothing(name, before, monkeypatch):
    options, error = FAILURES[name]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    pipe = tiny.pipeline("wan22")
    handle = pipe.enable_sparse_attention(**before, schedule=tiny.EVERY_STEP)
    models = (pipe.transformer, pipe.transformer_2)
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.add_(0.01)  # as training does; weights of a method are among them
    expected = tiny.run(pipe, steps=1)
    state = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    processors = [block.attn1.processor for model in models for block in model.blocks]
    calls = handle.report()["totals"]["calls"]
    with monkeypatch.context() as patch, pytest.raises(error):
        if name == "processor":  # in the second transformer, after all is well with the first
            patch.setattr(pipe.transformer_2.blocks[1].attn1, "processor", Foreign())
        if name == "boundary":
            patch.setattr(
                find_family(pipe.transformer), "boundary", lambda model: Boundary("patch", "rope", "proj_out")
            )
        pipe.enable_sparse_attention(**options)
    assert pipe.sparse_attention is handle and handle.report()["totals"]["calls"] == calls
    assert [block.attn1.processor for model in models for block in model.blocks] == processors
    for model, weights in zip(models, state, strict=True):
        found = model.state_dict()
        assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
    assert torch.equal(tiny.run(pipe, steps=1), expected)
    assert handle.report()["totals"]["sparse_calls"] == handle.report()["totals"]["calls"] > calls


def test_a_class_without_cache_context():
    model = Bare(tiny.transformer("wan"))
    assert not hasattr(model, "cache_context")
    stock, before = forward(model), dict(model.__dict__)
    for method in (tiny.DRAFT, {"method": "dense"}, tiny.DRAFT):
        handle = fastdit.enable_sparse_attention(model, **method)
        forward(model)
    assert handle.report()["totals"]["sparse_calls"] == 2
    fastdit.disable_sparse_attention(model)
    assert torch.equal(forward(model), stock) and model.__dict__.keys() == before.keys()
    fastdit.disable_sparse_attention(model)
    with fastdit.sparse_attention(model, **tiny.DRAFT):
        pass
    assert model.__dict__.keys() == before.keys()
