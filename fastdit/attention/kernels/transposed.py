"""Transposed block lists: for each key block, the query blocks that attend to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...mask import BlockMask, listed_entries


@dataclass(frozen=True, eq=False)
class TransposedLists:
    """Ascending lists of the query blocks that attend to each key block.

    Query blocks that list every key block stand once, after all lists, and belong to each of them.

    Args:
        queries: ``(B or 1, H or 1, n + Nq)`` int32 query blocks; what is in no list has no meaning.
        starts: ``(B or 1, H or 1, Nk + 1)`` int32, where the list of each key block starts and the last one ends.
        every_counts: ``(B or 1, H or 1)`` int32, how many query blocks, from entry ``n`` on, list every key block.
        every_start: ``n``, at least 1.
    """

    queries: Tensor
    starts: Tensor
    every_counts: Tensor
    every_start: int


def transposed_lists(mask: BlockMask) -> TransposedLists:
    """Transpose the lists of a mask, once per mask and without waiting for the GPU.

    Args:
        mask: The blocks.
    """
    if "transposed" not in mask.derived:
        mask.derived["transposed"] = _transpose(mask)
    return mask.derived["transposed"]


def _transpose(mask: BlockMask) -> TransposedLists:
    width = mask.indices.shape[-1]
    every = mask.counts == mask.num_k
    listed = listed_entries(mask.counts, width) & ~every[..., None]
    # A stable sort by key block keeps the query blocks in order; entries of no list go last.
    keys, order = torch.where(listed, mask.indices, mask.num_k).flatten(2).sort(stable=True)
    wanted = torch.arange(mask.num_k + 1, dtype=keys.dtype, device=mask.device).expand(*keys.shape[:2], -1)
    starts = torch.searchsorted(keys, wanted.contiguous(), out_int32=True)
    rows = every.int().sort(dim=-1, descending=True, stable=True).indices
    queries = torch.cat([order.div_(width, rounding_mode="floor"), rows], -1).int()
    return TransposedLists(queries, starts, every.sum(-1, dtype=torch.int32), keys.shape[-1])
