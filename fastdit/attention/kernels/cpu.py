"""Attention of listed blocks on a CPU: rows with equally many keys are gathered and run as dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...mask import BlockMask

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_THREAD_BYTES = 2 << 20  # about what a core's L2 cache holds; larger chunks fall out of it
_MAX_BYTES = 64 << 20
_SLICE = 1 << 14  # index_select copies slices of 2**15 elements or more one by one, several times slower


@dataclass(frozen=True, eq=False)
class _Group:
    """Lists of equally many keys, each shared by equally many query blocks.

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
class _Plan:
    """The query blocks of one head, sorted into groups.

    Args:
        order: ``(Nq,)`` int64, the query blocks in the order in which they run.
        inverse: ``(Nq,)`` int64, the position of each query block in that order.
        groups: The groups, in that order.
    """

    order: Tensor
    inverse: Tensor
    groups: list[_Group]


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Lists that run in one go.

    Args:
        rows: Which query blocks, as a slice of the plan's order.
        lists: ``(R, count)`` int64 key blocks.
        group: Where they come from.
        bias: ``(R, 1, 1, keys)`` in the dtype of the queries, or ``None``.
    """

    rows: slice
    lists: Tensor
    group: _Group
    bias: Tensor | None


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
    """Compute the attention of listed blocks; the backward gathers again instead of keeping what was gathered.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        scale: Softmax scale.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the natural log-sum-exp, ``(B, H, Sq)`` fp32 or
        fp64, which carries no gradient.
    """
    return _BlockSparse.apply(q, k, v, mask, scale)  # type: ignore[return-value]


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for b, h, plan in _heads(q, mask):
            out[b, h], lse[b, h] = _head_forward(q[b, h], k[b, h], v[b, h], plan, mask, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale = mask, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for b, h, plan in _heads(q, ctx.mask):
            tensors = [x[b, h] for x in (q, k, v, out, lse, grads[0])]
            dq[b, h], dk[b, h], dv[b, h] = _head_backward(tensors, plan, ctx.mask, ctx.scale)
        return dq, dk, dv, None, None


def _heads(q: Tensor, mask: BlockMask) -> Iterator[tuple[int, int, _Plan]]:
    if "cpu" not in mask.derived:
        mask.derived["cpu"] = _plan(mask)
    plans = mask.derived["cpu"]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            row = plans[b if len(plans) > 1 else 0]
            yield b, h, row[h if len(row) > 1 else 0]


def _head_forward(q: Tensor, k: Tensor, v: Tensor, plan: _Plan, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    dim = q.shape[1]
    queries = _blocks(q, mask.block_q).index_select(0, plan.order)
    keys, values = _blocks(k, mask.block_k), _blocks(v, mask.block_k)
    out = torch.zeros_like(queries)
    lse = torch.full_like(queries[..., 0], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    workspace = q.new_empty(2, _workspace(plan, keys))
    for chunk in _chunks(plan, keys):
        part_out, part_lse = _attention(
            queries[chunk.rows].view(len(chunk.lists), 1, -1, dim),
            _gather(keys, chunk, workspace[0]),
            _gather(values, chunk, workspace[1]),
            attn_mask=chunk.bias,
            scale=scale,
        )
        out[chunk.rows] = part_out.view(-1, mask.block_q, dim)
        lse[chunk.rows] = part_lse.reshape(-1, mask.block_q)
    return _restore(out, plan, len(q)), _restore(lse, plan, len(q))


def _head_backward(tensors: list[Tensor], plan: _Plan, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, grad = tensors
    dim = q.shape[1]
    queries, outs, grads = (_blocks(x, mask.block_q).index_select(0, plan.order) for x in (q, out, grad))
    lses = _blocks(lse[:, None], mask.block_q).index_select(0, plan.order)
    keys, values = _blocks(k, mask.block_k), _blocks(v, mask.block_k)
    dq, dk, dv = (
        torch.zeros_like(queries),
        torch.zeros_like(keys, dtype=lse.dtype),
        torch.zeros_like(values, dtype=lse.dtype),
    )
    workspace = q.new_empty(2, _workspace(plan, keys))
    for chunk in _chunks(plan, keys):
        lists = len(chunk.lists)
        part_q, part_k, part_v = _attention_backward(
            grads[chunk.rows].view(lists, 1, -1, dim),
            queries[chunk.rows].view(lists, 1, -1, dim),
            _gather(keys, chunk, workspace[0]),
            _gather(values, chunk, workspace[1]),
            outs[chunk.rows].view(lists, 1, -1, dim),
            lses[chunk.rows].view(lists, 1, -1),
            0.0,
            False,
            attn_mask=chunk.bias,
            scale=scale,
        )
        dq[chunk.rows] = part_q.reshape(-1, mask.block_q, dim)
        for total, part in ((dk, part_k), (dv, part_v)):
            tail = chunk.lists.shape[1] * mask.block_k - part.shape[2]
            total.index_add_(
                0, chunk.lists.flatten(), pad(part, (0, 0, 0, tail)).view(-1, mask.block_k, dim).to(total.dtype)
            )
    return _restore(dq, plan, len(q)), dk.flatten(0, 1)[: len(k)], dv.flatten(0, 1)[: len(v)]


def _blocks(x: Tensor, block: int) -> Tensor:
    return pad(x, (0, 0, 0, -len(x) % block)).contiguous().unflatten(0, (-1, block))


def _restore(x: Tensor, plan: _Plan, tokens: int) -> Tensor:
    return x.index_select(0, plan.inverse).flatten(0, 1)[:tokens]


def _chunks(plan: _Plan, keys: Tensor) -> Iterator[_Chunk]:
    for group in plan.groups:
        lists, count = group.lists.shape
        if count == 0:
            continue
        step = _step(count, keys)
        for i in range(0, lists, step):
            part = group.lists[i : i + step]
            start = group.start + i * group.shared
            bias = None if group.bias is None else group.bias[i : i + step].to(keys.dtype)
            yield _Chunk(slice(start, start + len(part) * group.shared), part, group, bias)


def _step(count: int, keys: Tensor) -> int:
    budget = min(_MAX_BYTES, _THREAD_BYTES * torch.get_num_threads())
    return max(1, budget // (2 * count * keys[0].numel() * keys.element_size()))


def _workspace(plan: _Plan, keys: Tensor) -> int:
    sizes = [
        g.lists.shape[1] * min(len(g.lists), _step(max(1, g.lists.shape[1]), keys))
        for g in plan.groups
        if g.first is None
    ]
    return max(sizes, default=0) * keys[0].numel()


def _gather(blocks: Tensor, chunk: _Chunk, workspace: Tensor) -> Tensor:
    lists, count = chunk.lists.shape
    block, dim = blocks.shape[1:]
    first = chunk.group.first
    if first is not None:
        return blocks[first : first + count].view(1, 1, -1, dim)[:, :, : chunk.group.keys]
    parts = 1
    while block * dim // parts > _SLICE and block % (2 * parts) == 0:
        parts *= 2
    index = chunk.lists.flatten()
    if parts > 1:
        index = (index[:, None] * parts + torch.arange(parts)).flatten()
    gathered = workspace[: lists * count * block * dim].view(len(index), -1)
    torch.index_select(blocks.view(-1, gathered.shape[1]), 0, index, out=gathered)
    return gathered.view(lists, 1, -1, dim)[:, :, : chunk.group.keys]


def _plan(mask: BlockMask) -> list[list[_Plan]]:
    batch, heads = torch.broadcast_shapes(mask.indices.shape[:2], mask.lengths_k.shape[:2])
    listed = torch.arange(mask.indices.shape[-1]) < mask.counts[..., None]
    indices = torch.where(listed, mask.indices, 0).long().expand(batch, heads, -1, -1)
    lengths = mask.lengths_k[:, :, None].expand(batch, heads, mask.num_q, -1).gather(-1, indices) * listed
    # Full blocks come first, so that a row whose only ragged block is the last can be cut short; a row with
    # several needs a bias. Blocks that are all padding come last and are dropped.
    kind = (lengths < mask.block_k).to(torch.int8) + (lengths == 0)
    order = kind.sort(dim=-1, stable=True).indices
    lengths = lengths.gather(-1, order)
    indices = torch.where(lengths > 0, indices.gather(-1, order), -1)
    return [[_plan_head(indices[b, h], lengths[b, h], mask.block_k) for h in range(heads)] for b in range(batch)]


def _plan_head(indices: Tensor, lengths: Tensor, block_k: int) -> _Plan:
    lists, owner, shared = indices.unique(dim=0, return_inverse=True, return_counts=True)
    by_list = owner.sort(stable=True).indices
    starts = shared.cumsum(0) - shared
    lengths = lengths[by_list[starts]]
    counts = (lengths > 0).sum(-1)
    biased = ((lengths > 0) & (lengths < block_k)).sum(-1) > 1
    keys = torch.where(biased, counts * block_k, lengths.sum(-1))
    kinds, member = torch.stack([shared, keys, biased], 1).unique(dim=0, return_inverse=True)
    groups, order, start = [], [], 0
    for i, (share, used, bias) in enumerate(kinds.tolist()):
        rows = (member == i).nonzero()[:, 0]
        listed = lists[rows, : counts[rows[0]]].contiguous()
        added = None
        if bias:
            padding = torch.arange(block_k) >= lengths[rows, : listed.shape[1], None]
            added = torch.zeros(padding.shape).masked_fill(padding, -torch.inf).flatten(1)[:, None, None]
        consecutive = len(rows) == 1 and bool((listed[0].diff() == 1).all()) and used > 0
        groups.append(_Group(start, share, listed, used, added, int(listed[0, 0]) if consecutive else None))
        order.append(by_list[starts[rows][:, None] + torch.arange(share)].flatten())
        start += len(order[-1])
    order = torch.cat(order)
    return _Plan(order, order.argsort(), groups)
