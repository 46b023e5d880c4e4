"""Attention of listed blocks on a CPU: rows with equally many keys are gathered and run as dense attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...mask import BlockMask
from .cpu_plan import Plan, head_plans
from .means import block_means, dropped_blocks, log_sizes
from .options import Options

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_THREAD_BYTES = 2 << 20  # measured: smaller chunks cost calls, larger ones fall out of a core's caches
_MAX_BYTES = 64 << 20
_SLICE = 1 << 14  # index_select copies slices of 2**15 elements or more one by one, several times slower


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Lists that run in one go.

    Args:
        rows: Which query blocks, as a slice of the plan's order.
        lists: ``(R, count)`` int64 key blocks.
        keys: How many of the listed keys are used, the first ones.
        first: The first key block where there is one list of consecutive blocks, which need no gathering.
        bias: ``(R, 1, 1, keys)`` fp32 or fp64, or ``None``.
        listed: Whether every row has keys, beside those that stand in.
    """

    rows: slice
    lists: Tensor
    keys: int
    first: int | None
    bias: Tensor | None
    listed: bool


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The keys and values of one head; what stands in for blocks left out comes in blocks of its own after them.

    Args:
        keys: ``(Nk + M, block_k, D)``.
        values: ``(Nk + M, block_k, D)``.
        stand_ins: ``(Nq, M * block_k)`` fp32 or fp64, what is added to the logits of the last M blocks, rows in the
            plan's order: log of a block's size, -inf where it is not left out; ``None`` if there are no such blocks.
    """

    keys: Tensor
    values: Tensor
    stand_ins: Tensor | None


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
    if options.variant is not None:
        return f"it has no variants, got variant={options.variant!r}"
    if options.index is not None:
        return "it takes tokens in the order of the mask and no index; put them in order"
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
            blocks = _head_blocks([k, v, *means], mask, plan, b, h)
            out[b, h], lse[b, h] = _head_forward(q[b, h], blocks, plan, mask, scale)
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
            blocks = _head_blocks([k, v, *means], ctx.mask, plan, b, h)
            head = [x[b, h] for x in (q, out, lse, grads[0])]
            dq, *of_blocks = _head_backward(head, blocks, plan, ctx.mask, ctx.scale)
            parts[0][b, h] = dq
            for i, grad in enumerate(of_blocks):
                parts[1 + i][b, h] = grad[: ctx.mask.num_k].flatten(0, 1)[: k.shape[2]]
                if means:
                    parts[3 + i][b, h] = grad[ctx.mask.num_k :].flatten(0, 1)[: ctx.mask.num_k]
        return None, None, *parts


def _heads(q: Tensor, mask: BlockMask) -> Iterator[tuple[int, int, Plan]]:
    plans = head_plans(mask)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            row = plans[b if len(plans) > 1 else 0]
            yield b, h, row[h if len(row) > 1 else 0]


def _head_blocks(tensors: list[Tensor], mask: BlockMask, plan: Plan, b: int, h: int) -> _Blocks:
    keys, values = (_blocks(x[b, h], mask.block_k) for x in tensors[:2])
    if len(tensors) == 2:
        return _Blocks(keys, values, None)
    # In bf16 the log of a size would be off by 1 %.
    dtype = torch.promote_types(keys.dtype, torch.float32)
    more_keys, more_values = (_blocks(x[b, h].to(keys.dtype), mask.block_k) for x in tensors[2:])
    shape = torch.broadcast_shapes(mask.indices.shape[:2], mask.lengths_k.shape[:2])
    head = (b if shape[0] > 1 else 0, h if shape[1] > 1 else 0)
    dropped, sizes = (x.expand(*shape, *x.shape[2:])[head] for x in (dropped_blocks(mask), log_sizes(mask, dtype)))
    bias = torch.where(_reorder(dropped, plan), sizes, -torch.inf)
    bias = pad(bias, (0, len(more_keys) * mask.block_k - mask.num_k), value=-torch.inf)
    return _Blocks(torch.cat([keys, more_keys]), torch.cat([values, more_values]), bias)


def _head_forward(q: Tensor, blocks: _Blocks, plan: Plan, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    dim = q.shape[1]
    queries = _reorder(_blocks(q, mask.block_q), plan)
    lse = torch.full_like(queries[..., 0], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    out = torch.zeros_like(queries)
    workspace = q.new_empty(2, _workspace(plan, blocks))
    for chunk in _chunks(plan, blocks):
        part_out, part_lse = _attention(
            queries[chunk.rows].view(len(chunk.lists), 1, -1, dim),
            _gather(blocks.keys, chunk, workspace[0]),
            _gather(blocks.values, chunk, workspace[1]),
            attn_mask=chunk.bias,
            scale=scale,
        )
        if chunk.bias is not None and not chunk.listed:
            # A row without keys comes back with 0 for its log-sum-exp.
            part_lse = part_lse.view(len(chunk.lists), -1).where((chunk.bias > -torch.inf).any(-1)[:, 0], -torch.inf)
        out[chunk.rows], lse[chunk.rows] = part_out.view(-1, mask.block_q, dim), part_lse.reshape(-1, mask.block_q)
    return _restore(out, plan, len(q)), _restore(lse, plan, len(q))


def _head_backward(tensors: list[Tensor], blocks: _Blocks, plan: Plan, mask: BlockMask, scale: float) -> list[Tensor]:
    q, out, lse, grad = tensors
    dim = q.shape[1]
    queries, outs, grads = (_reorder(_blocks(x, mask.block_q), plan) for x in (q, out, grad))
    lses = _reorder(_blocks(lse[:, None], mask.block_q), plan)
    # A row that attends to nothing at all must come out as 0, not as -inf minus -inf.
    lses = lses.where(lses > -torch.inf, 0)
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (queries, blocks.keys, blocks.values))
    workspace = q.new_empty(2, _workspace(plan, blocks))
    for chunk in _chunks(plan, blocks):
        lists = len(chunk.lists)
        part_q, part_k, part_v = _attention_backward(
            grads[chunk.rows].view(lists, 1, -1, dim),
            queries[chunk.rows].view(lists, 1, -1, dim),
            _gather(blocks.keys, chunk, workspace[0]),
            _gather(blocks.values, chunk, workspace[1]),
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
    return [_restore(dq, plan, len(q)), dk, dv]


def _blocks(x: Tensor, block: int) -> Tensor:
    missing = -len(x) % block
    return (pad(x, (0, 0, 0, missing)) if missing else x).contiguous().unflatten(0, (-1, block))


def _reorder(x: Tensor, plan: Plan) -> Tensor:
    return x if plan.identity else x.index_select(0, plan.order)


def _restore(x: Tensor, plan: Plan, tokens: int) -> Tensor:
    return (x if plan.identity else x.index_select(0, plan.inverse)).flatten(0, 1)[:tokens]


def _chunks(plan: Plan, blocks: _Blocks) -> Iterator[_Chunk]:
    block = blocks.keys.shape[1]
    for group in plan.groups:
        lists, first, keys = group.lists, group.first, group.keys
        rows = slice(group.start, group.start + len(lists) * group.shared)
        added = None if group.bias is None else group.bias.to(torch.promote_types(blocks.keys.dtype, torch.float32))
        if blocks.stand_ins is not None:
            stand_ins = blocks.stand_ins[rows][:: group.shared, None, None]
            if bool((stand_ins > -torch.inf).any()):
                more = stand_ins.shape[-1] // block
                ids = torch.arange(len(blocks.keys) - more, len(blocks.keys), device=lists.device)
                lists, first = torch.cat([ids.expand(len(lists), -1), lists], 1), None
                added = stand_ins.new_zeros(len(lists), 1, 1, keys) if added is None else added
                added, keys = torch.cat([stand_ins, added], -1), keys + more * block
        if keys == 0:
            continue
        step = _step(blocks.keys[: lists.shape[1]])
        for i in range(0, len(lists), step):
            part = lists[i : i + step]
            start = group.start + i * group.shared
            bias = None if added is None else added[i : i + step]
            yield _Chunk(slice(start, start + len(part) * group.shared), part, keys, first, bias, group.keys > 0)


def _step(keys: Tensor) -> int:
    budget = min(_MAX_BYTES, _THREAD_BYTES * torch.get_num_threads())
    return max(1, budget // (2 * keys.nbytes))


def _workspace(plan: Plan, blocks: _Blocks) -> int:
    block, dim = blocks.keys.shape[1:]
    more = 0 if blocks.stand_ins is None else blocks.stand_ins.shape[-1] // block
    counts = [(len(group.lists), group.lists.shape[1] + more) for group in plan.groups if more or group.first is None]
    return max((min(lists, _step(blocks.keys[: max(1, n)])) * n for lists, n in counts), default=0) * block * dim


def _gather(blocks: Tensor, chunk: _Chunk, workspace: Tensor) -> Tensor:
    lists, count = chunk.lists.shape
    block, dim = blocks.shape[1:]
    if chunk.first is not None:
        return blocks[chunk.first : chunk.first + count].view(1, 1, -1, dim)[:, :, : chunk.keys]
    parts = 1
    while block * dim // parts > _SLICE and block % (2 * parts) == 0:
        parts *= 2
    index = chunk.lists.flatten()
    if parts > 1:
        index = (index[:, None] * parts + torch.arange(parts, device=index.device)).flatten()
    gathered = workspace[: lists * count * block * dim].view(len(index), -1)
    torch.index_select(blocks.view(-1, gathered.shape[1]), 0, index, out=gathered)
    return gathered.view(lists, 1, -1, dim)[:, :, : chunk.keys]
