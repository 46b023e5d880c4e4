"""The exact attention map, summed over blocks, for NVIDIA GPUs: the map itself never leaves the chip."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import launching_on
from .primitives import _dot, broadcast_strides


@triton.jit
def _scores(
    q, k_head, tile, lengths,
    stride_ks,
    tokens_k, scale, dims,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, TILE_K: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK // TILE_K
    within = (tile % SPLIT) * TILE_K + tl.arange(0, TILE_K)
    keys = (tile // SPLIT) * BLOCK + within
    present = (keys < tokens_k)[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(k_head + keys.to(tl.int64)[:, None] * stride_ks + dims[None, :], mask=present, other=0.0)
    real = within < tl.load(lengths + tile // SPLIT)
    return _dot(q, tl.trans(k), None, WIDEN, PRECISION) * scale, real[None, :]


@triton.jit
def _block_mass_kernel(
    q_ptr, k_ptr, lse_ptr, mass_ptr, lengths_q_ptr, lengths_k_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_nb, stride_nh, stride_lb, stride_lh,
    tokens_q, tokens_k, num_k, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    NORMALISE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK // TILE_K
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    queries = tile.to(tl.int64) * TILE_Q + tl.arange(0, TILE_Q)
    present = (queries < tokens_q)[:, None] & (dims < HEAD_DIM)[None, :]
    q_head = q_ptr + batch * stride_qb + head * stride_qh
    q = tl.load(q_head + queries[:, None] * stride_qs + dims[None, :], mask=present, other=0.0)
    k_head = k_ptr + batch * stride_kb + head * stride_kh
    lengths_q = lengths_q_ptr + batch * stride_nb + head * stride_nh
    lengths_k = lengths_k_ptr + batch * stride_lb + head * stride_lh
    real_q = queries % BLOCK < tl.load(lengths_q + tile // (BLOCK // TILE_Q))

    row = batch * tl.num_programs(1) + head
    if NORMALISE:
        total = tl.zeros([TILE_Q], tl.float32)
        top = tl.full([TILE_Q], float("-inf"), tl.float32)
        for i in tl.range(0, num_k * SPLIT):
            scores, real = _scores(
                q, k_head, i, lengths_k, stride_ks, tokens_k, scale, dims, HEAD_DIM, BLOCK, TILE_K, WIDEN, PRECISION
            )
            scores = tl.where(real, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
            top = new_top
        lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)
    else:
        lse = tl.load(lse_ptr + row * tokens_q + queries, mask=queries < tokens_q, other=0.0) * 1.4426950408889634

    mass_row = mass_ptr + (row * tl.num_programs(0) + tile) * num_k
    mass = 0.0
    for i in tl.range(0, num_k * SPLIT):
        scores, real = _scores(
            q, k_head, i, lengths_k, stride_ks, tokens_k, scale, dims, HEAD_DIM, BLOCK, TILE_K, WIDEN, PRECISION
        )
        some = tl.sum(tl.where(real_q[:, None] & real, tl.exp2(scores - lse[:, None]), 0.0))
        mass = tl.where(i % SPLIT == 0, some, mass + some)
        # The last tile of a block leaves the sum of them all.
        tl.store(mass_row + i // SPLIT, mass)


def triton_block_mass(
    q: Tensor, k: Tensor, lse: Tensor | None, *, scale: float, block: int, lengths_q: Tensor, lengths_k: Tensor
) -> Tensor:
    """Sum the attention map over each pair of blocks, as ``mass.block_mass`` does.

    Arguments as for ``attention_rows``.

    Returns:
        ``(B, H, Nq, Nk)`` fp32.
    """
    batch, heads, tokens_q, dim = q.shape
    num_q, num_k = lengths_q.shape[-1], lengths_k.shape[-1]
    constexprs = mass_constants(dim, q.dtype, block, normalise=lse is None)
    split = block // constexprs["TILE_Q"]
    mass = torch.empty(batch, heads, num_q * split, num_k, dtype=torch.float32, device=q.device)
    lengths_q, lengths_k = (x.to(torch.int32).contiguous() for x in (lengths_q, lengths_k))
    with launching_on(q.device):
        _block_mass_kernel[(num_q * split, heads, batch)](
            q, k, mass if lse is None else lse.contiguous(), mass, lengths_q, lengths_k,
            *q.stride()[:3], *k.stride()[:3], *broadcast_strides(lengths_q), *broadcast_strides(lengths_k),
            tokens_q, k.shape[2], num_k, scale * math.log2(math.e),
            **constexprs, **mass_options(q.dtype, constexprs["TILE_Q"]),
        )  # fmt: skip
    return mass if split == 1 else mass.unflatten(2, (-1, split)).sum(3)


def mass_constants(head_dim: int, dtype: torch.dtype, block: int, *, normalise: bool) -> dict[str, int | bool | str]:
    """Return the compile-time arguments of the kernel.

    Args:
        head_dim: In [16, 128].
        dtype: Dtype of q and k.
        block: Tokens per block, a power of two of at least 16.
        normalise: Whether the kernel finds the log-sum-exp itself.
    """
    single = dtype == torch.float32
    # Products of fp32 in three parts take many registers.
    largest = ((32, 32) if head_dim <= 64 else (16, 16)) if single else (128, 64)
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "BLOCK": block,
        "TILE_Q": min(block, largest[0]),
        "TILE_K": min(block, largest[1]),
        "NORMALISE": normalise,
        "WIDEN": triton.knobs.runtime.interpret and dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if single else "tf32",
    }


def mass_options(dtype: torch.dtype, tile_q: int) -> dict[str, int]:
    """Return how the kernel is compiled.

    Args:
        dtype: Dtype of q and k.
        tile_q: Queries of a program.
    """
    return {"num_warps": 8 if tile_q * dtype.itemsize >= 128 else 4, "num_stages": 2}
