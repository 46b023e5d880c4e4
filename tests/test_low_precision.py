"""A model that is to run in low precision runs on where that is impossible or no faster, and says so."""

import pytest
import tiny
import torch
from test_table import ROW, qkv, table
from torch._dynamo.testing import CompileCounter

import fastdit
from fastdit.attention import MethodState, get_method
from fastdit.attention.kernels import dispatch as kernels
from fastdit.attention.kernels import low_precision_reason
from fastdit.attention.kernels.options import Options
from fastdit.attention.kernels.triton import kernel as triton_attention
from fastdit.mask import BlockMask
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

ON_CPU = "it computes in the precision of its inputs; int8 is not faster on a CPU"


def forward(model, times=1):
    with torch.no_grad():
        return [model(**tiny.arguments("wan")).sample for _ in range(times)][-1]


def test_model_runs_on_in_its_own_precision_and_says_so():
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    expected = forward(model)
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT, precision="int8")
    with pytest.warns(UserWarning, match="products are not in int8, because " + ON_CPU) as caught:
        out = forward(model, times=3)
    assert len(caught) == 1
    assert torch.equal(out, expected)
    report = handle.report()
    assert report["totals"]["precision_fallbacks"] == {ON_CPU: 6} and not report["totals"]["fallbacks"]
    assert all(layer["precision_fallbacks"] == {ON_CPU: 3} for layer in report["layers"])
    assert f"Not in int8: 6 sparse calls, because {ON_CPU}." in " ".join(handle.summary().split())
    handle.reset()
    assert "Not in int8" not in handle.summary()


def test_low_precision_that_runs_is_no_fallback(recwarn):
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **tiny.DRAFT, kernel="reference")
    exact = forward(model)
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT, kernel="reference", precision="int8")
    assert not torch.equal(forward(model), exact)
    assert not handle.report()["totals"]["precision_fallbacks"] and "Not in int8" not in handle.summary()
    assert not [w for w in recwarn if "int8" in str(w.message)]


def test_training_runs_on_in_the_precision_of_the_model():
    model = tiny.transformer("wan", layers=1)
    gradients = []
    for precision in (None, "int8"):
        handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT, kernel="reference", precision=precision)
        model.zero_grad()
        if precision is None:
            model(**tiny.arguments("wan")).sample.sum().backward()
        else:
            with pytest.warns(UserWarning, match="products are not in int8, because precision='int8' has no backward"):
                model(**tiny.arguments("wan")).sample.sum().backward()
        gradients.append(model.blocks[0].attn1.to_q.weight.grad.clone())
    assert torch.equal(*gradients)
    assert sum(handle.report()["totals"]["precision_fallbacks"].values()) == 1


def test_compiled_model_runs_on_in_one_graph():
    torch._dynamo.reset()
    model = tiny.transformer("wan")
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT, precision="int8")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with pytest.warns(UserWarning, match="products are not in int8"):
        first = forward(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(forward(compiled), first)
    assert counter.frame_count == 1
    assert handle.report()["totals"]["precision_fallbacks"] == {ON_CPU: 4}
    torch._dynamo.reset()


def test_every_launch_of_a_table_is_asked():
    spec = TokenSpec(VideoGrid(3, 9, 11))
    q, k, v = qkv(spec)
    excuses = []
    expected = table(ROW).forward(q, k, v, AttentionCall(spec), MethodState())
    out = table(ROW).forward(q, k, v, AttentionCall(spec), MethodState(precision="int8", excuse=excuses.append))
    assert torch.equal(out, expected)
    assert len(excuses) > 1 and set(excuses) == {ON_CPU}


def test_search_of_adaspa_runs_on():
    spec = TokenSpec(VideoGrid(2, 8, 8))
    q, k, v = (torch.randn(1, 2, 128, 16) for _ in range(3))
    excuses = []
    state = MethodState(precision="int8", excuse=excuses.append)
    out = get_method("adaspa").forward(q, k, v, AttentionCall(spec), state)
    assert torch.equal(out, get_method("adaspa").forward(q, k, v, AttentionCall(spec), MethodState()))
    assert excuses == [ON_CPU]


def test_without_a_handle_there_are_no_excuses():
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    with pytest.raises(RuntimeError, match="no kernel can run"):
        fastdit.sparse_attention_call(q, k, v, grid=(1, 8, 8), method="draft", precision="int8")


@pytest.mark.parametrize(
    ("capability", "head_dim", "gains"),
    [
        ((9, 0), 64, False),
        ((9, 0), 72, True),
        ((8, 0), 32, False),
        ((8, 0), 64, True),
        ((8, 9), 16, True),
        ((12, 0), 64, True),
    ],
)
def test_where_low_precision_gains(monkeypatch, capability, head_dim, gains):
    monkeypatch.setattr(triton_attention, "_capability", lambda x: capability)
    q = torch.zeros(1, 1, 16, head_dim)
    reason = triton_attention.no_gain(q, Options(1.0, precision="int8"))
    assert (reason is None) == gains
    assert triton_attention.no_gain(q, Options(1.0)) is None
    if not gains:
        assert f"the head dim is {head_dim}" in reason and ".".join(map(str, capability)) in reason


def test_the_first_kernel_that_can_decides(monkeypatch):
    q = torch.randn(1, 1, 64, 16)
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), block_q=32, block_k=32)
    assert low_precision_reason(q, q, q, mask, precision="int8") == ON_CPU
    assert low_precision_reason(q, q, q, mask, "reference", precision="int8") is None
    with pytest.raises(RuntimeError, match="kernel 'triton' cannot run"):
        low_precision_reason(q, q, q, mask, "triton", precision="int8")
    monkeypatch.setattr(kernels, "_AUTOMATIC", ("cpu", "reference"))
    assert low_precision_reason(q, q, q, mask, precision="int8") is None
    monkeypatch.setattr(kernels._module("reference"), "no_gain", lambda q, options: "it is slow", raising=False)
    assert low_precision_reason(q, q, q, mask, precision="int8") == "it is slow"
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        low_precision_reason(q, q, q, mask, precision="int4")
