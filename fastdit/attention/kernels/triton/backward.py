"""The backward pass over listed blocks, for NVIDIA GPUs from compute capability 8.0 on.

Queries gather their gradient over the lists of the mask, keys and values theirs over the same lists transposed, so
that nothing is added up by two programs: results are the same at every run. With weights ``p = exp(s - lse)`` of scores
``s = scale q k^T``: ``dv = p^T do``, ``ds = p (do v^T - delta)``, ``dq = scale ds k``, ``dk = scale ds^T q``, where
``delta`` is the sum of ``do * o`` over the channels. Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import BlockMask
from ..options import Options
from ..stand_ins import dropped_blocks
from ..transposed import transposed_lists
from .backward_means import gradients_of_means
from .means import triton_block_means
from .primitives import bias_of_means, broadcast_strides, compile_options, of_keys, of_queries, tile_constants
from .tiles import BackwardConfig, Config

_ROWS = 64  # queries that one program of the first kernel reads


@triton.jit
def _rows_kernel(
    out_ptr, grad_ptr, lse_ptr, delta_ptr, log_total_ptr,
    stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos,
    tokens_q, padded_q,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    inside = rows < tokens_q
    present = inside[:, None] & (dims < HEAD_DIM)[None, :]
    out_tile = out_ptr + batch * stride_ob + head * stride_oh + rows[:, None] * stride_os + dims[None, :]
    grad_tile = grad_ptr + batch * stride_dob + head * stride_doh + rows[:, None] * stride_dos + dims[None, :]
    out = tl.load(out_tile, mask=present, other=0.0).to(tl.float32)
    grad = tl.load(grad_tile, mask=present, other=0.0).to(tl.float32)
    row = batch * tl.num_programs(1) + head
    lse = tl.load(lse_ptr + row * tokens_q + rows, mask=inside, other=float("-inf"))
    # Rows without keys, or past the last query, give every key the weight 0.
    log_total = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    stored = rows < padded_q
    tl.store(delta_ptr + row * padded_q + rows, tl.sum(out * grad, 1), mask=stored)
    tl.store(log_total_ptr + row * padded_q + rows, log_total, mask=stored)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, log_total_ptr, delta_ptr, indices_ptr, counts_ptr, full_counts_ptr,
    every_ptr, lengths_ptr, mean_k_ptr, mean_v_ptr, dropped_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_dob,
    stride_doh, stride_dos, stride_dqb, stride_dqh, stride_dqs, stride_ib, stride_ih, stride_iq, stride_cb, stride_ch,
    stride_lb, stride_lh, stride_db, stride_dh,
    tokens_q, padded_q, num_k, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, COMPENSATE: tl.constexpr, MEANS_TILE: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    # Masks cost registers; smaller tiles make room for them, as in the forward kernel.
    RAGGED_TILE_K: tl.constexpr = min(TILE_K, 32)
    RAGGED_SPLIT: tl.constexpr = BLOCK_K // RAGGED_TILE_K
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tile // (BLOCK_Q // TILE_Q)

    offsets_q = tl.arange(0, TILE_Q)
    offsets_k = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    start_q = tile.to(tl.int64) * TILE_Q
    present = (start_q + offsets_q < tokens_q)[:, None] & (dims < HEAD_DIM)[None, :]

    q_tile = q_ptr + batch * stride_qb + head * stride_qh + start_q * stride_qs
    grad_tile = grad_ptr + batch * stride_dob + head * stride_doh + start_q * stride_dos
    q = tl.load(q_tile + offsets_q[:, None] * stride_qs + dims[None, :], mask=present, other=0.0)
    grad = tl.load(grad_tile + offsets_q[:, None] * stride_dos + dims[None, :], mask=present, other=0.0)
    row_of_all = (batch * tl.num_programs(1) + head) * padded_q + start_q
    log_total = tl.load(log_total_ptr + row_of_all + offsets_q)
    delta = tl.load(delta_ptr + row_of_all + offsets_q)
    k_head = k_ptr + batch * stride_kb + head * stride_kh
    v_head = v_ptr + batch * stride_vb + head * stride_vh
    list_ptr = indices_ptr + batch * stride_ib + head * stride_ih + row.to(tl.int64) * stride_iq
    length_ptr = lengths_ptr + batch * stride_lb + head * stride_lh
    count = tl.load(counts_ptr + batch * stride_cb + head * stride_ch + row)
    full_count = tl.load(full_counts_ptr + batch * stride_cb + head * stride_ch + row)
    if count == num_k:
        list_ptr = every_ptr

    dq = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    for i in tl.range(0, full_count * SPLIT):
        start = tl.load(list_ptr + i // SPLIT).to(tl.int64) * BLOCK_K
        rows = (i % SPLIT) * TILE_K + offsets_k
        k_tile = k_head + start * stride_ks + (rows[:, None] * stride_ks + dims[None, :])
        v_tile = v_head + start * stride_vs + (rows[:, None] * stride_vs + dims[None, :])
        dq = of_queries(
            dq, q, grad, log_total, delta, k_tile, v_tile, None, scale, dims, HEAD_DIM, PADDED_DIM, WIDEN, PRECISION
        )
    for i in tl.range(full_count * RAGGED_SPLIT, count * RAGGED_SPLIT):
        block = tl.load(list_ptr + i // RAGGED_SPLIT)
        length = tl.load(length_ptr + block)
        start = block.to(tl.int64) * BLOCK_K
        rows = (i % RAGGED_SPLIT) * RAGGED_TILE_K + tl.arange(0, RAGGED_TILE_K)
        bias = tl.where(rows < length, 0.0, float("-inf"))
        # Padding is read as a copy of the last real key: cheaper than masked loads, and never out of bounds.
        rows = tl.minimum(rows, tl.maximum(length, 1) - 1)
        k_tile = k_head + start * stride_ks + (rows[:, None] * stride_ks + dims[None, :])
        v_tile = v_head + start * stride_vs + (rows[:, None] * stride_vs + dims[None, :])
        dq = of_queries(
            dq, q, grad, log_total, delta, k_tile, v_tile, bias, scale, dims, HEAD_DIM, PADDED_DIM, WIDEN, PRECISION
        )

    if COMPENSATE:
        mean_head = (batch * tl.num_programs(1) + head) * tl.cdiv(num_k, MEANS_TILE) * MEANS_TILE * HEAD_DIM
        dropped_row = dropped_ptr + batch * stride_db + head * stride_dh + row.to(tl.int64) * num_k
        for first in tl.range(0, num_k, RAGGED_TILE_K):
            blocks = first + tl.arange(0, RAGGED_TILE_K)
            bias = bias_of_means(dropped_row, length_ptr, blocks, num_k)
            at = mean_head + (blocks[:, None] * HEAD_DIM + dims[None, :])
            dq = of_queries(
                dq, q, grad, log_total, delta, mean_k_ptr + at, mean_v_ptr + at, bias, scale, dims, HEAD_DIM,
                PADDED_DIM, WIDEN, PRECISION,
            )  # fmt: skip

    # The scale includes log2(e), which the gradient of a score does not.
    dq *= scale * 0.6931471805599453
    dq_tile = dq_ptr + batch * stride_dqb + head * stride_dqh + start_q * stride_dqs
    dq_ptrs = dq_tile + offsets_q[:, None] * stride_dqs + dims[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=present)


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, log_total_ptr, delta_ptr, queries_ptr, starts_ptr, every_counts_ptr,
    lengths_ptr, mean_dk_ptr, mean_dv_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_dob,
    stride_doh, stride_dos, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs, stride_tb,
    stride_th, stride_sb, stride_sh, stride_eb, stride_eh, stride_lb, stride_lh,
    every_start, tokens_q, padded_q, tokens_k, num_k, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, COMPENSATE: tl.constexpr, MEANS_TILE: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK_Q // TILE_Q
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    block = tile // (BLOCK_K // TILE_K)
    within = tile % (BLOCK_K // TILE_K) * TILE_K

    offsets_q = tl.arange(0, TILE_Q)
    offsets_k = tl.arange(0, TILE_K)
    dims = tl.arange(0, PADDED_DIM)
    start_k = tile.to(tl.int64) * TILE_K
    length = tl.load(lengths_ptr + batch * stride_lb + head * stride_lh + block)
    real = (within + offsets_k < length)[:, None] & (dims < HEAD_DIM)[None, :]

    k_tile = k_ptr + batch * stride_kb + head * stride_kh + start_k * stride_ks
    v_tile = v_ptr + batch * stride_vb + head * stride_vh + start_k * stride_vs
    k = tl.load(k_tile + offsets_k[:, None] * stride_ks + dims[None, :], mask=real, other=0.0)
    v = tl.load(v_tile + offsets_k[:, None] * stride_vs + dims[None, :], mask=real, other=0.0)
    q_head = q_ptr + batch * stride_qb + head * stride_qh
    grad_head = grad_ptr + batch * stride_dob + head * stride_doh
    rows_head = (batch * tl.num_programs(1) + head) * padded_q
    list_head = queries_ptr + batch * stride_tb + head * stride_th
    starts_head = starts_ptr + batch * stride_sb + head * stride_sh
    first = tl.load(starts_head + block)
    count = tl.load(starts_head + block + 1) - first
    # After its own list a block continues with the rows that list every block.
    jump = every_start - first - count
    total = count + tl.load(every_counts_ptr + batch * stride_eb + head * stride_eh)
    total = tl.where(within < length, total, 0)

    dk = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    dv = tl.zeros([TILE_K, PADDED_DIM], tl.float32)
    for i in tl.range(0, total * SPLIT):
        entry = i // SPLIT
        row = tl.load(list_head + first + entry + tl.where(entry < count, 0, jump))
        start = row.to(tl.int64) * BLOCK_Q
        rows = (i % SPLIT) * TILE_Q + offsets_q
        at = rows_head + start + rows
        # Positions past the last query hold copies of it, whose weights are 0.
        rows = tl.minimum(rows, (tokens_q - 1 - start).to(tl.int32))
        q_tile = q_head + start * stride_qs + (rows[:, None] * stride_qs + dims[None, :])
        grad_tile = grad_head + start * stride_dos + (rows[:, None] * stride_dos + dims[None, :])
        dk, dv = of_keys(
            dk, dv, k, v, q_tile, grad_tile, log_total_ptr + at, delta_ptr + at, None, scale, dims, HEAD_DIM,
            PADDED_DIM, WIDEN, PRECISION,
        )  # fmt: skip

    dk *= scale * 0.6931471805599453
    if COMPENSATE:
        mean = (batch * tl.num_programs(1) + head) * tl.cdiv(num_k, MEANS_TILE) * MEANS_TILE + block
        share = 1.0 / tl.maximum(length, 1)
        dk += (tl.load(mean_dk_ptr + mean * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0) * share)[None, :]
        dv += (tl.load(mean_dv_ptr + mean * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0) * share)[None, :]
    stored = (start_k + offsets_k < tokens_k)[:, None] & (dims < HEAD_DIM)[None, :]
    dk_tile = dk_ptr + batch * stride_dkb + head * stride_dkh + start_k * stride_dks
    dv_tile = dv_ptr + batch * stride_dvb + head * stride_dvh + start_k * stride_dvs
    dk_ptrs = dk_tile + offsets_k[:, None] * stride_dks + dims[None, :]
    dv_ptrs = dv_tile + offsets_k[:, None] * stride_dvs + dims[None, :]
    tl.store(dk_ptrs, tl.where(real, dk, 0.0).to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptrs, tl.where(real, dv, 0.0).to(dv_ptr.dtype.element_ty), mask=stored)


def block_sparse_bwd(
    tensors: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    grad: Tensor,
    mask: BlockMask,
    options: Options,
    config: BackwardConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels.

    Args:
        tensors: Queries ``(B, H, Sq, D)``, keys and values ``(B, H, Sk, D)``, last axis contiguous.
        results: Output ``(B, H, Sq, D)``, last axis contiguous, and log-sum-exp ``(B, H, Sq)`` of the forward pass.
        grad: ``(B, H, Sq, D)`` gradient of the output.
        mask: The blocks.
        options: Options of the call, in the precision of the inputs.
        config: Tiles that divide the mask's blocks.

    Returns:
        The gradients of queries, ``(B, H, Sq, D)``, keys and values, ``(B, H, Sk, D)``, in their dtype and memory
        order; 0 for padding keys.
    """
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    rows = _row_sums(*results, grad, mask)
    means = None
    if options.compensate is not None:
        means = tuple(triton_block_means(x, mask).to(x.dtype) for x in tensors[1:])
    dq = _queries(tensors, grad, rows, means, mask, options, config.dq)
    dmeans = None if means is None else gradients_of_means(tensors[0], means, grad, rows, mask, options, config.means)
    return dq, *_keys(tensors, grad, rows, dmeans, mask, options, config.dkdv)


