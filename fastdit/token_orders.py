"""Token orders of a video: by axes, by tiles, along a space-filling curve."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .tokens import VideoGrid

AXES = {"raster": "fhw", "token": "hwf"} | {axes: axes for axes in ("fhw", "fwh", "hfw", "hwf", "wfh", "whf")}
ORDERS = ("tile", "curve", *AXES)


def token_order(grid: VideoGrid, order: str, tile: tuple[int, int, int] = (4, 4, 4)) -> Tensor:
    """List the tokens of a video in a named order: ``(n,)`` int64.

    Args:
        grid: The video tokens.
        order: One of ``ORDERS``: ``"raster"``; ``"token"``, all frames of one position together; ``"tile"``;
            ``"curve"``, along a space-filling curve; or three axes, slowest first, such as ``"hwf"``.
        tile: ``(frames, height, width)`` of a tile, each at least 1; only ``"tile"`` uses it.

    Raises:
        ValueError: The order is unknown, or a tile axis is smaller than 1.
    """
    if order == "tile":
        return tile_order(grid, tile)[0]
    if order == "curve":
        return curve_order(grid)
    if order in AXES:
        return axis_order(grid, AXES[order])
    raise ValueError(f"unknown order {order!r}; orders are: {', '.join(ORDERS)}")


def axis_order(grid: VideoGrid, axes: str) -> Tensor:
    """List the tokens of a video with its axes in another order: ``(n,)`` int64.

    Args:
        grid: The video tokens.
        axes: A permutation of ``"fhw"``, slowest axis first. ``"fhw"`` is raster order; ``"hwf"`` keeps all
            frames of one position together (token-major).

    Raises:
        ValueError: ``axes`` is not a permutation of ``"fhw"``.
    """
    if sorted(axes) != ["f", "h", "w"]:
        raise ValueError(f"axes must be a permutation of 'fhw', got {axes!r}")
    places = torch.arange(grid.num_tokens, device="cpu").view(grid.shape)
    return places.permute(["fhw".index(a) for a in axes]).flatten()


def tile_parts(grid: VideoGrid, tile: tuple[int, int, int]) -> list[tuple[VideoGrid, tuple[int, int, int]]]:
    """Split a video into runs of frames with their own tile each.

    Video autoencoders encode the first picture separately and the later ones several to a frame. The first frame
    differs from the others, and tiles of several frames divide the number of the others. For tiles of several frames,
    the first frame is therefore cut into flat tiles of the same number of tokens.

    Args:
        grid: The video tokens.
        tile: ``(frames, height, width)`` of a tile, each at least 1.

    Raises:
        ValueError: A tile axis is smaller than 1.
    """
    if min(tile) < 1:
        raise ValueError(f"a tile needs at least one token along every axis, got {tile}")
    frames, height, width = tile
    if frames == 1:
        return [(grid, tile)]
    frames = min(frames, grid.num_tokens)  # bounds the search for divisors
    tall = max(n for n in range(1, math.isqrt(frames) + 1) if frames % n == 0)
    first = (replace(grid, frames=1), (1, height * tall, width * (frames // tall)))
    return [first] if grid.frames == 1 else [first, (replace(grid, frames=grid.frames - 1), tile)]


def fitting_tile(grid: VideoGrid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the tile that cuts a video into the fewest tiles, with the frames and at most the tokens of a given one.

    If tiles become blocks, the fewest tiles have the least padding. Ties go to the shape with the most whole tiles of
    the full number of tokens, then to the nearest to the given one.

    Args:
        grid: The video tokens.
        tile: ``(frames, height, width)``, each at least 1. No side gets shorter than half of its own or longer than
            twice.
    """
    frames, height, width = tile

    def rank(shape: tuple[int, int, int]) -> tuple[int, int, float, tuple[int, int, int]]:
        parts = tile_parts(grid, shape)
        count = sum(math.prod(-(-n // t) for n, t in zip(part.shape, box, strict=True)) for part, box in parts)
        whole = sum(math.prod(n // t for n, t in zip(part.shape, box, strict=True)) for part, box in parts)
        whole = whole if math.prod(shape) == math.prod(tile) else 0
        distance = abs(math.log(shape[1] / height)) + abs(math.log(shape[2] / width))
        return count, -whole, round(distance, 6), shape

    heights, widths = (range((side + 1) // 2, 2 * side + 1) for side in (height, width))
    return min(((frames, h, w) for h in heights for w in widths if h * w <= height * width), key=rank)


def tile_order(grid: VideoGrid, tile: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """List the tokens of a video tile by tile; tiles at the far ends may be smaller.

    Args:
        grid: The video tokens.
        tile: ``(frames, height, width)`` of a tile, each at least 1; see ``tile_parts`` for the first frame.

    Returns:
        The order, ``(n,)`` int64, and the true size of each tile, ``(M,)`` int64; tiles and the tokens in them
        are in raster order.

    Raises:
        ValueError: A tile axis is smaller than 1.
    """
    orders, sizes, start = [], [], 0
    for part, box in tile_parts(grid, tile):
        box = [min(n, t) for n, t in zip(part.shape, box, strict=True)]
        axes = [torch.arange(n, device="cpu") // t for n, t in zip(part.shape, box, strict=True)]
        counts = [math.ceil(n / t) for n, t in zip(part.shape, box, strict=True)]
        f, h, w = torch.meshgrid(*axes, indexing="ij")
        tile_of = ((f * counts[1] + h) * counts[2] + w).flatten()
        orders.append(tile_of.sort(stable=True).indices + start)
        sizes.append(tile_of.bincount(minlength=math.prod(counts)))
        start += part.num_tokens
    return torch.cat(orders), torch.cat(sizes)


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
