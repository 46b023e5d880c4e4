"""A space-filling curve through a box of any size: neighbours in the sequence are neighbours in the video."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tokens import VideoGrid


def curve_order(grid: VideoGrid) -> Tensor:
    """List the tokens of a video along a curve that stays local, as Hilbert's does, on any grid: ``(n,)`` int64.

    Every two tokens in a row differ by one step along one axis, whatever the three sizes are.

    Args:
        grid: The video tokens.

    Source: the idea of Hilbert curves for boxes of any size, as Video-BLADE uses them (arXiv 2508.10774); the
    division into parts is our own.
    """
    sizes = grid.shape
    # A path between two corners along an even side always exists; one along an odd side only if all are odd.
    axes = sorted(range(3), key=lambda axis: (sizes[axis] % 2, -sizes[axis]))
    a, b, c = (sizes[axis] for axis in axes)
    with torch.device("cpu"):
        path = _path(a, b, c, {})
        strides = torch.tensor([grid.frame_tokens, grid.width, 1])
    return (path * strides[axes]).sum(1)


def _path(a: int, b: int, c: int, known: dict[tuple[int, int, int], Tensor]) -> Tensor:
    """Walk a box from its corner (0, 0, 0) to (a - 1, 0, 0): ``(a * b * c, 3)``; ``a`` is even or all are odd."""
    if (a, b, c) not in known:
        known[a, b, c] = _walk(a, b, c, known)
    return known[a, b, c]


def _walk(a: int, b: int, c: int, known: dict[tuple[int, int, int], Tensor]) -> Tensor:
    if b < c:
        return _path(a, c, b, known)[:, [0, 2, 1]]
    if b == 1:
        return torch.stack([torch.arange(a), torch.zeros(a, dtype=torch.int64), torch.zeros(a, dtype=torch.int64)], 1)
    if a >= 4 and (b == 2 or 3 * a >= 4 * b):
        # two boxes, one after the other
        first = a - _even_half(a)
        rest = _path(a - first, b, c, known) + torch.tensor([first, 0, 0])
        return torch.cat([_path(first, b, c, known), rest])
    # up along b in one box, over the top in a second, down along b in a third
    height = b if a == b == 2 else _even_half(b)
    up = _path(height, a // 2, c, known)[:, [1, 0, 2]]
    down = _path(height, a - a // 2, c, known)[:, [1, 0, 2]] * torch.tensor([-1, -1, 1])
    over = [_path(a, b - height, c, known) + torch.tensor([0, height, 0])] if height < b else []
    return torch.cat([up, *over, down + torch.tensor([a - 1, height - 1, 0])])


def _even_half(n: int) -> int:
    """Return the even number closest to half of ``n``, at least 2."""
    return max(2, 2 * math.floor(n / 4 + 0.5))
