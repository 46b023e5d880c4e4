"""Gradients of the mean keys and values of skipped blocks; ``triton/backward.py`` has the formulas."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import BlockMask
from ..options import Options
from ..stand_ins import dropped_blocks
from .primitives import bias_of_means, broadcast_strides, compile_options, of_keys, tile_constants
from .tiles import Config


@triton.jit
def _means_kernel(
    q_ptr, mean_k_ptr, mean_v_ptr, grad_ptr, dk_ptr, dv_ptr, log_total_ptr, delta_ptr, lengths_ptr, dropped_ptr,
    stride_qb, stride_qh, stride_qs, stride_dob, stride_doh, stride_dos, stride_lb, stride_lh, stride_db, stride_dh,
    tokens_q, padded_q, num_k, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    MEANS_TILE: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK_Q // TILE_Q
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    offsets_q = tl.arange(0, TILE_Q)
    dims = tl.arange(0, PADDED_DIM)
    blocks = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    present = (blocks < num_k)[:, None] & (dims < HEAD_DIM)[None, :]
    head_of_all = batch * tl.num_programs(1) + head
    means_head = head_of_all * tl.cdiv(num_k, MEANS_TILE) * MEANS_TILE * HEAD_DIM
    at_means = means_head + (blocks[:, None] * HEAD_DIM + dims[None, :])
    k = tl.load(mean_k_ptr + at_means, mask=present, other=0.0)
    v = tl.load(mean_v_ptr + at_means, mask=present, other=0.0)
    q_head = q_ptr + batch * stride_qb + head * stride_qh
    grad_head = grad_ptr + batch * stride_dob + head * stride_doh
    dropped_head = dropped_ptr + batch * stride_db + head * stride_dh
    length_ptr = lengths_ptr + batch * stride_lb + head * stride_lh

    dk = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    dv = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    for i in tl.range(0, tl.cdiv(tokens_q, TILE_Q)):
        bias = bias_of_means(dropped_head + tl.cast(i // SPLIT, tl.int64) * num_k, length_ptr, blocks, num_k)
        start_q = tl.cast(i, tl.int64) * TILE_Q
        rows = tl.minimum(offsets_q, (tokens_q - 1 - start_q).to(tl.int32))
        q_tile = q_head + start_q * stride_qs + (rows[:, None] * stride_qs + dims[None, :])
        grad_tile = grad_head + start_q * stride_dos + (rows[:, None] * stride_dos + dims[None, :])
        at = head_of_all * padded_q + start_q + offsets_q
        dk, dv = of_keys(
            dk, dv, k, v, q_tile, grad_tile, log_total_ptr + at, delta_ptr + at, bias, scale, dims, HEAD_DIM,
            PADDED_DIM, WIDEN, PRECISION,
        )  # fmt: skip
    tl.store(dk_ptr + at_means, dk * (scale * 0.6931471805599453), mask=present)
    tl.store(dv_ptr + at_means, dv, mask=present)


def gradients_of_means(
    q: Tensor,
    means: tuple[Tensor, ...],
    grad: Tensor,
    rows: tuple[Tensor, Tensor],
    mask: BlockMask,
    options: Options,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel for means.

    Args:
        q: ``(B, H, Sq, D)`` queries, last axis contiguous.
        means: Mean keys and values, ``(B, H, Np, D)`` in the dtype of ``q``, as ``triton_block_means`` pads them.
        grad: ``(B, H, Sq, D)`` gradient of the output, last axis contiguous.
        rows: Log-sum-exp to base 2 and ``delta``, ``(B, H, Nq * block_q)`` fp32 each.
        mask: The blocks.
        options: Options of the call.
        config: Tiles, of which ``tile_q`` divides the mask's ``block_q``.

    Returns:
        The gradients of both means, ``(B, H, Np, D)`` fp32; past the last block they are not written.
    """
    batch, heads, tokens, dim = q.shape
    dk, dv = (torch.empty_like(x, dtype=torch.float32) for x in means)
    lengths, dropped = mask.lengths_k.contiguous(), dropped_blocks(mask).view(torch.int8)
    _means_kernel[(triton.cdiv(mask.num_k, config.tile_k), heads, batch)](
        q, *means, grad, dk, dv, *rows, lengths, dropped,
        *(stride for x in (q, grad) for stride in x.stride()[:3]),
        *(stride for x in (lengths, dropped) for stride in broadcast_strides(x)),
        tokens, mask.num_q * mask.block_q, mask.num_k, options.scale * math.log2(math.e),
        **tile_constants(dim, q.dtype, mask.block_q, config), **compile_options(config),
    )  # fmt: skip
    return dk, dv
