"""The Triton kernels as the door sees them. Triton itself is imported when a kernel first runs."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from ...mask import BlockMask
from .device import launching_on
from .options import Options
from .triton_config import choose_config, no_descriptor
from .triton_int8_config import choose_int8_config, int8_reason


def available() -> str | None:
    """Return why this kernel cannot run on this machine, or ``None``."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if _interpreted():
        return None
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, and this build of torch is for AMD"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> str | None:
    """Return why this kernel cannot run for these arguments, or ``None``.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        options: How.
    """
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
    if options.precision is not None:
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
        return int8_reason(capability, q.dtype, options.precision, mask.block_k)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward yet; use torch.no_grad(), or kernel='reference', which has one"
    if options.variant == "tma":
        if q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
            return "variant 'tma' needs compute capability 9.0 or later"
        reasons = [f"{name}: {reason}" for name, x in (("k", k), ("v", v)) if (reason := no_descriptor(x)) is not None]
        if reasons:
            return f"variant 'tma' cannot read {'; '.join(reasons)}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks.

    Args:
        q: ``(B, H, Sq, D)`` queries, last axis contiguous.
        k: ``(B, H, Sk, D)`` keys, likewise.
        v: ``(B, H, Sk, D)`` values, likewise.
        mask: The blocks.
        options: How.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the natural log-sum-exp, ``(B, H, Sq)`` fp32.
    """
    from .triton_fwd import block_sparse_fwd

    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    if options.precision is not None:
        from .triton_int8 import int8_fwd

        low = choose_int8_config(capability, q.shape[3], options.precision, mask.block_q, mask.block_k)
        with launching_on(q.device):
            return int8_fwd(q, k, v, mask, options, low)
    compensate = options.compensate is not None
    # What the table prefers may need tensors that lie otherwise in memory.
    variant = options.variant or ("loads" if no_descriptor(k) or no_descriptor(v) else None)
    blocks = (mask.block_q, mask.block_k)
    config = choose_config(capability, q.shape[3], q.dtype, *blocks, compensate=compensate, variant=variant)
    if not q.is_cuda:
        return block_sparse_fwd(q, k, v, mask, options, config)
    with torch.cuda.device(q.device):
        return block_sparse_fwd(q, k, v, mask, options, config)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
