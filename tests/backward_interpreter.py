"""The backward kernels, run by Triton's interpreter. Run by test_interpreter.py with TRITON_INTERPRET=1."""

import pytest
import torch
from backward_cases import check_gradients
from kernel_cases import CASES, Case

from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.kernels.options import Options
from fastdit.attention.kernels.triton.backward import block_sparse_bwd
from fastdit.attention.kernels.triton.tiles import BackwardConfig, Config

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
RUNS = [(CASES[i], FP32) for i in (1, 2, 6, 7, 9)] + [(CASES[i], BF16) for i in (3, 4, 11)] + [(CASES[12], FP16)]
COMPENSATED = [(CASES[3], FP32), (CASES[9], FP32), (CASES[6], BF16)]
# Batch and heads of masks and lengths that differ, on the smallest problem that has all of them.
BROADCAST = Case(heads=(2, 2), mask_heads=(1, 2), tokens=(40, 48), blocks=(32, 16), head_dim=32, padded=True)
RUNS.append((BROADCAST, BF16))
COMPENSATED.append((BROADCAST, FP32))


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_agrees_with_fp64(case, dtype, poisoned_empty):
    check_gradients(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), COMPENSATED, ids=str)
def test_compensation_agrees_with_fp64(case, dtype, poisoned_empty):
    check_gradients(case, dtype, compensate="mean")


@pytest.mark.parametrize(("scale", "compensate"), [(-0.2, None), (0.0, None), (1.5, None), (-0.2, "mean")])
def test_any_scale(scale, compensate):
    check_gradients(Case(heads=(1, 1), tokens=(40, 70)), torch.float32, scale=scale, compensate=compensate)


def test_any_memory_order():
    case = Case(heads=(2, 2), tokens=(40, 40))
    mask, tensors = case.mask(), case.tensors(torch.float32)
    grad = torch.randn_like(tensors[0])
    expected = gradients(tensors, grad, mask)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    actual = gradients(tokens_first, grad.transpose(2, 3).contiguous().transpose(2, 3), mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    summed = [x.clone().requires_grad_() for x in tensors]
    block_sparse_attention(*summed, mask, kernel="triton")[0].sum().backward()
    expected = gradients(tensors, torch.ones_like(grad), mask)
    torch.testing.assert_close([x.grad for x in summed], list(expected), rtol=0, atol=0)


def gradients(tensors, grad, mask):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = block_sparse_attention(*tensors, mask, kernel="triton")[0]
    return torch.autograd.grad(out, tensors, grad)


@pytest.mark.parametrize(
    ("dq", "dkdv", "compensate"),
    [((16, 16), (64, 16), None), ((16, 64), (16, 128), None), ((32, 128), (16, 64), "mean")],
    ids=str,
)
def test_blocks_larger_than_tiles(dq, dkdv, compensate, poisoned_empty):
    case = Case(heads=(2, 1), tokens=(66, 250), blocks=(64, 128), padded=True)
    mask, options = case.mask(), Options(0.1, compensate)
    tensors = [x.requires_grad_() for x in case.tensors(torch.float32)]
    results = block_sparse_attention(*tensors, mask, scale=0.1, kernel="reference", compensate=compensate)
    grad = torch.randn_like(tensors[0])
    expected = torch.autograd.grad(results[0], tensors, grad)
    tensors, results = tuple(x.detach() for x in tensors), tuple(x.detach() for x in results)
    config = BackwardConfig(*(Config(*tiles, 4, 2) for tiles in (dq, dkdv, dkdv)))
    actual = block_sparse_bwd(tensors, results, grad, mask, options, config)
    torch.testing.assert_close(actual, expected)


def test_keys_that_no_query_attends_to():
    case = Case(heads=(1, 1), tokens=(64, 128))
    mask = case.mask()
    mask.indices[:] = torch.tensor([0, 3])
    dq, dk, dv = gradients(case.tensors(torch.float32), torch.randn(1, 1, 64, 64), mask)
    for x in (dk, dv):
        assert (x[:, :, 32:96] == 0).all() and (x[:, :, :32] != 0).any() and (x[:, :, 96:] != 0).any()
    assert dq.isfinite().all()


def test_no_second_derivative():
    case = Case(heads=(1, 1), tokens=(32, 32))
    q, k, v = (x.requires_grad_() for x in case.tensors(torch.float32))
    out = block_sparse_attention(q, k, v, case.mask(), kernel="triton")[0]
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
