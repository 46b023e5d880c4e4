"""Quantisation as ``quantize.py`` defines it, with as few passes as possible, for NVIDIA GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import BlockMask
from ..options import E4M3_MAX, INT8_MAX
from .means import triton_block_means
from .primitives import broadcast_strides

_MIN_DIM = 32  # least inner dimension of an 8-bit product
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a small number, it leaves the nearest integer, half to even
_INT8_MAX = tl.constexpr(INT8_MAX)
_E4M3_MAX = tl.constexpr(E4M3_MAX)


@dataclass(frozen=True)
class Quantized:
    """Queries and keys in int8, in whole blocks: padding is 0, in tokens and behind the head dim.

    Args:
        q: ``(B, H, Nq * block_q, Dp)`` int8, where ``Dp`` is the head dim rounded up to a power of two, at least 32.
        q_scales: ``(B, H, Nq)`` fp32, times the softmax scale, times log2(e).
        k: ``(B, H, Nk * block_k, Dp)`` int8.
        k_scales: ``(B, H, Nk)`` fp32.
        lost: ``(B, H, Sq)`` fp32, what smoothing subtracted from the logits of a row, in natural log.
        k_mean: ``(B, H, D)`` fp32, the mean subtracted from the keys.
        q_means: ``(B, H, Nq, D)`` fp32, means of the real queries in each block; ``None`` unless asked for.
        k_means: ``(B, H, Np, D)`` fp32, means of the real keys in each block before smoothing, as
            ``triton_block_means`` returns them.
    """

    q: Tensor
    q_scales: Tensor
    k: Tensor
    k_scales: Tensor
    lost: Tensor
    k_mean: Tensor
    q_means: Tensor | None
    k_means: Tensor


@triton.jit
def to_e4m3(x, ROUND: tl.constexpr):
    if ROUND:
        # The interpreter's cast loses the carry from 31.9 to 32, but keeps values that e4m3 represents.
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 0.015625) / 8
        x = ((x / step + _ROUNDER) - _ROUNDER) * step
    return x.to(tl.float8e4nv)


@triton.jit
def _real_rows(
    x_head, index_head, first, start, length, stride, dims,
    HEAD_DIM: tl.constexpr, INDEXED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows = start + tl.arange(0, TILE)
    if INDEXED:
        tokens = tl.load(index_head + first + rows, mask=rows < length, other=0)
    else:
        tokens = rows.to(tl.int64)
        x_head += first * stride  # one number for all rows, which saves registers
    real = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    x = tl.load(x_head + tokens[:, None] * stride + dims[None, :], mask=real, other=0.0).to(tl.float32)
    return x, real


@triton.jit
def _magnitudes(x):
    # As integers the magnitudes of floats have the same order, and NaN comes last: it is not lost in a maximum.
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0)


@triton.jit
def _quantize_blocks_kernel(
    x_ptr, mean_ptr, rounded_ptr, scales_ptr, lost_ptr, means_ptr, lengths_ptr, index_ptr,
    stride_xb, stride_xh, stride_xs, stride_lb, stride_lh, stride_ih,
    tokens, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    QUERIES: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    one = batch * tl.num_programs(1) + head
    row = one * tl.num_programs(0) + block
    length = tl.load(lengths_ptr + batch * stride_lb + head * stride_lh + block)
    dims = tl.arange(0, PADDED_DIM)
    mean = tl.load(mean_ptr + one * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    first = block.to(tl.int64) * BLOCK
    x_head = x_ptr + batch * stride_xb + head * stride_xh
    index_head = index_ptr + head * stride_ih

    # A block of one tile is loaded once: the compiler unrolls both loops and finds the second load again.
    tops = tl.zeros([PADDED_DIM], tl.int32)
    sums = tl.zeros([PADDED_DIM], tl.float32)
    for start in tl.range(0, BLOCK, TILE):
        x, real = _real_rows(x_head, index_head, first, start, length, stride_xs, dims, HEAD_DIM, INDEXED, TILE)
        if QUERIES:
            if POOL:
                sums += tl.sum(x, 0)
        else:
            x = tl.where(real, x - mean[None, :], 0.0)
        tops = tl.maximum(tops, _magnitudes(x))
    top = tl.max(tops, 0).to(tl.float32, bitcast=True)
    step = tl.where(top == 0, 1.0, top / _INT8_MAX)
    inverse = _INT8_MAX / tl.where(top == 0, 1.0, top)
    for start in tl.range(0, BLOCK, TILE):
        x, real = _real_rows(x_head, index_head, first, start, length, stride_xs, dims, HEAD_DIM, INDEXED, TILE)
        rows = first + start + tl.arange(0, TILE)
        if QUERIES:
            lost = tl.sum(x * mean[None, :], 1) * scale
            tl.store(lost_ptr + one * tokens + rows, lost, mask=rows < tokens)
        else:
            x = tl.where(real, x - mean[None, :], 0.0)
        # The lowest byte of the sum is the rounded number.
        rounded = (x * inverse + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
        out = rounded_ptr + (one * tl.num_programs(0) * BLOCK + rows)[:, None] * PADDED_DIM + dims[None, :]
        tl.store(out, rounded)
    if QUERIES:
        step *= scale * 1.4426950408889634
        if POOL:
            tl.store(means_ptr + row * HEAD_DIM + dims, sums / tl.maximum(length, 1), mask=dims < HEAD_DIM)
    tl.store(scales_ptr + row, step)


@triton.jit
def _largest_values_kernel(
    x_ptr, largest_ptr, lengths_ptr, index_ptr,
    stride_xb, stride_xh, stride_xs, stride_lb, stride_lh, stride_ih,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + block
    length = tl.load(lengths_ptr + batch * stride_lb + head * stride_lh + block)
    dims = tl.arange(0, PADDED_DIM)
    first = block.to(tl.int64) * BLOCK
    x_head = x_ptr + batch * stride_xb + head * stride_xh
    index_head = index_ptr + head * stride_ih
    tops = tl.zeros([PADDED_DIM], tl.int32)
    for start in tl.range(0, BLOCK, TILE):
        x, _ = _real_rows(x_head, index_head, first, start, length, stride_xs, dims, HEAD_DIM, INDEXED, TILE)
        tops = tl.maximum(tops, _magnitudes(x))
    tl.store(largest_ptr + row * HEAD_DIM + dims, tops.to(tl.float32, bitcast=True), mask=dims < HEAD_DIM)


@triton.jit
def _quantize_values_kernel(
    x_ptr, largest_ptr, rounded_ptr, lengths_ptr, index_ptr,
    stride_xb, stride_xh, stride_xs, stride_lb, stride_lh, stride_ih,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, INDEXED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    one = batch * tl.num_programs(1) + head
    length = tl.load(lengths_ptr + batch * stride_lb + head * stride_lh + block)
    dims = tl.arange(0, PADDED_DIM)
    largest = tl.load(largest_ptr + one * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    inverse = _E4M3_MAX / tl.where(largest == 0, 1.0, largest)
    first = block.to(tl.int64) * BLOCK
    x_head = x_ptr + batch * stride_xb + head * stride_xh
    index_head = index_ptr + head * stride_ih
    out = rounded_ptr + (one * tl.num_programs(0) + block) * PADDED_DIM * BLOCK
    for start in tl.range(0, BLOCK, TILE):
        x, _ = _real_rows(x_head, index_head, first, start, length, stride_xs, dims, HEAD_DIM, INDEXED, TILE)
        rows = start + tl.arange(0, TILE)
        tl.store(out + rows[:, None] + dims[None, :] * BLOCK, to_e4m3(x * inverse[None, :], ROUND))


def quantize_queries_keys(
    q: Tensor, k: Tensor, mask: BlockMask, scale: float, *, pool: bool = False, index: Tensor | None = None
) -> Quantized:
    """Quantise queries and keys: queries are read once, keys once for their mean and once to be rounded.

    Args:
        q: ``(B, H, Sq, D)`` queries, fp16 or bf16, last axis contiguous; padding may hold anything.
        k: ``(B, H, Sk, D)`` keys, likewise.
        mask: The blocks.
        scale: Softmax scale, at least 0.
        pool: Whether to return means of query blocks too, so that nothing else needs to read the queries for them.
        index: ``(1 or H, n)`` int64, the token at each position of the mask's sequence; then both have as many tokens,
            and S is n in what is returned. Default: the positions.
    """
    batch, heads, tokens, dim = q.shape
    tokens = tokens if index is None else index.shape[1]
    lengths_q, lengths_k = mask.lengths_q.contiguous(), mask.lengths_k.contiguous()
    k_means = triton_block_means(k, mask, index)
    shares = lengths_k / lengths_k.sum(-1, keepdim=True).clamp(min=1)
    k_mean = (k_means[:, :, : mask.num_k] * shares[..., None]).sum(2)
    lost = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    q_means = torch.empty(batch, heads, mask.num_q, dim, dtype=torch.float32, device=q.device) if pool else None

    def rounded(x: Tensor, block: int, lengths: Tensor, queries: bool) -> tuple[Tensor, Tensor]:
        num, constants = lengths.shape[-1], quantize_constants(dim, block, indexed=index is not None)
        order = _order(index, lengths)
        out = torch.empty(batch, heads, num * block, constants["PADDED_DIM"], dtype=torch.int8, device=q.device)
        scales = torch.empty(batch, heads, num, dtype=torch.float32, device=q.device)
        _quantize_blocks_kernel[(num, heads, batch)](
            x, k_mean, out, scales, lost,
            k_mean if q_means is None else q_means,  # not written
            lengths, order,
            *x.stride()[:3], *broadcast_strides(lengths), broadcast_strides(order)[1],
            tokens, scale,
            QUERIES=queries, POOL=pool, **constants, **quantize_options(),
        )  # fmt: skip
        return out, scales

    q8, k8 = rounded(q, mask.block_q, lengths_q, True), rounded(k, mask.block_k, lengths_k, False)
    return Quantized(*q8, *k8, lost, k_mean, q_means, k_means)


def quantize_values(v: Tensor, mask: BlockMask, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise values, in two passes: one for the largest magnitudes, one to round.

    Args:
        v: ``(B, H, Sk, D)`` values, fp16 or bf16, last axis contiguous; padding may hold anything.
        mask: The blocks.
        index: ``(1 or H, n)`` int64, the token at each position of the mask's sequence; default: the positions.

    Returns:
        ``(B, H, Nk, Dp, block_k)`` float8_e4m3fn, 0 for padding; and the scales, ``(B, H, D)`` fp32. Tokens come last,
        because tensor cores read 8-bit numbers along the axis that they sum over.
    """
    batch, heads, _, dim = v.shape
    lengths = mask.lengths_k.contiguous()
    order, constants = _order(index, lengths), quantize_constants(dim, mask.block_k, indexed=index is not None)
    largest = torch.empty(batch, heads, mask.num_k, dim, dtype=torch.float32, device=v.device)
    shape = (batch, heads, mask.num_k, constants["PADDED_DIM"], mask.block_k)
    rounded = torch.empty(shape, dtype=torch.float8_e4m3fn, device=v.device)
    strides = (*v.stride()[:3], *broadcast_strides(lengths), broadcast_strides(order)[1])
    grid, places = (mask.num_k, heads, batch), (lengths, order, *strides)
    _largest_values_kernel[grid](v, largest, *places, **constants, **quantize_options())
    top = largest.amax(2)
    emulate = {"ROUND": triton.knobs.runtime.interpret}
    _quantize_values_kernel[grid](v, top, rounded, *places, **constants, **emulate, **quantize_options())
    return rounded, torch.where(top == 0, 1, top / E4M3_MAX)


def quantize_constants(head_dim: int, block: int, *, indexed: bool = False) -> dict[str, int | bool]:
    """Return the compile-time arguments that the kernels share.

    Args:
        head_dim: In [16, 128].
        block: Tokens in a block of the mask, a multiple of 16.
        indexed: Whether tokens are read in an order of their own.
    """
    padded = max(_MIN_DIM, triton.next_power_of_2(head_dim))
    # Powers of two that divide the block. Larger blocks are read twice, and tiles of 128 would spill.
    tile = block if block in (16, 32, 64, 128) else min(block & -block, 64)
    return {"HEAD_DIM": head_dim, "PADDED_DIM": padded, "INDEXED": indexed, "BLOCK": block, "TILE": tile}


def quantize_options() -> dict[str, int | bool]:
    """Return how the kernels are compiled."""
    return {"num_warps": 8, "enable_fp_fusion": True}


def _order(index: Tensor | None, unused: Tensor) -> Tensor:
    return unused if index is None else index.contiguous()[None]
