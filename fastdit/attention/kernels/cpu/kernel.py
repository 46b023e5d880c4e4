"""Block-sparse attention on CPUs: rows with equally many keys are gathered and run as dense attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ....mask import BlockMask
from ..means import block_means
from ..options import Options
from ..stand_ins import dropped_blocks, log_sizes
from .grouping import Plan, head_plans
from .workers import run_jobs, usable_threads

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Bytes of keys and values; smaller chunks cost calls, larger ones exceed a core's cache (measured).
_CHUNK_BYTES = 2 << 20
_QUERIES = 1 << 10  # most queries of one list in a chunk
_PRODUCTS = 25_000_000  # multiplications worth one thread, about 1 ms of a core
_SLICE = 1 << 14  # index_select copies slices of 2**15 elements or more one by one, several times slower


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Key lists that run in one call.

    Args:
        rows: Which query blocks, as a slice of the plan's order.
        lists: ``(R, count)`` int64 key blocks.
        keys: How many of the listed keys are used, the first ones.
        first: The first key block where there is one list of consecutive blocks, which need no gathering.
        bias: ``(R, 1, 1, keys)`` fp32 or fp64, or ``None``.
        listed: Whether every row has keys besides the means of skipped blocks.
    """

    rows: slice
    lists: Tensor
    keys: int
    first: int | None
    bias: Tensor | None
    listed: bool


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The keys and values of one head, followed by the means of skipped blocks in blocks of their own.

    Args:
        keys: ``(Nk + M, block_k, D)``.
        values: ``(Nk + M, block_k, D)``.
        stand_ins: ``(Nq, M * block_k)`` fp32 or fp64, bias on the logits of the last M blocks, rows in the plan's
            order: log of a block's size, -inf where the block is not skipped; ``None`` without means.
    """

    keys: Tensor
    values: Tensor
    stand_ins: Tensor | None


def available() -> str | None:
    """Return why this kernel cannot run on this machine: it always can."""
    return None


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: Options) -> str | None:
    """Return why this kernel cannot run for these arguments, or ``None``."""
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
    """Compute the attention of listed blocks; the backward gathers again instead of keeping what was gathered."""
    means = () if options.compensate is None else (block_means(k, mask), block_means(v, mask))
    return _BlockSparse.apply(mask, options.scale, q, k, v, *means)  # type: ignore[return-value]


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: BlockMask, scale: float, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        q = tensors[0]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        heads = list(_heads(tensors, mask, scale))
        run_jobs((_Forward(head, out, lse) for head in heads), _threads(heads, 1))
        ctx.save_for_backward(out, lse, *tensors)
        ctx.mask, ctx.scale = mask, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        heads = list(_heads(tensors, ctx.mask, ctx.scale))
        run_jobs((_Backward(head, out, lse, grads[0], parts) for head in heads), _threads(heads, 2.5))
        return None, None, *parts


@dataclass(frozen=True, eq=False)
class _Head:
    """One head of a call.

    Args:
        at: Sample and head.
        plan: How it runs.
        mask: The blocks.
        scale: Softmax scale.
        tensors: Queries, keys, values, and with compensation the mean keys and values, of all heads.
        stand_ins: The skipped blocks and the log of their sizes, ``(Nq, Nk)`` bool and ``(Nk,)``; ``None`` without
            compensation.
    """

    at: tuple[int, int]
    plan: Plan
    mask: BlockMask
    scale: float
    tensors: Sequence[Tensor]
    stand_ins: tuple[Tensor, Tensor] | None

    @property
    def products(self) -> int:
        """Count the multiplications of the forward in listed blocks."""
        pairs = sum(len(group.lists) * group.shared * group.keys for group in self.plan.groups)
        return 2 * pairs * self.mask.block_q * self.tensors[0].shape[3]

    def queries(self, x: Tensor) -> Tensor:
        """Take what belongs to the queries of this head: ``(Nq, block_q, D)``, in the plan's order.

        Args:
            x: ``(B, H, Sq, D)``.
        """
        return _reorder(_blocks(x[self.at], self.mask.block_q), self.plan)

    def blocks(self) -> _Blocks:
        """Take the keys and values of this head."""
        keys, values = (_blocks(x[self.at], self.mask.block_k) for x in self.tensors[1:3])
        if self.stand_ins is None:
            return _Blocks(keys, values, None)
        more_keys, more_values = (_blocks(x[self.at].to(keys.dtype), self.mask.block_k) for x in self.tensors[3:])
        dropped, sizes = self.stand_ins
        bias = torch.where(_reorder(dropped, self.plan), sizes, -torch.inf)
        bias = pad(bias, (0, len(more_keys) * self.mask.block_k - self.mask.num_k), value=-torch.inf)
        return _Blocks(torch.cat([keys, more_keys]), torch.cat([values, more_values]), bias)


def _heads(tensors: Sequence[Tensor], mask: BlockMask, scale: float) -> Iterator[_Head]:
    q, plans, means = tensors[0], head_plans(mask), len(tensors) > 3
    if means:
        # In bf16 the log of a size would be off by 1 %.
        sizes = log_sizes(mask, torch.promote_types(q.dtype, torch.float32))
        dropped, sizes = dropped_blocks(mask).expand(*q.shape[:2], -1, -1), sizes.expand(*q.shape[:2], -1)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            row = plans[b if len(plans) > 1 else 0]
            plan = row[h if len(row) > 1 else 0]
            yield _Head((b, h), plan, mask, scale, tensors, (dropped[b, h], sizes[b, h]) if means else None)


def _threads(heads: list[_Head], products: float) -> int:
    return max(1, min(usable_threads(), int(products * sum(head.products for head in heads) / _PRODUCTS)))


class _Forward:
    def __init__(self, head: _Head, out: Tensor, lse: Tensor) -> None:
        self._head, self._results = head, (out, lse)

    def start(self) -> Iterator[_Chunk]:
        head = self._head
        self._blocks = head.blocks()
        self._queries = head.queries(head.tensors[0])
        dtype = torch.promote_types(self._queries.dtype, torch.float32)
        self._lse = torch.full_like(self._queries[..., 0], -torch.inf, dtype=dtype)
        self._out = torch.zeros_like(self._queries)
        return _chunks(head.plan, self._blocks, head.mask.block_q)

    def step(self, step: _Chunk) -> None:
        lists, dim = len(step.lists), self._queries.shape[2]
        out, lse = _attention(
            self._queries[step.rows].view(lists, 1, -1, dim),
            _gather(self._blocks.keys, step),
            _gather(self._blocks.values, step),
            attn_mask=step.bias,
            scale=self._head.scale,
        )
        if step.bias is not None and not step.listed:
            # The kernel returns a log-sum-exp of 0 for rows without keys.
            lse = lse.view(lists, -1).where((step.bias > -torch.inf).any(-1)[:, 0], -torch.inf)
        block = self._head.mask.block_q
        self._out[step.rows], self._lse[step.rows] = out.view(-1, block, dim), lse.reshape(-1, block)

    def finish(self) -> None:
        for whole, part in zip(self._results, (self._out, self._lse), strict=True):
            whole[self._head.at] = _restore(part, self._head.plan, whole.shape[2])


class _Backward:
    def __init__(self, head: _Head, out: Tensor, lse: Tensor, grad: Tensor, parts: list[Tensor]) -> None:
        self._head, self._inputs, self._results = head, (out, grad, lse[..., None]), parts
        self._lock = Lock()
        self._waiting: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._added = 0

    def start(self) -> Iterator[tuple[int, _Chunk]]:
        head = self._head
        self._blocks = head.blocks()
        self._queries, self._out, self._grad, lse = (head.queries(x) for x in (head.tensors[0], *self._inputs))
        # Rows without any key must yield 0, not -inf minus -inf.
        self._lse = lse.where(lse > -torch.inf, 0)
        like = (self._queries, self._blocks.keys, self._blocks.values)
        self._dq, self._dk, self._dv = (torch.zeros_like(x, dtype=lse.dtype) for x in like)
        return enumerate(_chunks(head.plan, self._blocks, head.mask.block_q))

    def step(self, step: tuple[int, _Chunk]) -> None:
        number, chunk = step
        lists, dim = len(chunk.lists), self._queries.shape[2]
        dq, dk, dv = _attention_backward(
            self._grad[chunk.rows].view(lists, 1, -1, dim),
            self._queries[chunk.rows].view(lists, 1, -1, dim),
            _gather(self._blocks.keys, chunk),
            _gather(self._blocks.values, chunk),
            self._out[chunk.rows].view(lists, 1, -1, dim),
            self._lse[chunk.rows].view(lists, 1, -1),
            0.0,
            False,
            attn_mask=chunk.bias,
            scale=self._head.scale,
        )
        self._dq[chunk.rows] = dq.reshape(-1, self._head.mask.block_q, dim).to(self._dq.dtype)
        # Sums are added in the order of the chunks, so results do not depend on thread timing.
        with self._lock:
            self._waiting[number] = (chunk.lists, dk, dv)
            while self._added in self._waiting:
                self._add(*self._waiting.pop(self._added))
                self._added += 1

    def _add(self, lists: Tensor, *parts: Tensor) -> None:
        block = self._head.mask.block_k
        for total, part in zip((self._dk, self._dv), parts, strict=True):
            tail = lists.shape[1] * block - part.shape[2]
            part = pad(part, (0, 0, 0, tail)).view(-1, block, part.shape[3])
            total.index_add_(0, lists.flatten(), part.to(total.dtype))

    def finish(self) -> None:
        head, num_k = self._head, self._head.mask.num_k
        dq, *of_keys = self._results
        dq[head.at] = _restore(self._dq, head.plan, dq.shape[2])
        for i, total in enumerate((self._dk, self._dv)):
            of_keys[i][head.at] = total[:num_k].flatten(0, 1)[: of_keys[i].shape[2]]
            if head.stand_ins is not None:
                of_keys[2 + i][head.at] = total[num_k:].flatten(0, 1)[:num_k]


def _blocks(x: Tensor, block: int) -> Tensor:
    missing = -len(x) % block
    return (pad(x, (0, 0, 0, missing)) if missing else x).contiguous().unflatten(0, (-1, block))


def _reorder(x: Tensor, plan: Plan) -> Tensor:
    return x if plan.identity else x.index_select(0, plan.order)


def _restore(x: Tensor, plan: Plan, tokens: int) -> Tensor:
    return (x if plan.identity else x.index_select(0, plan.inverse)).flatten(0, 1)[:tokens]


def _chunks(plan: Plan, blocks: _Blocks, block_q: int) -> Iterator[_Chunk]:
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
        most = max(1, _QUERIES // block_q)
        step = 1 if group.shared > most else max(1, _CHUNK_BYTES // (2 * blocks.keys[: lists.shape[1]].nbytes))
        for i in range(0, len(lists), step):
            part = lists[i : i + step]
            bias = None if added is None else added[i : i + step]
            start, end = (group.start + n * group.shared for n in (i, i + len(part)))
            width = most if group.shared > most else end - start
            for row in range(start, end, width):
                yield _Chunk(slice(row, min(row + width, end)), part, keys, first, bias, group.keys > 0)


def _gather(blocks: Tensor, chunk: _Chunk) -> Tensor:
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
    gathered = blocks.view(-1, block * dim // parts).index_select(0, index)
    return gathered.view(lists, 1, -1, dim)[:, :, : chunk.keys]
