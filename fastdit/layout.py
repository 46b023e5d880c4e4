"""Token layouts: a permutation of tokens with padding, and its exact inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .tokens import TokenSpec


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """A permutation of the tokens of a sequence into padded blocks, and its inverse.

    The video comes first and the text after it, regardless of the model's order. Each part starts on a block
    boundary, so no video token shares a block with text; the sequence may end inside a block.

    Args:
        index: ``(1 or H, S_padded)`` int64: the token at each position, -1 for padding. Within a block padding
            comes last, at the same positions for all heads.
        inverse: ``(1 or H, S)`` int64: the position of each token.
        block: Tokens per block.
        video_blocks: Blocks that hold video; they come first.
        identity: Whether order and length are unchanged, so that no copy is needed.
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
        """Build the layout of a sequence in blocks.

        Args:
            tokens: Make-up of the sequence.
            block: Tokens per block, at least 1; every part starts on a multiple of it.
            order: ``(n,)`` or ``(H, n)`` int64, the video tokens in the desired order; default: their current order,
                also if ``tokens.ordered`` is set.
            segments: ``(M,)`` int64, lengths of consecutive runs of ``order``, such as tiles, each of which is
                padded to a multiple of ``block``; default: one run.
            device: Device of the index tensors.

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
        """Count the positions of the padded sequence."""
        return self.index.shape[-1]

    @property
    def num_blocks(self) -> int:
        """Count the blocks of video and text."""
        return math.ceil(self.padded_tokens / self.block)

    @cached_property
    def source(self) -> Tensor:
        """Return ``(1 or H, S_padded)`` int64: the token copied to each position; arbitrary for padding."""
        with torch.inference_mode(False):  # cached for later calls, which may need gradients
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
        """Reorder tokens into the layout; padding becomes 0.

        Args:
            x: ``(B, H, S, D)``.

        Returns:
            ``(B, H, S_padded, D)``; ``x`` itself for an identity layout.

        Raises:
            ValueError: ``x`` has another number of tokens.
        """
        _check_tokens(x, self.num_tokens)
        if self.identity:
            return x
        out = _take(x, self.source)
        return out if self.padded_tokens == self.num_tokens else out.index_fill_(2, self.padding, 0)

    def undo(self, x: Tensor) -> Tensor:
        """Restore the model's token order and drop the padding.

        Args:
            x: ``(B, H, S_padded, D)``.

        Returns:
            ``(B, H, S, D)``; ``x`` itself for an identity layout.

        Raises:
            ValueError: ``x`` has another number of positions.
        """
        _check_tokens(x, self.padded_tokens)
        if self.identity:
            return x
        return _take(x, self.inverse)


class StackedLayout(TokenLayout):
    """A separate layout for each head.

    Index tensors are assembled on each access instead of stored: there are few distinct layouts, but rows for all heads
    of all layers of a large model take gigabytes.

    Args:
        parts: One single-order layout per head, of the same tokens and blocks.
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
        """Return ``(H, S_padded)`` int64: the token copied to each position; arbitrary for padding."""
        return self.index.clamp(min=0)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the sequence, without padding."""
        return self.parts[0].num_tokens

    @property
    def padded_tokens(self) -> int:
        """Count the positions of the padded sequence."""
        return self.parts[0].padded_tokens


def stack_heads(layouts: Sequence[TokenLayout]) -> TokenLayout:
    """Combine the layouts of heads; identical ones are returned as one.

    Args:
        layouts: One single-order layout per head, of the same tokens and blocks.
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
    """Return an order, ``(n,)`` int64, if it needs no padding and is not raster order; else ``None``.

    Args:
        tokens: Make-up of the sequence.
        order: ``(n,)`` int64, as for ``TokenLayout.build``.
        block: Likewise.
        segments: ``(M,)`` int64, likewise.
    """
    layout = TokenLayout.build(replace(tokens, ordered=True), block=block, segments=segments)
    natural = torch.equal(order, torch.arange(len(order), device="cpu"))
    return order if layout.identity and not natural else None
