"""In which order tokens are computed: a permutation with padding, and its exact inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .curve import curve_order
from .tokens import TokenSpec, VideoGrid

AXES = {"raster": "fhw", "token": "hwf"} | {axes: axes for axes in ("fhw", "fwh", "hfw", "hwf", "wfh", "whf")}
ORDERS = ("tile", "curve", *AXES)


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Put the tokens of a sequence into another order, with padding, and back.

    The video comes first and the text after it, whatever the model's own order. Each part starts on a block
    boundary, so no video token shares a block with text; the sequence may end inside a block.

    Args:
        index: ``(1 or H, S_padded)`` int64: the token at each position, -1 for padding. Within a block padding
            comes last, at the same positions for all heads.
        inverse: ``(1 or H, S)`` int64: the position of each token.
        block: Tokens per block that the padding was made for.
        video_blocks: How many blocks, the first ones, hold video.
        identity: Whether order and length are unchanged, so that nothing has to be copied.
    """

    index: Tensor
    inverse: Tensor
    block: int
    video_blocks: int
    identity: bool

    @classmethod
    def build(
        cls,
        tokens: TokenSpec,
        *,
        block: int,
        order: Tensor | None = None,
        segments: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenLayout:
        """Lay a sequence out in blocks.

        Args:
            tokens: What the sequence is made up of.
            block: Tokens per block, at least 1; every part starts on a multiple of it.
            order: ``(n,)`` or ``(H, n)`` int64, the video tokens in the order wanted; default: the one they come in,
                and so where ``tokens.ordered`` says that this is it.
            segments: ``(M,)`` int64, lengths of consecutive runs of ``order`` (the tiles, say), each of which is
                padded to a multiple of ``block``; default: one run.
            device: Where the index tensors shall be.

        Raises:
            ValueError: ``order`` is not a permutation of the video tokens, or ``segments`` do not add up to them.
        """
        count = tokens.grid.num_tokens
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        order = torch.arange(count, device="cpu") if order is None or tokens.ordered else order.cpu()
        order = order.view(-1, order.shape[-1])
        if not torch.equal(order.sort(-1).values, torch.arange(count, device="cpu").expand_as(order)):
            raise ValueError(f"order must list each of the {count} video tokens exactly once")
        segments = torch.tensor([count], device="cpu") if segments is None else segments.cpu()
        if int(segments.sum()) != count or int(segments.min()) < 1:
            raise ValueError(f"segments must be positive and add up to {count} tokens, got {segments.tolist()}")
        padded = (segments + block - 1) // block * block
        starts = padded.cumsum(0) - padded
        within = torch.arange(count, device="cpu") - (segments.cumsum(0) - segments).repeat_interleave(segments)
        position = starts.repeat_interleave(segments) + within
        video_blocks = int(padded.sum()) // block
        end = int(position[-1]) + 1 if tokens.text_tokens == 0 else video_blocks * block + tokens.text_tokens
        index = torch.full((order.shape[0], end), -1, dtype=torch.int64, device="cpu")
        index[:, position] = order + tokens.video.start
        if tokens.text_tokens:
            index[:, video_blocks * block :] = torch.arange(tokens.text.start, tokens.text.stop, device="cpu")
        inverse = torch.empty(order.shape[0], tokens.num_tokens, dtype=torch.int64, device="cpu")
        rows, positions = (index >= 0).nonzero(as_tuple=True)
        inverse[rows, index[rows, positions]] = positions
        natural = torch.arange(tokens.num_tokens, device="cpu")
        identity = end == tokens.num_tokens and bool((index == natural).all())
        return cls(index.to(device), inverse.to(device), block, video_blocks, identity)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the sequence, without padding."""
        return self.inverse.shape[-1]

    @property
    def padded_tokens(self) -> int:
        """Count the positions of the laid out sequence, with padding."""
        return self.index.shape[-1]

    @property
    def num_blocks(self) -> int:
        """Count the blocks of the laid out sequence, video and text."""
        return math.ceil(self.padded_tokens / self.block)

    @cached_property
    def source(self) -> Tensor:
        """Return ``(1 or H, S_padded)`` int64: the token copied to each position, any one where there is padding."""
        with torch.inference_mode(False):  # kept for later calls, which may want gradients
            return self.index.clamp(min=0)

    @cached_property
    def padding(self) -> Tensor:
        """Return ``(P,)`` int64: the positions that hold padding."""
        with torch.inference_mode(False):
            return (self.index[0] < 0).nonzero().flatten()

    @cached_property
    def block_lengths(self) -> Tensor:
        """Return ``(1 or H, N)`` int32: the real tokens of each block."""
        with torch.inference_mode(False):
            return self.lengths()

    def lengths(self, block: int | None = None) -> Tensor:
        """Count the real tokens of each block: ``(1 or H, N)`` int32.

        Args:
            block: Tokens per block; default: the layout's own. It must divide the layout's own.
        """
        return self._per_block((self.index >= 0).int(), block)

    def lengths_without(self, padding: Tensor, block: int | None = None) -> Tensor:
        """Count the tokens of each block that are not padding: ``(B, 1 or H, N)`` int32.

        Args:
            padding: ``(B, S)`` bool, True where a token of the sequence is padding.
            block: Tokens per block; default: the layout's own. It must divide the layout's own.
        """
        real = ~padding[:, self.source] & (self.index >= 0)
        return self._per_block(real.int(), block)

    def _per_block(self, real: Tensor, block: int | None) -> Tensor:
        block = self.block if block is None else block
        if self.block % block:
            raise ValueError(f"blocks of {block} do not fit a layout in blocks of {self.block}")
        real = torch.nn.functional.pad(real, (0, -real.shape[-1] % block))
        return real.unflatten(-1, (-1, block)).sum(-1, dtype=torch.int32)

    def apply(self, x: Tensor) -> Tensor:
        """Put tokens into this order; padding becomes 0.

        Args:
            x: ``(B, H, S, D)``.

        Returns:
            ``(B, H, S_padded, D)``; ``x`` itself if nothing changes.

        Raises:
            ValueError: ``x`` has another number of tokens.
        """
        _check_tokens(x, self.num_tokens)
        if self.identity:
            return x
        out = _take(x, self.source)
        return out if self.padded_tokens == self.num_tokens else out.index_fill_(2, self.padding, 0)

    def undo(self, x: Tensor) -> Tensor:
        """Put tokens back into the model's own order and drop the padding.

        Args:
            x: ``(B, H, S_padded, D)``.

        Returns:
            ``(B, H, S, D)``; ``x`` itself if nothing changes.

        Raises:
            ValueError: ``x`` has another number of positions.
        """
        _check_tokens(x, self.padded_tokens)
        if self.identity:
            return x
        return _take(x, self.inverse)


class StackedLayout(TokenLayout):
    """Give each head a layout of its own.

    Which token is where is put together each time it is asked for, and not kept: the layouts are few, but rows for all
    heads of all layers of a large model take gigabytes.

    Args:
        parts: For each head the layout of one order, of the same tokens and blocks.
    """

    parts: tuple[TokenLayout, ...]

    def __init__(self, parts: Sequence[TokenLayout]) -> None:
        first = parts[0]
        known = {"parts": tuple(parts), "block": first.block, "video_blocks": first.video_blocks, "identity": False}
        vars(self).update(known)

    @property
    def index(self) -> Tensor:
        """Return ``(H, S_padded)`` int64: the token at each position, -1 for padding."""
        return torch.cat([part.index for part in self.parts])

    @property
    def inverse(self) -> Tensor:
        """Return ``(H, S)`` int64: the position of each token."""
        return torch.cat([part.inverse for part in self.parts])

    @property
    def source(self) -> Tensor:
        """Return ``(H, S_padded)`` int64: the token copied to each position, any one where there is padding."""
        return self.index.clamp(min=0)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the sequence, without padding."""
        return self.parts[0].num_tokens

    @property
    def padded_tokens(self) -> int:
        """Count the positions of the laid out sequence, with padding."""
        return self.parts[0].padded_tokens


def stack_heads(layouts: Sequence[TokenLayout]) -> TokenLayout:
    """Give each head a layout of its own; where all have the same, that serves them all.

    Args:
        layouts: For each head the layout of one order, of the same tokens and blocks.
    """
    first = layouts[0]
    return first if all(layout is first for layout in layouts) else StackedLayout(layouts)


def _check_tokens(x: Tensor, count: int) -> None:
    if x.ndim != 4 or x.shape[2] != count:
        raise ValueError(f"the layout takes (B, H, {count}, D), got {tuple(x.shape)}")


def _take(x: Tensor, index: Tensor) -> Tensor:
    if index.shape[0] == 1:
        return x.index_select(2, index[0])
    return x.gather(2, index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


def order_without_gaps(
    tokens: TokenSpec, order: Tensor, *, block: int, segments: Tensor | None = None
) -> Tensor | None:
    """Return an order of the video, ``(n,)`` int64, if tokens that come in it need no copies, and it is not raster.

    Args:
        tokens: What the sequence is made up of.
        order: ``(n,)`` int64, as for ``TokenLayout.build``.
        block: Likewise.
        segments: ``(M,)`` int64, likewise.
    """
    layout = TokenLayout.build(replace(tokens, ordered=True), block=block, segments=segments)
    natural = torch.equal(order, torch.arange(len(order), device="cpu"))
    return order if layout.identity and not natural else None


def token_order(grid: VideoGrid, order: str, tile: tuple[int, int, int] = (4, 4, 4)) -> Tensor:
    """List the tokens of a video in an order given by name: ``(n,)`` int64.

    Args:
        grid: The video tokens.
        order: One of ``ORDERS``: ``"raster"``; ``"token"``, all frames of one position together; ``"tile"``;
            ``"curve"``, along a space-filling curve; or three axes, slowest first, such as ``"hwf"``.
        tile: ``(frames, height, width)`` of a tile, each at least 1; only ``"tile"`` uses it.

    Raises:
        ValueError: There is no such order, or a tile axis is smaller than 1.
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
        ValueError: ``axes`` is no permutation of ``"fhw"``.
    """
    if sorted(axes) != ["f", "h", "w"]:
        raise ValueError(f"axes must be a permutation of 'fhw', got {axes!r}")
    places = torch.arange(grid.num_tokens, device="cpu").view(grid.shape)
    return places.permute(["fhw".index(a) for a in axes]).flatten()


def tile_parts(grid: VideoGrid, tile: tuple[int, int, int]) -> list[tuple[VideoGrid, tuple[int, int, int]]]:
    """Split a video into the runs of frames that are cut into tiles separately, each with its tile.

    Video autoencoders code the first picture by itself and the later ones several to a frame, so the first frame is
    unlike the others, and it is the others whose number tiles of several frames divide. Where tiles have several
    frames, the first frame is therefore cut into flat tiles of as many tokens.

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
    frames = min(frames, grid.num_tokens)  # which bounds the search for divisors
    tall = max(n for n in range(1, math.isqrt(frames) + 1) if frames % n == 0)
    first = (replace(grid, frames=1), (1, height * tall, width * (frames // tall)))
    return [first] if grid.frames == 1 else [first, (replace(grid, frames=grid.frames - 1), tile)]


def fitting_tile(grid: VideoGrid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the tile, of as many frames and at most as many tokens as a given one, that cuts a video into the fewest.

    Where tiles become blocks, the fewest have the least padding. Of shapes that cut it into equally few, the one with
    the most whole tiles of all the tokens is taken, then the nearest to the given one.

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