def _row_sums(out: Tensor, lse: Tensor, grad: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Return ``(B, H, Nq * block_q)`` fp32 each: log-sum-exp to base 2, inf where no key counts, and ``delta``."""
    batch, heads, tokens, dim = out.shape
    padded = mask.num_q * mask.block_q
    delta, log_total = (torch.empty(batch, heads, padded, dtype=torch.float32, device=out.device) for _ in range(2))
    _rows_kernel[(triton.cdiv(padded, _ROWS), heads, batch)](
        out, grad, lse, delta, log_total, *out.stride()[:3], *grad.stride()[:3], tokens, padded, **rows_constants(dim)
    )
    return log_total, delta


def _queries(
    tensors: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    rows: tuple[Tensor, Tensor],
    means: tuple[Tensor, ...] | None,
    mask: BlockMask,
    options: Options,
    config: Config,
) -> Tensor:
    q, k, v = tensors
    batch, heads, tokens, dim = q.shape
    dq = torch.empty_like(q)
    indices, counts, full_counts, lengths = (
        x.contiguous() for x in (mask.indices, mask.counts, mask.full_counts, mask.lengths_k)
    )
    mean_k, mean_v, dropped = k, v, counts  # not read
    if means is not None:
        mean_k, mean_v = means
        dropped = dropped_blocks(mask).view(torch.int8)
    _dq_kernel[(triton.cdiv(tokens, config.tile_q), heads, batch)](
        q, k, v, grad, dq, *rows, indices, counts, full_counts, mask.every, lengths, mean_k, mean_v, dropped,
        *(stride for x in (q, k, v, grad, dq) for stride in x.stride()[:3]), *broadcast_strides(indices),
        indices.stride(2), *(stride for x in (counts, lengths, dropped) for stride in broadcast_strides(x)),
        tokens, mask.num_q * mask.block_q, mask.num_k, options.scale * math.log2(math.e),
        **list_constants(dim, q.dtype, mask.block_q, mask.block_k, config, compensate=means is not None),
        **compile_options(config),
    )  # fmt: skip
    return dq


def _keys(
    tensors: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    rows: tuple[Tensor, Tensor],
    dmeans: tuple[Tensor, Tensor] | None,
    mask: BlockMask,
    options: Options,
    config: Config,
) -> tuple[Tensor, Tensor]:
    q, k, v = tensors
    batch, heads, tokens, dim = k.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    lists, lengths = transposed_lists(mask), mask.lengths_k.contiguous()
    listed = (lists.queries, lists.starts, lists.every_counts, lengths)
    _dkdv_kernel[(triton.cdiv(tokens, config.tile_k), heads, batch)](
        q, k, v, grad, dk, dv, *rows, *listed, *(rows if dmeans is None else dmeans),
        *(stride for x in (q, k, v, grad, dk, dv) for stride in x.stride()[:3]),
        *(stride for x in listed for stride in broadcast_strides(x)),
        lists.every_start, q.shape[2], mask.num_q * mask.block_q, tokens, mask.num_k, options.scale * math.log2(math.e),
        **list_constants(dim, q.dtype, mask.block_q, mask.block_k, config, compensate=dmeans is not None),
        **compile_options(config),
    )  # fmt: skip
    return dk, dv


def rows_constants(head_dim: int) -> dict[str, int]:
    """Return the compile-time arguments of the kernel that sums over rows.

    Args:
        head_dim: In [16, 128].
    """
    return {"HEAD_DIM": head_dim, "PADDED_DIM": triton.next_power_of_2(head_dim), "TILE": _ROWS}


def list_constants(
    head_dim: int, dtype: torch.dtype, block_q: int, block_k: int, config: Config, *, compensate: bool
) -> dict[str, int | bool | str]:
    """Return the compile-time arguments of the kernels that run over lists.

    Arguments as for ``constants``.
    """
    return {**tile_constants(head_dim, dtype, block_q, config), "BLOCK_K": block_k, "COMPENSATE": compensate}
