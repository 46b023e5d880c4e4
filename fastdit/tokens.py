"""Token grid of a video, make-up of a token sequence, and description of an attention call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VideoGrid:
    """The grid of latent tokens of a video after patching, flattened in the order frames, height, width.

    Args:
        frames: Latent frames, at least 1.
        height: Token rows per frame, at least 1.
        width: Token columns per frame, at least 1.

    Raises:
        ValueError: An axis is smaller than 1.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(
                f"a video grid needs at least one token along every axis, got {self}; "
                "give (frames, height, width) in latent tokens after patching"
            )

    @property
    def frame_tokens(self) -> int:
        """Count the tokens of one frame."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the whole video."""
        return self.frames * self.frame_tokens

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return ``(frames, height, width)``."""
        return (self.frames, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class TokenSpec:
    """The make-up of a token sequence from video and text.

    Args:
        grid: The video tokens.
        text_tokens: Text tokens in the same sequence, padding included; 0 for cross-attention models.
        text_first: Whether the text comes before the video.
        ordered: Whether the video tokens are in the order of the method instead of raster order.

    Raises:
        ValueError: ``text_tokens`` is negative.
    """

    grid: VideoGrid
    text_tokens: int = 0
    text_first: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        if self.text_tokens < 0:
            raise ValueError(f"text_tokens must be at least 0, got {self.text_tokens}")

    @property
    def num_tokens(self) -> int:
        """Count video and text tokens together."""
        return self.grid.num_tokens + self.text_tokens

    @property
    def video(self) -> slice:
        """Return the slice of the video tokens."""
        start = self.text_tokens if self.text_first else 0
        return slice(start, start + self.grid.num_tokens)

    @property
    def text(self) -> slice:
        """Return the slice of the text tokens; empty without text."""
        start = 0 if self.text_first else self.grid.num_tokens
        return slice(start, start + self.text_tokens)


@dataclass(frozen=True)
class AttentionCall:
    """The description of one self-attention call, without q, k and v.

    Args:
        tokens: Make-up of the sequence.
        layer: Index of the self-attention layer, from 0.
        num_layers: Self-attention layers in the transformer.
        step: Index of the denoising step, from 0.
        num_steps: Denoising steps of this run; ``None`` if unknown.
        branch: The guidance pass, as diffusers names it: ``"cond"``, ``"uncond"``, ``"cond_uncond"``.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        key_padding: ``(B, S)`` bool, True where a key is padding and must not be attended to; ``None`` if
            there is no padding. In each sample the real text tokens come before the padded ones.
        heads: Heads of the layer that q, k and v hold, if several methods share a layer; ``None`` for all.
    """

    tokens: TokenSpec
    layer: int = 0
    num_layers: int = 1
    step: int = 0
    num_steps: int | None = None
    branch: str = "cond"
    scale: float | None = None
    key_padding: Tensor | None = None
    heads: tuple[int, ...] | None = None
