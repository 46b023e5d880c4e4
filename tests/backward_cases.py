"""Gradients that every backward kernel is held to."""

from __future__ import annotations

import torch
from kernel_cases import Case, naive
from torch import Tensor

from fastdit.attention.kernels import block_sparse_attention


def check_gradients(
    case: Case, dtype: torch.dtype, device: str = "cpu", scale: float | None = None, compensate: str | None = None
) -> None:
    """Compare gradients with fp64: at most twice the error of eager attention in the same dtype, plus rounding.

    The backward makes its probabilities from the log-sum-exp, in fp32 or better: rounding it changes all of a row by as
    many units of fp32 as it is large. Eager attention keeps its probabilities instead.

    Raises:
        AssertionError: The kernel is off.
    """
    mask = case.mask().to(device)
    q, k, v = (x.to(device) for x in case.tensors(dtype))
    real = (torch.arange(mask.block_k, device=device) < mask.lengths_k[..., None]).flatten(2)[..., : k.shape[2], None]
    k, v = k.where(real, 300), v.where(real, -700)  # padding may hold anything
    grad = torch.randn(q.shape, device=device).to(dtype)

    def triton(*tensors: Tensor) -> Tensor:
        return block_sparse_attention(*tensors, mask, scale=scale, kernel="triton", compensate=compensate)[0]

    def exact(*tensors: Tensor) -> Tensor:
        return block_sparse_attention(*tensors, mask, scale=scale, kernel="reference", compensate=compensate)[0]

    def eager(*tensors: Tensor) -> Tensor:
        return naive(*tensors, mask, scale=scale, compensate=compensate)[0]

    actual = _gradients(triton, grad, q, k, v)
    wanted = _gradients(exact, grad.double(), q.double(), k.double(), v.double())
    rounded = _gradients(eager, grad, q, k, v)
    lse = block_sparse_attention(q, k, v, mask, scale=scale, kernel="reference", compensate=compensate)[1]
    largest = lse.masked_fill(lse.isinf(), 0).abs().max()
    for name, x, y, z in zip(("dq", "dk", "dv"), actual, wanted, rounded, strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        error, budget = (x - y).abs().max(), 2 * (z - y).abs().nan_to_num(0).max()
        units = 8 * torch.finfo(dtype).eps + largest * torch.finfo(torch.float32).eps
        budget += units * y.abs().max().clamp(min=1)
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
    for x in actual[1:]:
        assert (x.masked_select(~real.expand_as(x)) == 0).all()


def _gradients(attention, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    tensors = tuple(x.detach().requires_grad_() for x in tensors)
    return torch.autograd.grad(attention(*tensors), tensors, grad)
