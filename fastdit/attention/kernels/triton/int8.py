"""The forward pass over listed blocks in low precision, for NVIDIA GPUs; ``quantize.py`` defines it."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import BlockMask
from ..options import E4M3_MAX, Options
from ..stand_ins import dropped_blocks
from .layout import triton_lay_out
from .means import triton_block_means
from .primitives import MEANS_TILE, _attend_means, _dot, _load, broadcast_strides, compile_options
from .quantize import quantize_constants, quantize_queries_keys, quantize_values, to_e4m3
from .tiles import Config

_LOG2_E4M3_MAX = tl.constexpr(math.log2(E4M3_MAX))


@triton.jit
def _attend(
    q, acc, total, top, scale, k_head, scales_head, v_head, block, within, length,
    stride_vs,
    dims,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, FP8: tl.constexpr,
    RAGGED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    keys = within + tl.arange(0, TILE_K)
    start = block.to(tl.int64) * BLOCK_K
    k = tl.load(k_head + start * PADDED_DIM + (keys[:, None] * PADDED_DIM + dims[None, :]))
    if FP8:
        v = tl.trans(tl.load(v_head + start * PADDED_DIM + (dims[:, None] * BLOCK_K + keys[None, :])))
    else:
        # Padding is read as a copy of the last real key; of quantised keys and values there are whole blocks.
        rows = tl.minimum(keys, tl.maximum(length, 1) - 1) if RAGGED else keys
        v_tile = v_head + start * stride_vs + (rows[:, None] * stride_vs + dims[None, :])
        v = _load(v_tile, dims, HEAD_DIM, PADDED_DIM)
    scale *= tl.load(scales_head + block)
    scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    # A smaller maximum makes probabilities 448 times as large, and costs no product.
    LIFT: tl.constexpr = _LOG2_E4M3_MAX if FP8 else 0.0
    if RAGGED:
        scores = tl.where((keys < length)[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # While a row has seen no key its maximum is -inf, and -inf minus -inf is NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - (base - LIFT)[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        base = new_top
        weights = tl.exp2(scores * scale - (base - LIFT)[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if FP8:
        # Tensor cores accumulate fp8 in fewer bits than fp32, so each sum covers one tile only.
        part = tl.dot(to_e4m3(weights, INTERPRET), v, max_num_imprecise_acc=TILE_K)
        acc = acc * shrink[:, None] + part
    else:
        acc = _dot(weights.to(v.dtype), v, acc * shrink[:, None], INTERPRET, "tf32")
    return acc, total, new_top


@triton.jit
def _int8_fwd_kernel(
    q_ptr, q8_ptr, q_scales_ptr, k8_ptr, k_scales_ptr, v_ptr, v_scales_ptr, out_ptr, lse_ptr, indices_ptr, counts_ptr,
    full_counts_ptr, every_ptr, lengths_ptr, mean_k_ptr, mean_v_ptr, dropped_ptr, index_ptr,
    stride_qb, stride_qh, stride_qs, stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_ib,
    stride_ih, stride_iq, stride_cb, stride_ch, stride_lb, stride_lh, stride_db, stride_dh, stride_nh,
    tokens_q, num_q, num_k, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, FP8: tl.constexpr, COMPENSATE: tl.constexpr, INDEXED: tl.constexpr,
    MEANS_TILE: tl.constexpr, MEANS_STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    RAGGED_TILE_K: tl.constexpr = min(TILE_K, 32)
    RAGGED_SPLIT: tl.constexpr = BLOCK_K // RAGGED_TILE_K
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    one = batch * tl.num_programs(1) + head
    row = tile // (BLOCK_Q // TILE_Q)

    offsets_q = tl.arange(0, TILE_Q)
    dims = tl.arange(0, PADDED_DIM)
    start_q = tile.to(tl.int64) * TILE_Q
    inside = start_q + offsets_q < tokens_q
    present = inside[:, None] & (dims < HEAD_DIM)[None, :]

    q8_tile = q8_ptr + (one * num_q * BLOCK_Q + start_q) * PADDED_DIM
    q8 = tl.load(q8_tile + offsets_q[:, None] * PADDED_DIM + dims[None, :])
    row_scale = tl.load(q_scales_ptr + one * num_q + row)
    k_head = k8_ptr + one * num_k * BLOCK_K * PADDED_DIM
    scales_head = k_scales_ptr + one * num_k
    v_head = v_ptr + one * num_k * BLOCK_K * PADDED_DIM if FP8 else v_ptr + batch * stride_vb + head * stride_vh
    list_ptr = indices_ptr + batch * stride_ib + head * stride_ih + row.to(tl.int64) * stride_iq
    length_ptr = lengths_ptr + batch * stride_lb + head * stride_lh
    count = tl.load(counts_ptr + batch * stride_cb + head * stride_ch + row)
    full_count = tl.load(full_counts_ptr + batch * stride_cb + head * stride_ch + row)
    if count == num_k:
        list_ptr = every_ptr

    acc = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    for i in tl.range(0, full_count * SPLIT):
        block = tl.load(list_ptr + i // SPLIT)
        acc, total, top = _attend(
            q8, acc, total, top, row_scale, k_head, scales_head, v_head, block, (i % SPLIT) * TILE_K, BLOCK_K,
            stride_vs, dims, HEAD_DIM, PADDED_DIM, BLOCK_K, TILE_K, FP8, False, INTERPRET,
        )  # fmt: skip
    for i in tl.range(full_count * RAGGED_SPLIT, count * RAGGED_SPLIT):
        block = tl.load(list_ptr + i // RAGGED_SPLIT)
        length = tl.load(length_ptr + block)
        acc, total, top = _attend(
            q8, acc, total, top, row_scale, k_head, scales_head, v_head, block, (i % RAGGED_SPLIT) * RAGGED_TILE_K,
            length, stride_vs, dims, HEAD_DIM, PADDED_DIM, BLOCK_K, RAGGED_TILE_K, FP8, True, INTERPRET,
        )  # fmt: skip

    if FP8:
        # From here on sums use a smaller maximum, so that means are added without a factor.
        v_scales = tl.load(v_scales_ptr + one * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        acc *= v_scales[None, :]
        top -= _LOG2_E4M3_MAX
    if COMPENSATE:
        q_head = q_ptr + batch * stride_qb + head * stride_qh
        rows = start_q + offsets_q
        if INDEXED:
            rows = tl.load(index_ptr + head * stride_nh + rows, mask=inside, other=-1)
        real = present & (rows >= 0)[:, None]
        q = tl.load(q_head + rows[:, None] * stride_qs + dims[None, :], mask=real, other=0.0)
        mean_head = one * tl.cdiv(num_k, MEANS_TILE) * MEANS_TILE * HEAD_DIM
        dropped_row = dropped_ptr + batch * stride_db + head * stride_dh + row.to(tl.int64) * num_k
        for start in tl.range(0, num_k, MEANS_TILE, num_stages=MEANS_STAGES):
            acc, total, top = _attend_means(
                q, acc, total, top, mean_k_ptr + mean_head, mean_v_ptr + mean_head, dropped_row, length_ptr, start,
                num_k, scale, dims, HEAD_DIM, PADDED_DIM, MEANS_TILE, INTERPRET, "tf32",
            )  # fmt: skip

    some = total > 0
    safe = tl.where(some, total, 1.0)
    lse_row = lse_ptr + one * tokens_q + start_q + offsets_q
    lost = tl.load(lse_row, mask=inside, other=0.0)
    lse = tl.where(some, (top + tl.log2(safe)) * 0.6931471805599453 + lost, float("-inf"))
    tl.store(lse_row, lse, mask=inside)
    out = acc / safe[:, None]
    out_tile = out_ptr + batch * stride_ob + head * stride_oh + start_q * stride_os
    out_ptrs = out_tile + offsets_q[:, None] * stride_os + dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=present)


def int8_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options, config: Config
) -> tuple[Tensor, Tensor]:
    """Quantise, and launch the kernel.

    Arguments as for ``block_sparse_fwd``.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype and memory order of ``q``, and the natural log-sum-exp,
        ``(B, H, Sq)`` fp32; with an index, ``(B, H, n, D)``, contiguous, and ``(B, H, n)``.
    """
    scale, compensate, fp8 = options.scale, options.compensate is not None, options.precision == "int8_fp8"
    if scale < 0:
        # The kernel takes the row maximum before it scales.
        q, scale = -q, -scale
    index = index_v = options.index
    out = torch.empty_like(q) if index is None else q.new_empty(*q.shape[:2], index.shape[1], q.shape[3])
    batch, heads, tokens, dim = out.shape
    if index is not None and not fp8:
        # 16-bit values are read by every row that lists them, which is faster in order.
        (v,), index_v = triton_lay_out(index, v), None
    indices, counts, full_counts, lengths = (
        x.contiguous() for x in (mask.indices, mask.counts, mask.full_counts, mask.lengths_k)
    )
    rounded = quantize_queries_keys(q, k, mask, scale, index=index)
    lse = rounded.lost  # the kernel adds to it
    mean_k, mean_v, dropped = q, q, counts  # not read
    if compensate:
        mean_k = (rounded.k_means - rounded.k_mean[:, :, None]).to(k.dtype)
        mean_v = triton_block_means(v, mask, index_v).to(v.dtype)
        dropped = dropped_blocks(mask).view(torch.int8)
    values, v_scales = quantize_values(v, mask, index_v) if fp8 else (v, lse)
    order = counts if index is None else index.contiguous()[None]
    _int8_fwd_kernel[(triton.cdiv(tokens, config.tile_q), heads, batch)](
        q, rounded.q, rounded.q_scales, rounded.k, rounded.k_scales, values, v_scales, out, lse, indices, counts,
        full_counts, mask.every, lengths, mean_k, mean_v, dropped, order,
        *q.stride()[:3], *values.stride()[:3], *out.stride()[:3], *broadcast_strides(indices), indices.stride(2),
        *broadcast_strides(counts), *broadcast_strides(lengths), *broadcast_strides(dropped),
        broadcast_strides(order)[1],
        tokens, mask.num_q, mask.num_k, scale * math.log2(math.e),
        **int8_constants(dim, options, mask.block_q, mask.block_k, config), **compile_options(config),
    )  # fmt: skip
    return out, lse


def int8_constants(
    head_dim: int, options: Options, block_q: int, block_k: int, config: Config
) -> dict[str, int | bool]:
    """Return the compile-time arguments of the kernel.

    Arguments as for ``constants``.

    Args:
        options: Options of the call, in low precision.
    """
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": quantize_constants(head_dim, block_k)["PADDED_DIM"],
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "TILE_Q": config.tile_q,
        "TILE_K": config.tile_k,
        "FP8": options.precision == "int8_fp8",
        "COMPENSATE": options.compensate is not None,
        "INDEXED": options.compensate is not None and options.index is not None,
        "MEANS_TILE": MEANS_TILE,
        "MEANS_STAGES": 1 if head_dim <= 32 or config.tile_q == 16 else config.num_stages,
        "INTERPRET": triton.knobs.runtime.interpret,
    }
