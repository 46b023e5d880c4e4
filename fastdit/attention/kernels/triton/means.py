"""Means of blocks in one pass, for NVIDIA GPUs, without the copies of eager code."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import BlockMask
from ..device import launching_on
from .primitives import MEANS_TILE, broadcast_strides


@triton.jit
def _block_means_kernel(
    x_ptr, means_ptr, lengths_ptr, index_ptr,
    stride_xb, stride_xh, stride_xs, stride_lb, stride_lh, stride_ih,
    num_blocks,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + batch * stride_lb + head * stride_lh + block, mask=block < num_blocks, other=0)
    dims = tl.arange(0, PADDED_DIM)
    rows = tl.arange(0, TILE)
    x_head = x_ptr + batch * stride_xb + head * stride_xh
    first = block.to(tl.int64) * BLOCK
    total = tl.zeros([PADDED_DIM], tl.float32)
    for start in tl.range(0, length, TILE):
        inside = start + rows < length
        tokens = first + start + rows
        if INDEXED:
            tokens = tl.load(index_ptr + head * stride_ih + tokens, mask=inside, other=0)
        real = inside[:, None] & (dims < HEAD_DIM)[None, :]
        x = tl.load(x_head + tokens[:, None] * stride_xs + dims[None, :], mask=real, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    row = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + block) * HEAD_DIM
    tl.store(means_ptr + row + dims, total / tl.maximum(length, 1), mask=dims < HEAD_DIM)


def triton_block_means(x: Tensor, mask: BlockMask, index: Tensor | None = None) -> Tensor:
    """Average keys or values over the real tokens of each key block, as ``means.block_means`` does.

    Args:
        x: ``(B, H, Sk, D)`` keys or values, last axis contiguous; padding may hold anything.
        mask: The blocks.
        index: ``(1 or H, n)`` int64, the token at each position of the mask's sequence; default: the positions.

    Returns:
        ``(B, H, Np, D)`` fp32, where ``Np`` is the number of blocks rounded up to a multiple of ``MEANS_TILE``; 0 for
        a block without real keys and past the last one.
    """
    blocks = triton.cdiv(mask.num_k, MEANS_TILE) * MEANS_TILE
    return triton_means_of_blocks(x, mask.block_k, mask.lengths_k, index=index, blocks=blocks)


def triton_means_of_blocks(
    x: Tensor, block: int, lengths: Tensor, *, index: Tensor | None = None, blocks: int | None = None
) -> Tensor:
    """Average tokens over the real ones of each block, as ``means.means_of_blocks`` does.

    Arguments as for ``means_of_blocks``.

    Args:
        index: ``(1 or H, S_padded)`` int64, the token at each position of the blocks; default: the positions.
        blocks: Blocks of the result, at least N; default: N.

    Returns:
        ``(B, H, blocks, D)`` fp32; 0 for a block without tokens.
    """
    batch, heads, _, dim = x.shape
    num = lengths.shape[-1]
    lengths = lengths.to(torch.int32).contiguous().view(*[1] * (3 - lengths.ndim), *lengths.shape)
    blocks = num if blocks is None else blocks
    means = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    order = lengths if index is None else index.contiguous()
    with launching_on(x.device):
        _block_means_kernel[(blocks, heads, batch)](
            x, means, lengths, order,
            *x.stride()[:3], *broadcast_strides(lengths), order.stride(0) if order.shape[0] > 1 else 0,
            num,
            **means_constants(dim, block, indexed=index is not None),
        )  # fmt: skip
    return means


def means_constants(head_dim: int, block: int, *, indexed: bool = False) -> dict[str, int | bool]:
    """Return the compile-time arguments of the kernel.

    Args:
        head_dim: At least 1.
        block: Tokens per block.
        indexed: Whether tokens are read in an order of their own.
    """
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "INDEXED": indexed,
        "BLOCK": block,
        "TILE": 32,
    }
