"""Attention problems: those of real models, which ``fastdit bench`` finds too, and round numbers of tokens."""

from fastdit.bench.inputs.problems import PROBLEMS, Problem, find_problems
from fastdit.tokens import TokenSpec, VideoGrid

__all__ = ["PROBLEMS", "Problem", "find_problems", "problem_of"]


def problem_of(tokens: int, head_dim: int, heads: int) -> Problem:
    """Make a problem of a round number of tokens.

    Args:
        tokens: A multiple of 256.
        head_dim: Channels of a head, at least 16.
        heads: At least 1.
    """
    frame = (32, 32) if tokens % 1024 == 0 else (16, 16)
    grid = VideoGrid(tokens // (frame[0] * frame[1]), *frame)
    return Problem(f"{tokens}-tokens-{heads}x{head_dim}", 1, heads, head_dim, TokenSpec(grid))
