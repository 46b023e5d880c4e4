"""The forward pass over listed blocks, for NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ....mask import BlockMask
from ..options import Options
from ..stand_ins import dropped_blocks
from .means import triton_block_means
from .primitives import (
    MEANS_TILE,
    _add_all,
    _add_some,
    _attend_means,
    _dot,
    _read,
    _read_descriptor,
    broadcast_strides,
    compile_options,
    count_ragged,
    next_ragged,
)
from .tiles import Config, variant_reason


@triton.jit
def _block_sparse_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, indices_ptr, counts_ptr, full_counts_ptr, every_ptr, lengths_ptr, mean_k_ptr,
    mean_v_ptr, dropped_ptr, order_ptr,
    q_descriptor, k_descriptor, v_descriptor,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_ob,
    stride_oh, stride_os, stride_ib, stride_ih, stride_iq, stride_cb, stride_ch, stride_lb, stride_lh, stride_db,
    stride_dh,
    tokens_q, num_k, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, COMPENSATE: tl.constexpr, MEANS_TILE: tl.constexpr,
    MEANS_STAGES: tl.constexpr, VARIANT: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    # Masks cost registers; without smaller tiles the loop over full blocks would spill.
    RAGGED_TILE_K: tl.constexpr = min(TILE_K, 32)
    RAGGED_SPLIT: tl.constexpr = BLOCK_K // RAGGED_TILE_K
    # Skipping tiles without keys also takes registers, which kernels with small tiles lack.
    SKIP: tl.constexpr = RAGGED_TILE_K < TILE_K
    ROW_TILES: tl.constexpr = BLOCK_Q // TILE_Q
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.load(order_ptr + batch * stride_cb + head * stride_ch + tl.program_id(0) // ROW_TILES)

    offsets_q = tl.arange(0, TILE_Q)
    dims = tl.arange(0, PADDED_DIM)
    start_q = row.to(tl.int64) * BLOCK_Q + tl.program_id(0) % ROW_TILES * TILE_Q
    inside = start_q + offsets_q < tokens_q
    present = inside[:, None] & (dims < HEAD_DIM)[None, :]

    q_tile = q_ptr + batch * stride_qb + head * stride_qh + start_q * stride_qs
    if VARIANT == "warps":
        # The compiler fails to specialise warps where queries are read by pointers.
        q = _read_descriptor(
            q_descriptor, tl.program_id(2), tl.program_id(1), start_q.to(tl.int32), TILE_Q, PADDED_DIM
        )  # fmt: skip
    else:
        q = tl.load(q_tile + offsets_q[:, None] * stride_qs + dims[None, :], mask=present, other=0.0)
    k_head = k_ptr + batch * stride_kb + head * stride_kh
    v_head = v_ptr + batch * stride_vb + head * stride_vh
    list_ptr = indices_ptr + batch * stride_ib + head * stride_ih + row.to(tl.int64) * stride_iq
    length_ptr = lengths_ptr + batch * stride_lb + head * stride_lh
    # The last query block may end before its last tiles start.
    begins = start_q < tokens_q
    count = tl.load(counts_ptr + batch * stride_cb + head * stride_ch + row, mask=begins, other=0)
    full_count = tl.load(full_counts_ptr + batch * stride_cb + head * stride_ch + row, mask=begins, other=0)
    if count == num_k:
        list_ptr = every_ptr

    acc = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    if VARIANT == "warps":
        # It also fails beside a second loop, so this loop masks ragged and full blocks alike.
        for i in tl.range(0, count * SPLIT, warp_specialize=True):
            block = tl.load(list_ptr + i // SPLIT)
            length = tl.load(length_ptr + block)
            within = i % SPLIT * TILE_K
            start = block * BLOCK_K + within
            k = _read_descriptor(k_descriptor, tl.program_id(2), tl.program_id(1), start, TILE_K, PADDED_DIM)
            v = _read_descriptor(v_descriptor, tl.program_id(2), tl.program_id(1), start, TILE_K, PADDED_DIM)
            real = within + tl.arange(0, TILE_K) < length
            scores = tl.where(real[None, :], _dot(q, tl.trans(k), None, WIDEN, PRECISION) * scale, float("-inf"))
            acc, total, top = _add_some(scores, v, acc, total, top, WIDEN, PRECISION)
    else:
        for i in tl.range(0, full_count * SPLIT):
            block = tl.load(list_ptr + i // SPLIT)
            within = i % SPLIT * TILE_K
            if VARIANT == "loads":
                rows = within + tl.arange(0, TILE_K)
                k = _read(k_head, block, rows, stride_ks, dims, HEAD_DIM, PADDED_DIM, BLOCK_K)
                v = _read(v_head, block, rows, stride_vs, dims, HEAD_DIM, PADDED_DIM, BLOCK_K)
            else:
                start = block * BLOCK_K + within
                k = _read_descriptor(k_descriptor, tl.program_id(2), tl.program_id(1), start, TILE_K, PADDED_DIM)
                v = _read_descriptor(v_descriptor, tl.program_id(2), tl.program_id(1), start, TILE_K, PADDED_DIM)
            acc, total, top = _add_all(q, k, v, acc, total, top, scale, WIDEN, PRECISION)
        first = full_count * RAGGED_SPLIT
        last = count * RAGGED_SPLIT
        if SKIP:
            last = first + count_ragged(list_ptr, length_ptr, full_count, count, RAGGED_TILE_K)
        place = first
        for i in tl.range(first, last):
            if not SKIP:
                place = i
            block = tl.load(list_ptr + place // RAGGED_SPLIT)
            length = tl.load(length_ptr + block)
            rows = place % RAGGED_SPLIT * RAGGED_TILE_K + tl.arange(0, RAGGED_TILE_K)
            # Padding is read as a copy of the last real key: cheaper than masked loads, and never out of bounds.
            inner = tl.minimum(rows, tl.maximum(length, 1) - 1)
            k = _read(k_head, block, inner, stride_ks, dims, HEAD_DIM, PADDED_DIM, BLOCK_K)
            v = _read(v_head, block, inner, stride_vs, dims, HEAD_DIM, PADDED_DIM, BLOCK_K)
            scores = _dot(q, tl.trans(k), None, WIDEN, PRECISION)
            scores = tl.where((rows < length)[None, :], scores * scale, float("-inf"))
            acc, total, top = _add_some(scores, v, acc, total, top, WIDEN, PRECISION)
            if SKIP:
                place = next_ragged(place, length, RAGGED_SPLIT, RAGGED_TILE_K)

    if COMPENSATE:
        mean_head = (batch * tl.num_programs(1) + head) * tl.cdiv(num_k, MEANS_TILE) * MEANS_TILE * HEAD_DIM
        dropped_row = dropped_ptr + batch * stride_db + head * stride_dh + row.to(tl.int64) * num_k
        for start in tl.range(0, num_k, MEANS_TILE, num_stages=MEANS_STAGES):
            acc, total, top = _attend_means(
                q, acc, total, top, mean_k_ptr + mean_head, mean_v_ptr + mean_head, dropped_row, length_ptr, start,
                num_k, scale, dims, HEAD_DIM, PADDED_DIM, MEANS_TILE, WIDEN, PRECISION,
            )  # fmt: skip

    some = total > 0
    safe = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(safe)) * 0.6931471805599453, float("-inf"))
    out = acc / safe[:, None]
    out_tile = out_ptr + batch * stride_ob + head * stride_oh + start_q * stride_os
    out_ptrs = out_tile + offsets_q[:, None] * stride_os + dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=present)
    lse_row = (batch * tl.num_programs(1) + head) * tokens_q
    tl.store(lse_ptr + lse_row + start_q + offsets_q, lse, mask=inside)


def block_sparse_fwd(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options, config: Config
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        q: ``(B, H, Sq, D)`` queries, last axis contiguous.
        k: ``(B, H, Sk, D)`` keys, likewise.
        v: ``(B, H, Sk, D)`` values, likewise.
        mask: The blocks.
        options: Options of the call, in the precision of the inputs.
        config: Tiles that divide the mask's blocks.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype and memory order of ``q``, and the natural log-sum-exp,
        ``(B, H, Sq)`` fp32.

    Raises:
        ValueError: The variant needs tensors that have another memory layout.
    """
    reason = variant_reason(config.variant, q, k, v)
    if reason is not None:
        raise ValueError(f"{reason}; use variant 'loads'")
    scale, compensate = options.scale, options.compensate is not None
    if scale < 0:
        # The kernel takes the row maximum before it scales.
        q, scale = -q, -scale
    batch, heads, tokens, dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    indices, counts, full_counts, lengths = (
        x.contiguous() for x in (mask.indices, mask.counts, mask.full_counts, mask.lengths_k)
    )
    mean_k, mean_v, dropped = k, v, counts  # not read
    if compensate:
        mean_k, mean_v = triton_block_means(k, mask).to(k.dtype), triton_block_means(v, mask).to(v.dtype)
        dropped = dropped_blocks(mask).view(torch.int8)
    row_tiles = mask.block_q // config.tile_q
    _block_sparse_fwd_kernel[(mask.num_q * row_tiles, heads, batch)](
        q, k, v, out, lse, indices, counts, full_counts, mask.every, lengths, mean_k, mean_v, dropped,
        longest_first(mask), _descriptor(q, config.tile_q) if config.variant == "warps" else None,
        *(None if config.variant == "loads" else _descriptor(x, config.tile_k) for x in (k, v)),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *broadcast_strides(indices),
        indices.stride(2), *broadcast_strides(counts), *broadcast_strides(lengths), *broadcast_strides(dropped),
        tokens, mask.num_k, scale * math.log2(math.e),
        **constants(dim, q.dtype, mask.block_q, mask.block_k, config, compensate=compensate), **compile_options(config),
    )  # fmt: skip
    return out, lse


