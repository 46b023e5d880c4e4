"""Reordering of tokens, for NVIDIA GPUs: q, k and v in one launch that reads the order once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..device import launching_on

ROWS = 32  # tokens of a program


@triton.jit
def _copy(
    from_ptr, to_ptr,
    source, rows, tokens,
    stride_b, stride_h, stride_s,
    batch, head, place, dims,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    inside = dims < HEAD_DIM
    x = tl.load(
        from_ptr + batch * stride_b + head * stride_h + source[:, None] * stride_s + dims[None, :],
        mask=(source >= 0)[:, None] & inside[None, :],
        other=0.0,
    )
    target = to_ptr + (place * tokens + rows)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(target, x, mask=(rows < tokens)[:, None] & inside[None, :])


@triton.jit
def _lay_out_kernel(
    a_ptr, b_ptr, c_ptr, new_a_ptr, new_b_ptr, new_c_ptr, index_ptr,
    stride_ab, stride_ah, stride_as, stride_bb, stride_bh, stride_bs, stride_cb, stride_ch, stride_cs, stride_ih,
    tokens,
    TENSORS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    place = batch * tl.num_programs(1) + head
    source = tl.load(index_ptr + head * stride_ih + rows, mask=rows < tokens, other=-1)
    _copy(
        a_ptr, new_a_ptr, source, rows, tokens, stride_ab, stride_ah, stride_as, batch, head, place, dims, HEAD_DIM
    )  # fmt: skip
    if TENSORS > 1:
        _copy(
            b_ptr, new_b_ptr, source, rows, tokens, stride_bb, stride_bh, stride_bs, batch, head, place, dims, HEAD_DIM
        )  # fmt: skip
    if TENSORS > 2:
        _copy(
            c_ptr, new_c_ptr, source, rows, tokens, stride_cb, stride_ch, stride_cs, batch, head, place, dims, HEAD_DIM
        )  # fmt: skip


def triton_lay_out(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tokens into another order; where there is no token, 0.

    Args:
        index: ``(1 or H, n)`` int64: the token at each position, -1 for none.
        *tensors: One to three of ``(B, H, S, D)``, of one shape and dtype, last axis contiguous.

    Returns:
        As many of ``(B, H, n, D)``, contiguous.
    """
    batch, heads, _, dim = tensors[0].shape
    tokens = index.shape[1]
    index = index.contiguous()
    laid_out = tuple(x.new_empty(batch, heads, tokens, dim) for x in tensors)
    unused = 3 - len(tensors)
    given = (*tensors, *tensors[:1] * unused)
    with launching_on(index.device):
        _lay_out_kernel[(triton.cdiv(tokens, ROWS), heads, batch)](
            *given, *laid_out, *laid_out[:1] * unused, index,
            *(stride for x in given for stride in x.stride()[:3]), index.stride(0) if index.shape[0] > 1 else 0,
            tokens,
            **layout_constants(len(tensors), dim),
        )  # fmt: skip
    return laid_out


def layout_constants(tensors: int, head_dim: int) -> dict[str, int]:
    """Return the compile-time arguments of the kernel.

    Args:
        tensors: How many are copied, in [1, 3].
        head_dim: At least 1.
    """
    return {"TENSORS": tensors, "HEAD_DIM": head_dim, "PADDED_DIM": triton.next_power_of_2(head_dim), "ROWS": ROWS}
