"""Execution plans of the CPU kernel: query blocks grouped by the number of keys they attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....mask import BlockMask


@dataclass(frozen=True, eq=False)
class Group:
    """Key lists of equal length, each shared by the same number of query blocks.

    Args:
        start: Position of the first query block in the plan's order.
        shared: Query blocks that share a list, at least 1.
        lists: ``(R, count)`` int64 key blocks; ``count`` may be 0.
        keys: How many of the listed keys are used, the first ones.
        bias: ``(R, 1, 1, keys)`` fp32, -inf for padding; ``None`` if there is none.
        first: The first key block where the group is one list of consecutive blocks, which need no gathering.
    """

    start: int
    shared: int
    lists: Tensor
    keys: int
    bias: Tensor | None
    first: int | None


@dataclass(frozen=True, eq=False)
class Plan:
    """The query blocks of one head, sorted into groups.

    Args:
        order: ``(Nq,)`` int64, the query blocks in the order in which they run.
        inverse: ``(Nq,)`` int64, the position of each query block in that order.
        groups: The groups, in that order.
        identity: Whether the order is the mask's own.
    """

    order: Tensor
    inverse: Tensor
    groups: list[Group]
    identity: bool


def head_plans(mask: BlockMask) -> list[list[Plan]]:
    """Return the plans of a mask's heads, one list for each sample or for all, computed once per mask.

    Args:
        mask: The blocks.
    """
    if "cpu" not in mask.derived:
        mask.derived["cpu"] = _plans(mask)
    return mask.derived["cpu"]


def _plans(mask: BlockMask) -> list[list[Plan]]:
    batch, heads = torch.broadcast_shapes(mask.indices.shape[:2], mask.lengths_k.shape[:2])
    indices, listed = mask.lists()
    indices = indices.expand(batch, heads, -1, -1)
    lengths = mask.lengths_k[:, :, None].expand(batch, heads, mask.num_q, -1).gather(-1, indices) * listed
    # Full blocks come first, so that a row whose only ragged block is the last can be cut short; a row with
    # several needs a bias. Blocks that are all padding come last and are dropped.
    kind = (lengths < mask.block_k).to(torch.int8) + (lengths == 0)
    order = kind.sort(dim=-1, stable=True).indices
    lengths = lengths.gather(-1, order)
    indices = torch.where(lengths > 0, indices.gather(-1, order), -1)
    return [[_plan_head(indices[b, h], lengths[b, h], mask.block_k) for h in range(heads)] for b in range(batch)]


def _plan_head(indices: Tensor, lengths: Tensor, block_k: int) -> Plan:
    lists, owner, shared = indices.unique(dim=0, return_inverse=True, return_counts=True)
    by_list = owner.sort(stable=True).indices
    starts = shared.cumsum(0) - shared
    lengths = lengths[by_list[starts]]
    counts = (lengths > 0).sum(-1)
    # If one list needs a bias, all get one, so that lists of equal length stay together.
    biased = (((lengths > 0) & (lengths < block_k)).sum(-1) > 1).any().expand_as(counts)
    keys = torch.where(biased, counts * block_k, lengths.sum(-1))
    kinds, member = torch.stack([shared, keys, biased], 1).unique(dim=0, return_inverse=True)
    groups, order, start = [], [], 0
    for i, (share, used, bias) in enumerate(kinds.tolist()):
        rows = (member == i).nonzero()[:, 0]
        rows = rows[by_list[starts[rows]].argsort()]
        listed = lists[rows, : counts[rows[0]]].contiguous()
        added = None
        if bias:
            padding = torch.arange(block_k, device="cpu") >= lengths[rows, : listed.shape[1], None]
            added = torch.zeros(padding.shape, device="cpu").masked_fill(padding, -torch.inf).flatten(1)[:, None, None]
        consecutive = len(rows) == 1 and bool((listed[0].diff() == 1).all()) and used > 0
        groups.append(Group(start, share, listed, used, added, int(listed[0, 0]) if consecutive else None))
        order.append(by_list[starts[rows][:, None] + torch.arange(share, device="cpu")].flatten())
        start += len(order[-1])
    order = torch.cat(order)
    return Plan(order, order.argsort(), groups, bool((order.diff() == 1).all()))
