"""Attention problems of real models and sizes, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...tokens import TokenSpec, VideoGrid


@dataclass(frozen=True)
class Problem:
    """The self-attention of one model at one size.

    Args:
        name: Model and size, as it is asked for.
        layers: Self-attention layers that the video goes through, at least 1.
        heads: Heads of a layer, at least 1.
        head_dim: Channels of a head, at least 1.
        tokens: The token spec of a sequence.
        steps: Denoising steps that the model is usually run with, at least 1.
        passes: Forward passes of a step, 2 with guidance.
        pixels: ``(frames, height, width)`` of the video.
    """

    name: str
    layers: int
    heads: int
    head_dim: int
    tokens: TokenSpec
    steps: int = 50
    passes: int = 2
    pixels: tuple[int, int, int] = (0, 0, 0)

    @property
    def flops(self) -> int:
        """Count the floating point operations of one dense call of one layer, batch 1: both matrix products."""
        return 4 * self.heads * self.tokens.num_tokens**2 * self.head_dim

    @property
    def video_flops(self) -> int:
        """Count those of a whole video."""
        return self.flops * self.layers * self.steps * self.passes

    def describe(self) -> dict[str, object]:
        """Return what a row of results says of the problem."""
        return {
            "name": self.name,
            "layers": self.layers,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "grid": list(self.tokens.grid.shape),
            "text_tokens": self.tokens.text_tokens,
            "text_first": self.tokens.text_first,
            "tokens": self.tokens.num_tokens,
        }


def _wan(name: str, layers: int, heads: int, grid: tuple[int, int, int], pixels: tuple[int, int, int]) -> Problem:
    return Problem(name, layers, heads, 128, TokenSpec(VideoGrid(*grid)), pixels=pixels)


_ALL = (
    Problem("demo", 6, 2, 64, TokenSpec(VideoGrid(12, 24, 24)), steps=10, pixels=(45, 192, 192)),
    _wan("wan-1.3b-480p", 30, 12, (21, 30, 52), (81, 480, 832)),
    _wan("wan-1.3b-720p", 30, 12, (21, 45, 80), (81, 720, 1280)),
    _wan("wan-14b-480p", 40, 40, (21, 30, 52), (81, 480, 832)),
    _wan("wan-14b-720p", 40, 40, (21, 45, 80), (81, 720, 1280)),
    _wan("wan-2.2-5b-704p", 30, 24, (31, 22, 40), (121, 704, 1280)),
    Problem("hunyuan-720p", 60, 24, 128, TokenSpec(VideoGrid(33, 45, 80), 256), passes=1, pixels=(129, 720, 1280)),
    Problem("cogvideox-2b", 30, 30, 64, TokenSpec(VideoGrid(13, 30, 45), 226, True), pixels=(49, 480, 720)),
    Problem("cogvideox-5b", 42, 48, 64, TokenSpec(VideoGrid(13, 30, 45), 226, True), pixels=(49, 480, 720)),
    Problem("cogvideox-1.5-5b", 42, 48, 64, TokenSpec(VideoGrid(11, 48, 85), 226, True), pixels=(81, 768, 1360)),
    Problem("mochi", 48, 24, 128, TokenSpec(VideoGrid(28, 30, 53), 256), steps=64, pixels=(163, 480, 848)),
    Problem("ltx-2b", 28, 32, 64, TokenSpec(VideoGrid(21, 16, 22)), pixels=(161, 512, 704)),
    Problem("ltx-13b", 48, 32, 128, TokenSpec(VideoGrid(21, 22, 38)), steps=30, pixels=(161, 704, 1216)),
)

PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in _ALL}


def find_problems(names: Iterable[str]) -> list[Problem]:
    """Return problems by name.

    Args:
        names: Names; a name may also be that of a grid with heads, as in ``"8x16x16/4x64"``: frames, height, width,
            then heads and head dim, for sizes that no model has.

    Raises:
        ValueError: There is no such problem.
    """
    return [_find(name) for name in names]


def _find(name: str) -> Problem:
    if name in PROBLEMS:
        return PROBLEMS[name]
    grid, slash, heads = name.partition("/")
    try:
        if slash:
            frames, height, width = (int(n) for n in grid.split("x"))
            count, dim = (int(n) for n in heads.split("x"))
            if min(count, dim) < 1:
                raise ValueError(f"there must be at least one head of one channel, got {heads}")
            return Problem(name, 1, count, dim, TokenSpec(VideoGrid(frames, height, width)))
    except ValueError as error:
        raise ValueError(
            f"{name!r} is not a size: {error}; write FRAMESxHEIGHTxWIDTH/HEADSxDIM, as in 8x16x16/4x64"
        ) from error
    raise ValueError(f"unknown problem {name!r}; problems are: {', '.join(PROBLEMS)}, or a size as 8x16x16/4x64")
