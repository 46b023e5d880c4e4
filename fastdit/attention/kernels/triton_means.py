"""Means of key blocks in one pass, for NVIDIA GPUs: eager code would copy keys and values to blank their padding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...mask import BlockMask

MEANS_TILE = 32  # means that the forward kernel reads at a time: with more, fp32 spills


@triton.jit
def _block_means_kernel(
    x_ptr,
    means_ptr,
    lengths_ptr,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_lb,
    stride_lh,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + batch * stride_lb + head * stride_lh + block, mask=block < num_blocks, other=0)
    dims = tl.arange(0, PADDED_DIM)
    rows = tl.arange(0, TILE)
    first = x_ptr + batch * stride_xb + head * stride_xh + block.to(tl.int64) * BLOCK * stride_xs
    total = tl.zeros([PADDED_DIM], tl.float32)
    for start in tl.range(0, length, TILE):
        real = (start + rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
        x = tl.load(first + (start + rows)[:, None] * stride_xs + dims[None, :], mask=real, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    row = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + block) * HEAD_DIM
    tl.store(means_ptr + row + dims, total / tl.maximum(length, 1), mask=dims < HEAD_DIM)


def triton_block_means(x: Tensor, mask: BlockMask) -> Tensor:
    """Average keys or values over the real tokens of each key block, as ``means.block_means`` does.

    Args:
        x: ``(B, H, Sk, D)`` keys or values, last axis contiguous; padding may hold anything.
        mask: The blocks.

    Returns:
        ``(B, H, Np, D)`` fp32, where ``Np`` is the number of blocks rounded up to a multiple of ``MEANS_TILE``; 0 for
        a block without real keys and past the last one.
    """
    batch, heads, _, dim = x.shape
    lengths = mask.lengths_k.contiguous()
    padded = triton.cdiv(mask.num_k, MEANS_TILE) * MEANS_TILE
    means = torch.empty(batch, heads, padded, dim, dtype=torch.float32, device=x.device)
    _block_means_kernel[(padded, heads, batch)](
        x,
        means,
        lengths,
        *x.stride()[:3],
        *broadcast_strides(lengths),
        mask.num_k,
        **means_constants(dim, mask.block_k),
    )
    return means


def means_constants(head_dim: int, block: int) -> dict[str, int]:
    """Return the compile-time arguments of the kernel.

    Args:
        head_dim: In [16, 128].
        block: Keys in a block of the mask.
    """
    return {"HEAD_DIM": head_dim, "PADDED_DIM": triton.next_power_of_2(head_dim), "BLOCK": block, "TILE": 32}


def broadcast_strides(x: Tensor) -> tuple[int, int]:
    """Return the strides of the batch and head axes, 0 where one entry serves all.

    Args:
        x: ``(B or 1, H or 1, ...)``.
    """
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0
