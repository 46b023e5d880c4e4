"""Block lists from a block map, for NVIDIA GPUs: one pass over the map instead of a sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import BlockMask, listing_order
from ..device import launching_on
from .primitives import broadcast_strides


@triton.jit
def _chosen(map_row, ragged_ptr, columns, row_in_map, stride_mk, map_k, num_k):
    inside = columns < num_k
    # Outside of the map there is text, which attends to all and is attended to by all.
    mapped = row_in_map & (columns < map_k)
    listed = tl.load(map_row + columns.to(tl.int64) * stride_mk, mask=mapped, other=1) != 0
    ragged = tl.load(ragged_ptr + columns, mask=inside, other=0) != 0
    return listed & inside, ragged


@triton.jit
def _lists_kernel(
    map_ptr, ragged_ptr, indices_ptr, counts_ptr, full_counts_ptr,
    stride_mb, stride_mh, stride_mq, stride_mk,
    map_q, map_k, num_k, width,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_q = tl.num_programs(0)
    some = tl.arange(0, TILE)
    map_row = map_ptr + batch * stride_mb + head * stride_mh + row.to(tl.int64) * stride_mq
    place = (batch * tl.num_programs(1) + head) * num_q + row
    list_row = indices_ptr + place * width

    count = 0
    full_count = 0
    mapped_count = 0
    for start in tl.range(0, num_k, TILE):
        columns = start + some
        listed, ragged = _chosen(map_row, ragged_ptr, columns, row < map_q, stride_mk, map_k, num_k)
        count += tl.sum(listed.to(tl.int32), 0)
        mapped_count += tl.sum((listed & (columns < map_k)).to(tl.int32), 0)
        full_count += tl.sum((listed & ~ragged).to(tl.int32), 0)
    # A row that lists no video block gets the one at its own position: text alone is not enough.
    own = (row.to(tl.int64) * map_k // map_q).to(tl.int32)
    empty = (mapped_count == 0) & (row < map_q)
    if empty:
        count += 1
        full_count += (tl.load(ragged_ptr + own) == 0).to(tl.int32)
    tl.store(counts_ptr + place, count)
    tl.store(full_counts_ptr + place, full_count)

    full_end = 0
    ragged_end = full_count
    for start in tl.range(0, num_k, TILE):
        columns = start + some
        listed, ragged = _chosen(map_row, ragged_ptr, columns, row < map_q, stride_mk, map_k, num_k)
        listed |= empty & (columns == own)
        full = (listed & ~ragged).to(tl.int32)
        last = (listed & ragged).to(tl.int32)
        at = tl.where(ragged, ragged_end + tl.cumsum(last, 0), full_end + tl.cumsum(full, 0)) - 1
        tl.store(list_row + at, columns, mask=listed & (at < width))
        full_end += tl.sum(full, 0)
        ragged_end += tl.sum(last, 0)
    for start in tl.range(0, width, TILE):
        at = start + some
        tl.store(list_row + at, tl.zeros([TILE], tl.int32), mask=(at >= count) & (at < width))


def triton_lists(
    blocks: Tensor, ragged: Tensor, *, num_q: int, num_k: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the key blocks of each row, full ones first, each part ascending.

    A row of the map without any key block in it gets the one at its own relative position.

    Args:
        blocks: ``(B, H, Mq, Mk)`` bool, any strides, which blocks are computed; where it ends, all are.
        ragged: ``(Nk,)`` bool, the key blocks that are not full.
        num_q: Query blocks in all, at least ``Mq``.
        num_k: Key blocks in all, at least ``Mk``.
        width: Entries of a list, at least 1 and as many as the longest row that does not list every block.

    Returns:
        Lists ``(B, H, Nq, width)``, their counts and how many of them are full blocks, ``(B, H, Nq)``, all int32.
        Entries past a count are 0; a row that lists every block has its first ones only.
    """
    batch, heads, map_q, map_k = blocks.shape
    indices = torch.empty(batch, heads, num_q, width, dtype=torch.int32, device=blocks.device)
    counts, full_counts = torch.empty(2, batch, heads, num_q, dtype=torch.int32, device=blocks.device)
    with launching_on(blocks.device):
        _lists_kernel[(num_q, heads, batch)](
            blocks.view(torch.int8), ragged.view(torch.int8), indices, counts, full_counts,
            *broadcast_strides(blocks), *blocks.stride()[2:],
            map_q, map_k, num_k, width,
            **lists_constants(num_k),
        )  # fmt: skip
    return indices, counts, full_counts


def triton_mask(video_blocks: Tensor, block: int, lengths: Tensor, *, max_count: int) -> BlockMask:
    """Make the mask of blocks chosen in the video; text attends to all and is attended to by all.

    Args:
        video_blocks: ``(M, M)`` or ``(B or 1, H or 1, M, M)`` bool.
        block: Tokens per block.
        lengths: ``(B or 1, H or 1, N)`` int32 real tokens of each block, those of video first.
        max_count: An upper bound of the blocks in a row that does not list all, at least 1.
    """
    if video_blocks.ndim == 2:
        video_blocks = video_blocks[None, None]
    num = lengths.shape[-1]
    ragged, _, every = listing_order(lengths, block)
    lists = triton_lists(video_blocks, ragged, num_q=num, num_k=num, width=min(max_count, num))
    return BlockMask(*lists, every, lengths, lengths, block, block)


def lists_constants(num_k: int) -> dict[str, int]:
    """Return the compile-time arguments of the kernel.

    Args:
        num_k: Key blocks, at least 1.
    """
    return {"TILE": min(1024, triton.next_power_of_2(num_k))}
