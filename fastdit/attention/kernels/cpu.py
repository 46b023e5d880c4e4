"""Attention of listed blocks on a CPU: rows with equally many keys are gathered and run as dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...mask import BlockMask
from .cpu_plan import Group, Plan, head_plans
from .means import block_means, dropped_blocks, log_sizes
from .options import Options

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_THREAD_BYTES = 2 << 20  # about what a core's L2 cache holds; larger chunks fall out of it
_MAX_BYTES = 64 << 20
_SLICE = 1 << 14  # index_select copies slices of 2**15 elements or more one by one, several times slower


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
    group: Group
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class _Means:
    """What stands in for the blocks that one head leaves out.

    Args:
        keys: ``(Nk, D)`` fp32 or fp64.
        values: ``(Nk, D)``, likewise.
        bias: ``(Nq, Nk)``, likewise, rows in the plan's order: log of a block's size, -inf where it is not left out.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


def available() -> str | None:
    """Return why this kernel cannot run on this machine: it always can."""
    return None


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> str | None:
    """Return why this kernel cannot run for these arguments, or ``None``.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        options: How.
    """
    if q.device.type != "cpu":
        return f"it needs CPU tensors, got {q.device}"
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"it takes fp64, fp32, bf16 and fp16, got {q.dtype}"
    if options.precision is not None:
        return f"it computes in the precision of its inputs; {options.precision} is not faster on a CPU"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the attention of listed blocks; the backward gathers again instead of keeping what was gathered.

    Args:
        q: ``(B, H, Sq, D)`` queries.
        k: ``(B, H, Sk, D)`` keys.
        v: ``(B, H, Sk, D)`` values.
        mask: The blocks.
        options: How.

    Returns:
        The output, ``(B, H, Sq, D)`` in the dtype of ``q``, and the natural log-sum-exp, ``(B, H, Sq)`` fp32 or
        fp64, which carries no gradient.
    """
    means = () if options.compensate is None else (block_means(k, mask), block_means(v, mask))
    return _BlockSparse.apply(mask, options.scale, q, k, v, *means)  # type: ignore[return-value]


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: BlockMask, scale: float, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, *means = tensors
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for b, h, plan in _heads(q, mask):
            stand_ins = _means(means, mask, plan, b, h)
            out[b, h], lse[b, h] = _head_forward(q[b, h], k[b, h], v[b, h], stand_ins, plan, mask, scale)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.mask, ctx.scale = mask, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        q, k, v, *means = tensors
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        for b, h, plan in _heads(q, ctx.mask):
            stand_ins = _means(means, ctx.mask, plan, b, h)
            head = [x[b, h] for x in (q, k, v, out, lse, grads[0])]
            for part, grad in zip(parts, _head_backward(head, stand_ins, plan, ctx.mask, ctx.scale), strict=True):
                part[b, h] = grad
        return None, None, *parts


def _heads(q: Tensor, mask: BlockMask) -> Iterator[tuple[int, int, Plan]]:
    plans = head_plans(mask)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            row = plans[b if len(plans) > 1 else 0]
            yield b, h, row[h if len(row) > 1 else 0]


def _means(means: list[Tensor], mask: BlockMask, plan: Plan, b: int, h: int) -> _Means | None:
    if not means:
        return None
    keys, values = means
    dropped, sizes = (
        x.expand(*keys.shape[:2], *x.shape[2:])[b, h] for x in (dropped_blocks(mask), log_sizes(mask, keys.dtype))
    )
    return _Means(keys[b, h], values[b, h], torch.where(dropped[plan.order], sizes, -torch.inf))


def _head_forward(
    q: Tensor, k: Tensor, v: Tensor, means: _Means | None, plan: Plan, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    dim = q.shape[1]
    queries = _blocks(q, mask.block_q).index_select(0, plan.order)
    keys, values = _blocks(k, mask.block_k), _blocks(v, mask.block_k)
    lse = torch.full_like(queries[..., 0], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    out = torch.zeros_like(queries, dtype=q.dtype if means is None else lse.dtype)
    if means is not None:
        _add_means(queries, means, out, lse, scale)
    workspace = q.new_empty(2, _workspace(plan, keys))
    for chunk in _chunks(plan, keys):
        part_out, part_lse = _attention(
            queries[chunk.rows].view(len(chunk.lists), 1, -1, dim),
            _gather(keys, chunk, workspace[0]),
            _gather(values, chunk, workspace[1]),
            attn_mask=chunk.bias,
            scale=scale,
        )
        part_out, part_lse = part_out.view(-1, mask.block_q, dim), part_lse.reshape(-1, mask.block_q)
        if means is not None:
            part_out, part_lse = _merge(out[chunk.rows], lse[chunk.rows], part_out, part_lse)
        out[chunk.rows], lse[chunk.rows] = part_out, part_lse
    return _restore(out, plan, len(q)), _restore(lse, plan, len(q))


def _add_means(queries: Tensor, means: _Means, out: Tensor, lse: Tensor, scale: float) -> None:
    # In fp32 even for bf16: the log of a size in bf16 would be off by 1 %, and this part is the small one.
    for rows, keys, values, bias in _mean_chunks(means):
        part_out, part_lse = _attention(queries[rows, None].to(keys.dtype), keys, values, attn_mask=bias, scale=scale)
        # A row without stand-ins comes back with 0 for its log-sum-exp.
        some = (bias > -torch.inf).any(-1)[:, 0]
        out[rows] = part_out[:, 0]
        lse[rows] = part_lse.view(lse[rows].shape).where(some, -torch.inf)


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, part_lse)
    return out * (lse - total).exp()[..., None] + part_out * (part_lse - total).exp()[..., None], total


def _head_backward(
    tensors: list[Tensor], means: _Means | None, plan: Plan, mask: BlockMask, scale: float
) -> list[Tensor]:
    # Each part of a softmax has the right gradient when its backward is given output and log-sum-exp of the whole.
    q, k, v, out, lse, grad = tensors
    dim = q.shape[1]
    queries, outs, grads = (_blocks(x, mask.block_q).index_select(0, plan.order) for x in (q, out, grad))
    lses = _blocks(lse[:, None], mask.block_q).index_select(0, plan.order)
    keys, values = _blocks(k, mask.block_k), _blocks(v, mask.block_k)
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (queries, keys, values))
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
        dq[chunk.rows] = part_q.reshape(-1, mask.block_q, dim).to(dq.dtype)
        for total, part in ((dk, part_k), (dv, part_v)):
            tail = chunk.lists.shape[1] * mask.block_k - part.shape[2]
            total.index_add_(
                0, chunk.lists.flatten(), pad(part, (0, 0, 0, tail)).view(-1, mask.block_k, dim).to(total.dtype)
            )
    of_means = [] if means is None else _means_backward(queries, grads, outs, lses[..., 0], means, dq, scale)
    return [_restore(dq, plan, len(q)), dk.flatten(0, 1)[: len(k)], dv.flatten(0, 1)[: len(v)], *of_means]


def _means_backward(
    queries: Tensor, grads: Tensor, outs: Tensor, lses: Tensor, means: _Means, dq: Tensor, scale: float
) -> list[Tensor]:
    totals = [torch.zeros_like(means.keys), torch.zeros_like(means.values)]
    # A row that attends to nothing at all must come out as 0, not as -inf minus -inf.
    lses = lses.where(lses > -torch.inf, 0)
    for rows, keys, values, bias in _mean_chunks(means):
        grad, query, out = (x[rows, None].to(keys.dtype) for x in (grads, queries, outs))
        part_q, *parts = _attention_backward(
            grad, query, keys, values, out, lses[rows, None], 0.0, False, attn_mask=bias, scale=scale
        )
        dq[rows] += part_q[:, 0]
        for total, part in zip(totals, parts, strict=True):
            total += part.sum(0)[0]
    return totals


def _mean_chunks(means: _Means) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    step = _step(means.keys)
    for start in range(0, len(means.bias), step):
        bias = means.bias[start : start + step, None, None]
        keys, values = (x.expand(len(bias), 1, -1, -1) for x in (means.keys, means.values))
        yield slice(start, start + step), keys, values, bias


def _blocks(x: Tensor, block: int) -> Tensor:
    return pad(x, (0, 0, 0, -len(x) % block)).contiguous().unflatten(0, (-1, block))


def _restore(x: Tensor, plan: Plan, tokens: int) -> Tensor:
    return x.index_select(0, plan.inverse).flatten(0, 1)[:tokens]


def _chunks(plan: Plan, keys: Tensor) -> Iterator[_Chunk]:
    for group in plan.groups:
        lists, count = group.lists.shape
        if count == 0:
            continue
        step = _step(keys[:count])
        for i in range(0, lists, step):
            part = group.lists[i : i + step]
            start = group.start + i * group.shared
            bias = None if group.bias is None else group.bias[i : i + step].to(keys.dtype)
            yield _Chunk(slice(start, start + len(part) * group.shared), part, group, bias)


def _step(keys: Tensor) -> int:
    budget = min(_MAX_BYTES, _THREAD_BYTES * torch.get_num_threads())
    return max(1, budget // (2 * keys.nbytes))


def _workspace(plan: Plan, keys: Tensor) -> int:
    sizes = [
        g.lists.shape[1] * min(len(g.lists), _step(keys[: max(1, g.lists.shape[1])]))
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
