"""What the kernels in low precision are held to."""

from __future__ import annotations

import torch
from kernel_cases import Case, naive

from fastdit.attention.kernels import block_sparse_attention


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
