"""What the kernels in low precision are held to."""

from __future__ import annotations

import torch
from kernel_cases import Case, naive
from torch import Tensor

from fastdit.attention.kernels import block_sparse_attention
from fastdit.layout import TokenLayout
from fastdit.mask import BlockMask
from fastdit.tokens import TokenSpec, VideoGrid


def check_low_precision(
    case: Case, dtype: torch.dtype, precision: str, compensate: str | None = None, device: str = "cpu"
) -> None:
    """Run the Triton kernel on a case and compare with the reference in fp64, which rounds the same numbers.

    Both may round a number that lies in the middle to either side, so errors are summed over all rows. ``int8`` may
    differ from the reference by twice the error of eager attention in the dtype. ``int8_fp8`` rounds probabilities
    relative to the largest so far: it may be as far from the exact result as the reference is, and a fifth more.

    Raises:
        AssertionError: The kernel is off.
    """
    mask, (q, k, v) = case.mask().to(device), (x.to(device) for x in case.tensors(dtype))
    real = (torch.arange(mask.block_k, device=device) < mask.lengths_k[..., None]).flatten(2)[..., : k.shape[2], None]
    k, v = k.where(real, 300), v.where(real, -700)  # padding may hold anything
    how = {"compensate": compensate, "precision": precision}
    out, lse = block_sparse_attention(q, k, v, mask, kernel="triton", **how)
    wide = q.double(), k.double(), v.double()
    exact, exact_lse = naive(*wide, mask, compensate=compensate)
    meant, meant_lse = block_sparse_attention(*wide, mask, kernel="reference", **how)
    eager = naive(q, k, v, mask, compensate=compensate)[0]
    assert out.dtype == dtype and out.shape == q.shape
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and (out[empty] == 0).all()
    budget = 2 * (eager - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    if precision == "int8":
        error = (out - meant).norm()
    else:
        error, budget = (out - exact).norm(), budget + 1.2 * (meant - exact).norm()
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e}, {error / exact.norm():.2e} of the result"
    lost, by_rounding = (x[~empty].norm() for x in (lse - meant_lse, meant_lse - exact_lse))
    assert lost <= 0.3 * by_rounding + 1e-4 * q.shape[2] ** 0.5, f"log-sum-exp: {lost:.2e}, {by_rounding:.2e}"


def unordered(
    head_dim: int, dtype: torch.dtype, *, own: bool, blocks: tuple[int, int] = (32, 32), device: str = "cpu"
) -> tuple[tuple[Tensor, ...], TokenLayout, BlockMask]:
    """Make tokens as models give them, an order with padding in its middle, and blocks of each head in that order.

    Two samples of a ragged video after text, of which a part is padding. Five tokens more belong to no sequence: NaN.

    Args:
        head_dim: Head dim.
        dtype: Of queries, keys and values.
        own: Whether each head has an order of its own.
        blocks: Queries and keys in a block, of which the larger one is a multiple of the other.
        device: Where all is.
    """
    spec = TokenSpec(VideoGrid(3, 3, 5), 11, text_first=True)
    order = torch.stack([torch.randperm(45) for _ in range(2 if own else 1)])
    layout = TokenLayout.build(spec, block=max(blocks), order=order, segments=torch.tensor([10, 35]), device=device)
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool, device=device)
    padding[0, 4:11] = padding[1, 10:11] = True
    lengths_q, lengths_k = layout.lengths(blocks[0])[None], layout.lengths_without(padding, blocks[1])
    some = torch.rand(2, 2, lengths_q.shape[-1], lengths_k.shape[-1]) < 0.6
    sizes = {"block_q": blocks[0], "block_k": blocks[1], "lengths_q": lengths_q, "lengths_k": lengths_k}
    mask = BlockMask.from_dense(some.to(device), **sizes)
    tensors = torch.randn(3, 2, spec.num_tokens + 5, 2, head_dim).to(device, dtype).transpose(2, 3)
    tensors[:, :, :, spec.num_tokens :] = torch.nan
    return tensors.unbind(), layout, mask


def check_gathered(head_dim: int, dtype: torch.dtype, precision: str, compensate: str | None, **how: object) -> None:
    """Run the Triton kernel on tokens that are not in order; the result must be, to the bit, that of ordered ones.

    Args:
        head_dim: Head dim.
        dtype: Of queries, keys and values.
        precision: Low precision.
        compensate: What stands in for blocks.
        **how: As for ``unordered``.

    Raises:
        AssertionError: It is another one.
    """
    tensors, layout, mask = unordered(head_dim, dtype, **how)
    options = {"kernel": "triton", "precision": precision, "compensate": compensate}
    laid_out = [layout.apply(x[:, :, : layout.num_tokens]) for x in tensors]
    expected, expected_lse = block_sparse_attention(*laid_out, mask, **options)
    out, lse = block_sparse_attention(*tensors, mask, index=layout.index, **options)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and out.stride() == expected.stride()
    assert out.isfinite().all() and out.count_nonzero() > 0.5 * out.numel()
