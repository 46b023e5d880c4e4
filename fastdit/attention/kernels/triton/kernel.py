"""The Triton kernels as ``dispatch`` calls them. Triton is imported when a kernel first runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ....mask import BlockMask
from ..device import _capability, _interpreted, launching_on
from ..device import available as available
from ..options import Options
from .tiles import (
    choose_backward,
    choose_config,
    choose_int8_config,
    int8_reason,
    no_descriptor,
    table_arch,
    variant_reason,
)

EXPONENTIALS_BOUND = {80: 32, 90: 64}
"""By architecture: head dims up to which 16 exponentials a cycle take as long as the bf16 products they belong to."""


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> str | None:
    """Return why this kernel cannot run for these arguments, or ``None``."""
    if not q.is_cuda and not (_interpreted() and q.device.type == "cpu"):
        return f"it needs CUDA tensors, got {q.device}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"it needs compute capability 8.0 or later, {q.device} has {major}.{minor}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bf16, fp16 and fp32, got {q.dtype}"
    if not 16 <= q.shape[3] <= 128 or q.shape[3] % 8:
        return f"it takes head dims that are multiples of 8 in [16, 128], got {q.shape[3]}"
    if mask.block_q % 16 or mask.block_k % 16:
        return f"it takes blocks of a multiple of 16 tokens, got {mask.block_q} and {mask.block_k}"
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return "it needs q, k and v with a contiguous last axis; call .contiguous()"
    if options.variant is not None and options.precision is not None:
        return f"precision={options.precision!r} has no variants, got variant={options.variant!r}"
    if options.index is not None and options.precision is None:
        return "it gathers tokens through an index only in low precision; put them in order, or ask for a precision"
    if options.precision is not None:
        return int8_reason(_capability(q), q.dtype, options.precision, mask.block_k)
    if options.variant in (None, "loads"):
        return None
    if q.is_cuda and _capability(q) < (9, 0):
        return f"variant {options.variant!r} needs compute capability 9.0 or later"
    if options.variant == "warps" and options.compensate is not None:
        return "variant 'warps' does not support compensation; use variant='tma'"
    return variant_reason(options.variant, q, k, v)


def no_gain(q: Tensor, options: Options) -> str | None:
    """Return why low precision is not faster for these arguments though it can run, or ``None``."""
    capability = _capability(q)
    bound = EXPONENTIALS_BOUND.get(table_arch(capability), 0)
    if options.precision is None or q.shape[3] > bound:
        return None
    return (
        f"{options.precision} gains nothing up to head dim {bound} on compute capability {capability[0]}."
        f"{capability[1]}, where exponentials take as long as products in bf16; the head dim is {q.shape[3]}"
    )


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks; the backward computes the weights again instead of keeping them."""
    if options.precision is None:
        return _BlockSparse.apply(mask, options, q, k, v)  # type: ignore[return-value]
    from .int8 import int8_fwd

    low = choose_int8_config(_capability(q), q.shape[3], options.precision, mask.block_q, mask.block_k)
    with launching_on(q.device):
        return int8_fwd(q, k, v, mask, options, low)


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: BlockMask, options: Options, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        from .forward import block_sparse_fwd

        q, k, v = tensors
        compensate = options.compensate is not None
        # The preferred variant may need another memory layout.
        variant = options.variant or ("loads" if no_descriptor(k) or no_descriptor(v) else None)
        blocks = (mask.block_q, mask.block_k)
        config = choose_config(_capability(q), q.shape[3], q.dtype, *blocks, compensate=compensate, variant=variant)
        with launching_on(q.device):
            out, lse = block_sparse_fwd(q, k, v, mask, options, config)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.options = mask, options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from .backward import block_sparse_bwd

        q, k, v, *results = ctx.saved_tensors
        mask, options = ctx.mask, ctx.options
        config = choose_backward(_capability(q), q.shape[3], q.dtype, mask.block_q, mask.block_k)
        with launching_on(q.device):
            return None, None, *block_sparse_bwd((q, k, v), tuple(results), grads[0], mask, options, config)
