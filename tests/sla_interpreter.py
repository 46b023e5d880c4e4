"""The kernels of linear attention, run by Triton's interpreter. Run by test_interpreter.py with TRITON_INTERPRET=1."""

from dataclasses import replace

import pytest
import torch
from sla_cases import BF16, CASES, JOINED, SlaCase, check_joined, check_linear, problem, with_gradients

from fastdit.attention import MethodState, get_method
from fastdit.attention.kernels.triton.linear import linear as triton_sla
from fastdit.attention.methods.sla import sla
from fastdit.attention.methods.sla.linear import choose_linear, join_linear_attention, linear_attention
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Small problems are cut into several tiles, and take no time for states that are not there."""

    def small(v, choose=triton_sla.choose_sla):
        return replace(choose(v), rows=16, step=16)

    monkeypatch.setattr(triton_sla, "choose_sla", small)
    monkeypatch.setattr(triton_sla, "_AT_ONCE", 16)


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_agrees_with_fp64(case, dtype, poisoned_empty):
    check_linear(case, dtype)


@pytest.mark.parametrize(("case", "dtype", "kind"), JOINED, ids=str)
def test_the_join_agrees_with_fp64(case, dtype, kind, poisoned_empty):
    check_joined(case, dtype, kind)


@pytest.mark.parametrize("kind", ["projected", "mixed"])
def test_the_join_is_a_registered_operator(kind):
    case = SlaCase(tokens=20)
    blocks, lengths, exact, join = problem(case, BF16, kind)
    tensors = case.tensors(BF16)[:3]
    arguments = exact, *join, *tensors, blocks, lengths, case.block, case.features
    assert set(torch.library.opcheck(join_linear_attention, arguments).values()) == {"SUCCESS"}


def run(case, *tensors, grad):
    torch.manual_seed(1)
    blocks, lengths = case.blocks(), case.lengths()
    return with_gradients(
        lambda *x: linear_attention(*x, blocks, lengths, case.block, case.features, "triton"), grad, *tensors
    )


def test_any_memory_order_and_a_few_heads_at_a_time(monkeypatch, poisoned_empty):
    case = SlaCase(tokens=17, padded=True)
    *tensors, grad = case.tensors(BF16)
    expected = run(case, *tensors, grad=grad)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    tensors[2] = tensors[2].transpose(2, 3).contiguous().transpose(2, 3)
    monkeypatch.setattr(triton_sla, "STATE_BYTES", 1)
    torch.testing.assert_close(run(case, *tensors, grad=grad), expected, rtol=0, atol=0)
    ones = run(case, *tensors, grad=torch.ones_like(grad))
    torch.testing.assert_close(run(case, *tensors, grad=torch.ones(()).expand_as(grad)), ones, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_sums_do_not_get_worse_with_length(dtype, error):
    """Of values far from 0, over hundreds of keys: a sum in bf16 would be off by several of its units."""
    q, k = torch.rand(2, 1, 1, 512, 16).to(dtype)
    v = (torch.randn(1, 1, 512, 16) + 3).to(dtype)
    lengths = torch.full((1, 1, 32), 16, dtype=torch.int32)
    blocks = torch.rand(1, 1, 32, 32) < 0.9
    out = linear_attention(q, k, v, blocks, lengths, 16, "given", "triton")
    weight = (q.double() @ k.double().mT) * blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)
    wanted = weight @ v.double() / weight.sum(-1, keepdim=True)
    assert ((out - wanted) / wanted).abs().max() <= error


METHODS = [
    {"variant": "paper", "negligible": 0.25},
    {"variant": "sla1", "feature_map": "elu"},
    {"variant": "full", "feature_map": "relu"},
    {"variant": "sla2", "feature_map": "hedgehog"},
]


@pytest.mark.parametrize("fields", METHODS, ids=str)
def test_the_method_runs_in_triton_as_it_does_without(fields, monkeypatch):
    method = get_method("sla", block_size=16, density=0.3, **fields)
    weights = method.make_weights(2, 16)
    for parameter in weights.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    spec = TokenSpec(VideoGrid(2, 3, 5), 5)
    q, k, v, grad = torch.randn(4, 1, 2, spec.num_tokens, 16).unbind()
    fused = []
    monkeypatch.setattr(sla, "join_linear_attention", lambda *x: fused.append(join_linear_attention(*x)) or fused[-1])
    assert choose_linear(q, v, 16) == "triton" and choose_linear(q, v, 16, "cpu") == "eager"
    results = []
    for kernel in ("triton", "cpu"):
        state = MethodState(weights=weights, kernel=kernel)
        results.append(with_gradients(lambda *x, s=state: method.forward(*x, AttentionCall(spec), s), grad, q, k, v))
    assert not fused
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        out = method.forward(q, k, v, AttentionCall(spec), MethodState(weights=weights, kernel="triton"))
    assert len(fused) == 1
    torch.testing.assert_close(out, results[1][0], rtol=1e-4, atol=1e-5)
