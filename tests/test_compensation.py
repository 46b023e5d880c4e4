"""Blocks that are not listed stand in as one key each: the mean of their real keys, as heavy as they are many."""

import pytest
import torch
from kernel_cases import CASES, Case, check_against_reference, means_by_hand, naive

from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.kernels.means import block_means
from fastdit.mask import BlockMask

KERNELS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case, dtype, kernel, poisoned_empty):
    check_against_reference(case, dtype, kernel, compensate="mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_are_of_real_tokens(dtype):
    case = Case(heads=(2, 2), mask_heads=(1, 2), tokens=(90, 150), padded=True)
    mask = case.mask()
    x = case.tensors(dtype)[1]
    real = (torch.arange(32) < mask.lengths_k[..., None]).flatten(2)[..., :150, None]
    means = block_means(x.where(real, torch.nan), mask)
    assert means.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(means, means_by_hand(x.double(), mask).to(means.dtype))


@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_of_equal_keys_lose_nothing(kernel):
    q, k, v = torch.randn(2, 2, 100, 32), torch.randn(2, 2, 7, 32), torch.randn(2, 2, 7, 32)
    k, v = (x.repeat_interleave(16, 2)[:, :, :105] for x in (k, v))
    mask = BlockMask.from_dense(torch.rand(7, 7) < 0.3, block_q=16, block_k=16, tokens_q=100, tokens_k=105)
    out, _ = block_sparse_attention(q, k, v, mask, kernel=kernel, compensate="mean")
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    plain, _ = block_sparse_attention(q, k, v, mask, kernel=kernel)
    assert (plain - out).abs().max() > 0.1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [-0.2, 1.5])
def test_any_scale_and_memory_order(kernel, scale):
    case = Case(heads=(2, 3), tokens=(90, 70))
    mask = case.mask()
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors(torch.float32))
    out, _ = block_sparse_attention(q, k, v, mask, scale=scale, kernel=kernel, compensate="mean")
    torch.testing.assert_close(out, naive(q, k, v, mask, scale, "mean")[0], atol=3e-5, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", ["some", "empty", "all"])
def test_gradcheck(kernel, rows):
    case = Case(heads=(2, 1), tokens=(10, 9), blocks=(4, 4), head_dim=3, rows=rows, padded=True)
    mask = case.mask()
    tensors = [x.requires_grad_() for x in case.tensors(torch.float64)]
    outputs = slice(0, 1 if kernel == "cpu" else 2)

    def attention(*x):
        return block_sparse_attention(*x, mask, kernel=kernel, compensate="mean")[outputs]

    assert torch.autograd.gradcheck(attention, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[8]], ids=str)
def test_cpu_gradients(case, dtype):
    mask = case.mask()
    tensors = [x.requires_grad_() for x in case.tensors(dtype)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weights = torch.randn(*case.heads, case.tokens[0], case.head_dim)
    (block_sparse_attention(*tensors, mask, kernel="cpu", compensate="mean")[0] * weights).sum().backward()
    (naive(*exact, mask, compensate="mean")[0] * weights).sum().backward()
    for x, y in zip(tensors, exact, strict=True):
        assert x.grad.dtype == dtype
        assert (x.grad - y.grad).abs().max() <= (0.03 if dtype == torch.bfloat16 else 1e-5) * y.grad.abs().max()


def test_cpu_runs_in_chunks(monkeypatch):
    from fastdit.attention.kernels.cpu import kernel as cpu

    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)
    check_against_reference(Case(heads=(2, 1), tokens=(250, 200), padded=True), torch.float32, "cpu", compensate="mean")


def test_cpu_never_holds_all_scores():
    """Neither way holds as much as one score for every pair of tokens, or for every query and block, of all heads."""
    case = Case(heads=(1, 4), tokens=(2048, 2048), blocks=(16, 16), head_dim=16)
    mask, tensors = case.mask(), [x.requires_grad_() for x in case.tensors(torch.float32)]
    with Largest() as largest:
        block_sparse_attention(*tensors, mask, kernel="cpu", compensate="mean")[0].sum().backward()
    assert largest.numel < 2048 * 128 * 4


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_long_rows_of_means_with_gaps():
    """More means than the kernel under it handles at once, the first or the last of which are listed."""
    blocks = torch.zeros(3, 1300, dtype=torch.bool)
    blocks[0, :700], blocks[1, 700:], blocks[2] = True, True, True
    mask = BlockMask.from_dense(blocks, block_q=4, block_k=2)
    q, k, v = torch.randn(1, 1, 12, 16), torch.randn(1, 1, 2600, 16), torch.randn(1, 1, 2600, 16)
    out, lse = block_sparse_attention(q, k, v, mask, kernel="cpu", compensate="mean")
    expected, expected_lse = naive(q.double(), k.double(), v.double(), mask, compensate="mean")
    torch.testing.assert_close(out, expected.float())
    torch.testing.assert_close(lse, expected_lse.float())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sample_without_keys(kernel):
    case = Case(heads=(2, 1))
    mask = case.mask()
    mask = mask.with_lengths_k(torch.stack([torch.zeros(1, 4), mask.lengths_k[0]]))
    tensors = [x.requires_grad_() for x in case.tensors(torch.float32)]
    out, lse = block_sparse_attention(*tensors, mask, kernel=kernel, compensate="mean")
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all()
    for x, grad in zip(tensors, torch.autograd.grad(out.square().sum(), tensors), strict=True):
        assert grad.shape == x.shape and (grad[0] == 0).all() and grad[1].isfinite().all() and grad[1].any()


def test_unknown_compensation():
    case = Case()
    with pytest.raises(ValueError, match="unknown compensate 'median'; there are: mean, or None"):
        block_sparse_attention(*case.tensors(torch.float32), case.mask(), compensate="median")
