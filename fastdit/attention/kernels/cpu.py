"""Attention of listed blocks on a CPU: rows with equally many keys are gathered and run as dense attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...mask import BlockMask

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows that gather equally many keys.

    Args:
        start: The first of the rows, in the plan's order.
        lists: ``(R, count)`` int64 key blocks of each row; ``count`` may be 0.
        keys: How many of the gathered keys are used, the first ones.
        bias: ``(R, 1, 1, keys)`` fp32, -inf for padding; ``None`` if there is none.
    """

    start: int
    lists: Tensor
    keys: int
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """The rows of one head, sorted into groups.

    Args:
        order: ``(Nq,)`` int64, the query blocks in the order in which they run.
        inverse: ``(Nq,)`` int64, the position of each query block in that order.
        groups: The groups, in that order.
    """

    order: Tensor
    inverse: Tensor
    groups: list[_Group]


def available() -> str | None:
    """Return why this kernel cannot run on this machine: it always can."""
    return None


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Return why this kernel cannot run for these arguments, or ``None``.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
    """
    if q.device.type != "cpu":
        return f"it needs CPU tensors, got {q.device}"
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"it takes fp64, fp32, bf16 and fp16, got {q.dtype}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        scale: Softmax scale.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the natural log-sum-exp, ``(B, H, Sq)`` fp32 or fp64.
    """
    plans = mask.derived.get("cpu")
    if plans is None:
        plans = mask.derived["cpu"] = _plan(mask)
    batch, heads = q.shape[:2]
    outs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            row = plans[b if len(plans) > 1 else 0]
            plan = row[h if len(row) > 1 else 0]
            out, lse = _head(q[b, h], k[b, h], v[b, h], plan, mask.block_q, mask.block_k, scale)
            outs.append(out)
            lses.append(lse)
    return torch.stack(outs).unflatten(0, (batch, heads)), torch.stack(lses).unflatten(0, (batch, heads))


def _head(
    q: Tensor, k: Tensor, v: Tensor, plan: _Plan, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    tokens, dim = q.shape
    queries = pad(q, (0, 0, 0, -tokens % block_q)).unflatten(0, (-1, block_q)).index_select(0, plan.order)
    # Keys and values side by side: one gather fetches both.
    pairs = pad(torch.cat([k, v], -1), (0, 0, 0, -k.shape[0] % block_k)).view(-1, block_k * 2 * dim)
    outs, lses = [], []
    for group in plan.groups:
        rows, count = group.lists.shape
        if count == 0:
            outs.append(queries.new_zeros(rows, block_q, dim))
            lses.append(
                queries.new_full((rows, block_q), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
            )
            continue
        step = max(1, _CHUNK_BYTES // (count * pairs.shape[1] * pairs.element_size()))
        for i in range(0, rows, step):
            lists = group.lists[i : i + step]
            part = queries[group.start + i : group.start + i + len(lists), None]
            gathered = pairs.index_select(0, lists.flatten()).view(len(lists), 1, -1, 2 * dim)[:, :, : group.keys]
            bias = None if group.bias is None else group.bias[i : i + step].to(q.dtype)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                part, gathered[..., :dim], gathered[..., dim:], attn_mask=bias, scale=scale
            )
            outs.append(out[:, 0])
            lses.append(lse[:, 0])
    out = torch.cat(outs).index_select(0, plan.inverse).flatten(0, 1)[:tokens]
    return out, torch.cat(lses).index_select(0, plan.inverse).flatten()[:tokens]


def _plan(mask: BlockMask) -> list[list[_Plan]]:
    batch, heads = torch.broadcast_shapes(mask.indices.shape[:2], mask.lengths_k.shape[:2])
    width = mask.indices.shape[-1]
    listed = torch.arange(width) < mask.counts[..., None]
    indices = torch.where(listed, mask.indices, 0).long().expand(batch, heads, -1, -1)
    lengths = mask.lengths_k[:, :, None].expand(batch, heads, mask.num_q, -1).gather(-1, indices) * listed
    # Full blocks come first, so that a row whose only ragged block is the last can be cut short; a row with
    # several needs a bias. Blocks that are all padding come last and are dropped.
    kind = (lengths < mask.block_k).to(torch.int8) + (lengths == 0)
    order = kind.sort(dim=-1, stable=True).indices
    indices, lengths = indices.gather(-1, order), lengths.gather(-1, order)
    counts = (lengths > 0).sum(-1)
    biased = (counts - (kind == 0).sum(-1)) > 1
    keys = torch.where(biased, counts * mask.block_k, lengths.sum(-1))
    return [
        [
            _plan_head(indices[b, h], lengths[b, h], counts[b, h], keys[b, h], biased[b, h], mask.block_k)
            for h in range(heads)
        ]
        for b in range(batch)
    ]


def _plan_head(indices: Tensor, lengths: Tensor, counts: Tensor, keys: Tensor, biased: Tensor, block_k: int) -> _Plan:
    key = keys * 2 + biased
    key, order = key.sort(stable=True)
    groups, start = [], 0
    for size in key.unique_consecutive(return_counts=True)[1].tolist():
        rows = order[start : start + size]
        first = rows[0]
        count, bias = int(counts[first]), None
        if biased[first]:
            padding = torch.arange(block_k) >= lengths[rows, :count, None]
            bias = torch.zeros(padding.shape).masked_fill(padding, -torch.inf).flatten(1)[:, None, None]
        groups.append(_Group(start, indices[rows, :count].contiguous(), int(keys[first]), bias))
        start += size
    return _Plan(order, order.argsort(), groups)
