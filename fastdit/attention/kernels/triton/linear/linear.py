"""Linear attention over listed blocks, forward and backward, for NVIDIA GPUs from compute capability 8.0 on.

Each key block is summed up to a state, a product with the map of blocks adds states up for each query block, and
queries are multiplied with theirs; features are computed where they are used and never lie in memory. States are larger
than what they sum up, so a few heads run at a time, in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import triton
from torch import Tensor

from ...device import launching_on
from .states import state_parts, state_width, sum_blocks_up, sum_states, sums_constants
from .tiles import SlaConfig, choose_sla
from .tokens import Join, gradients_of, output_of

STATE_BYTES = 256 << 20  # states of the heads that run at once, and as much again for their sums; one head always runs
_AT_ONCE = 64  # states that a sum over all blocks is made of

Place: TypeAlias = tuple[int, slice]


@dataclass(frozen=True, eq=False)
class Listed:
    """The keys that are summed for each query, and their feature map.

    Args:
        blocks: ``(B or 1, H or 1, N, N)`` bool, the key blocks of each query block; ``None`` for all.
        lengths: ``(B or 1, H or 1, N)`` int32, real keys of each block, the first ones in it.
        block: Tokens per block, a multiple of 16.
        feature_map: One of ``MAPS``.
    """

    blocks: Tensor | None
    lengths: Tensor
    block: int
    feature_map: str


def linear_fwd(q: Tensor, k: Tensor, v: Tensor, listed: Listed, join: Join | None = None) -> Tensor:
    """Launch the forward kernels.

    Args:
        q: ``(B, H, S, E)`` queries or their features.
        k: ``(B, H, S, E)`` keys or their features; padding may hold anything.
        v: ``(B, H, S, D)`` values, likewise.
        listed: What is summed up.
        join: What the output is joined to, if not to be returned as it is.

    Returns:
        ``(B, H, S, D)`` in the dtype of ``v``, or that of the exact part, contiguous. Before it is joined it is 0 for
        queries without keys.
    """
    q, k, v = (_packed(x) for x in (q, k, v))
    out = torch.empty_like(v if join is None else join.exact, memory_format=torch.contiguous_format)
    shared = listed.block, listed.feature_map, choose_sla(v)
    with launching_on(v.device):
        for at, part in _parts(k, v, listed, shared):
            output_of(q[at], part.sum_up(k[at], v[at]), *shared, out[at], None if join is None else _join(join, at))
    return out


def linear_bwd(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, listed: Listed) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels, which compute the states again; no two programs add to one sum.

    Arguments as for ``linear_fwd``.

    Args:
        grad: ``(B, H, S, D)`` gradient of the output.

    Returns:
        The gradients of q, k and v, ``(B, H, S, E)``, twice, and ``(B, H, S, D)``, in their dtypes, contiguous; 0 for
        padded keys.
    """
    grad, q, k, v = (_packed(x) for x in (grad, q, k, v))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    shared = listed.block, listed.feature_map, choose_sla(v)
    with launching_on(v.device):
        for at, part in _parts(k, v, listed, shared):
            weights = torch.empty(len(q[at]), 2, q.shape[2], dtype=torch.float32, device=q.device)
            gradients_of(q[at], grad[at], part.sum_up(k[at], v[at]), part.lengths, *shared, dq[at], None, weights)
            sums = part.sum_up(q[at], grad[at], weights)
            gradients_of(k[at], v[at], sums, part.lengths, *shared, dk[at], dv[at], None)
    return dq, dk, dv


class _Part:
    """A few heads of one sample, and the memory for their states and sums of states."""

    def __init__(
        self,
        blocks: Tensor | None,
        lengths: Tensor,
        shared: tuple[int, str, SlaConfig],
        constants: dict[str, int | bool],
        states: Tensor,
        sums: Tensor,
    ) -> None:
        self.blocks, self.lengths = blocks, lengths.contiguous().expand(len(states), -1)
        self.shared, self.constants = shared, constants
        self.states, self.sums = states, sums

    def sum_up(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum the keys of each query block, or with weights the queries of each key block."""
        sum_blocks_up(x, y, weights, self.lengths, *self.shared, self.states)
        listed = self._listed(turned=weights is not None)
        sum_states(listed, self.states, self.shared[2], self.constants, self.sums)
        return self.sums

    def _listed(self, *, turned: bool) -> Tensor:
        (heads, num), count = self.states.shape[:2], self.sums.shape[1]
        maps = 1 if self.blocks is None else len(self.blocks)
        listed = self.states.new_zeros(maps, _rounded(count, self.shared[2].rows), num)
        if self.blocks is None:
            listed.fill_(1)
        else:
            listed[:, :count, :count] = self.blocks.mT if turned else self.blocks
        return listed.expand(heads, -1, -1)


def _parts(k: Tensor, v: Tensor, listed: Listed, shared: tuple[int, str, SlaConfig]) -> Iterator[tuple[Place, _Part]]:
    blocks, lengths, config = listed.blocks, listed.lengths, shared[2]
    batch, heads, _, features = k.shape
    num = lengths.shape[-1]
    constants = sums_constants(features, v.shape[3], v.dtype, config)
    # For a sum over all blocks a state is that of several.
    states = _rounded(min(num, _AT_ONCE) if blocks is None else num, config.step)
    shape = state_parts(v.dtype), state_width(features, v.shape[3])
    step = min(heads, max(1, STATE_BYTES // (states * shape[0] * shape[1] * 2)))
    space = torch.empty(step, states, *shape, dtype=torch.bfloat16, device=v.device)
    sums = torch.empty(step, 1 if blocks is None else num, *shape, dtype=torch.bfloat16, device=v.device)
    for b in range(batch):
        for first in range(0, heads, step):
            at = b, slice(first, min(first + step, heads))
            count = at[1].stop - first
            yield at, _Part(_cut(blocks, at), _cut(lengths, at), shared, constants, space[:count], sums[:count])


def _join(join: Join, at: Place) -> Join:
    exact = _packed(join.exact[at])
    shares = None if join.shares is None else _packed(_cut(join.shares, at)).expand(len(exact), -1)
    return replace(join, exact=exact, shares=shares)


def _cut(x: Tensor | None, at: Place) -> Tensor | None:
    """Take one sample and some heads of what may serve all of either."""
    if x is None:
        return None
    x = x[at[0] if len(x) > 1 else 0]
    return x[at[1]] if len(x) > 1 else x


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rounded(count: int, unit: int) -> int:
    return triton.cdiv(count, unit) * unit