def longest_first(mask: BlockMask) -> Tensor:
    """Order the query blocks of each head by the key blocks they list, most first: ``(B or 1, H or 1, Nq)`` int32.

    Heads stay together, for the cache: only the last programs of the last head run beside idle ones. With equal counts
    the order is that of the tokens, and no count is looked at outside of the device.

    Args:
        mask: The blocks.
    """
    if "longest_first" not in mask.derived:
        mask.derived["longest_first"] = mask.counts.contiguous().argsort(dim=-1, descending=True, stable=True).int()
    return mask.derived["longest_first"]


def constants(
    head_dim: int, dtype: torch.dtype, block_q: int, block_k: int, config: Config, *, compensate: bool
) -> dict[str, int | bool | str]:
    """Return the compile-time arguments of the forward kernel.

    Args:
        head_dim: In [16, 128].
        dtype: Dtype of q, k and v.
        block_q: Queries in a block of the mask.
        block_k: Keys in a block of the mask.
        config: Tiles that divide the mask's blocks.
        compensate: Whether means of skipped blocks join the softmax.
    """
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "TILE_Q": config.tile_q,
        "TILE_K": config.tile_k,
        "COMPENSATE": compensate,
        "MEANS_TILE": MEANS_TILE,
        # For small tiles the assembler spills to keep one more program per multiprocessor.
        "MEANS_STAGES": 1 if head_dim <= 32 or config.tile_q == 16 else config.num_stages,
        "VARIANT": config.variant,
        "WIDEN": triton.knobs.runtime.interpret and dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def _descriptor(x: Tensor, tile: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [1, 1, tile, triton.next_power_of_2(x.shape[3])])
