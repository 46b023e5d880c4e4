"""Schedule of dense steps and layers, and of rebuilding dynamic patterns."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The steps and layers that stay dense, and the steps that rebuild dynamic patterns.

    Args:
        warmup_steps: First denoising steps kept dense: a count (int), or a fraction of all steps in [0, 1]
            (float), rounded up.
        tail_steps: Last denoising steps kept dense: a count or a fraction, as above.
        dense_layers: Self-attention layers kept dense, by index; negative indices count from the end.
        refresh_steps: When dynamic patterns are rebuilt: every n sparse steps (int, at least 1), or at exactly
            these steps (tuple of indices, or of fractions of all steps in [0, 1]). The first sparse step always builds.

    Raises:
        ValueError: A count is negative, a fraction is outside [0, 1], or ``refresh_steps`` is smaller than 1.
        TypeError: A value is neither int nor float, or ``dense_layers`` is not a tuple of ints.
    """

    warmup_steps: int | float = 0
    tail_steps: int | float = 0
    dense_layers: tuple[int, ...] = ()
    refresh_steps: int | tuple[int | float, ...] = 1

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "tail_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a count (int) or a fraction (float), got {value!r}")
            if value < 0 or (isinstance(value, float) and not value <= 1):
                raise ValueError(
                    f"{name} must be a count of at least 0 or a fraction in [0, 1], got {value!r}; "
                    "write 12 for twelve steps and 0.25 for a quarter of them"
                )
        if isinstance(self.dense_layers, list):
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if not isinstance(self.dense_layers, tuple) or not all(isinstance(i, int) for i in self.dense_layers):
            raise TypeError(f"dense_layers must be a tuple of layer indices, got {self.dense_layers!r}")
        if isinstance(self.refresh_steps, list):
            object.__setattr__(self, "refresh_steps", tuple(self.refresh_steps))
        if isinstance(self.refresh_steps, tuple):
            if not all(_is_step(i) for i in self.refresh_steps):
                raise ValueError(
                    "refresh_steps must list step indices from 0 or fractions of all steps in [0, 1], "
                    f"got {self.refresh_steps!r}"
                )
        elif isinstance(self.refresh_steps, bool) or not isinstance(self.refresh_steps, int):
            raise TypeError(f"refresh_steps must be an int or a tuple of steps, got {self.refresh_steps!r}")
        elif self.refresh_steps < 1:
            raise ValueError(f"refresh_steps must be at least 1, got {self.refresh_steps}")

    def dense_reason(self, layer: int, num_layers: int, step: int, num_steps: int | None) -> str | None:
        """Return why a call stays dense, or ``None`` if it is sparse.

        Args:
            layer: Layer index, from 0.
            num_layers: Layers in the transformer, at least 1.
            step: Step index, from 0.
            num_steps: Steps of the run; ``None`` if unknown.

        Raises:
            ValueError: The answer depends on ``num_steps`` and it is unknown.
        """
        if any(layer == (i if i >= 0 else num_layers + i) for i in self.dense_layers):
            return "dense layer"
        if step < self.first_sparse_step(num_steps):
            return "warm-up step"
        if self.tail_steps:
            total = _known(num_steps, "tail_steps")
            if step >= total - _count(self.tail_steps, total, "tail_steps"):
                return "tail step"
        return None

    def first_sparse_step(self, num_steps: int | None) -> int:
        """Return the index of the first step that is not warm-up.

        Args:
            num_steps: Steps of the run; ``None`` if unknown.

        Raises:
            ValueError: ``warmup_steps`` is a fraction and ``num_steps`` is unknown.
        """
        return _count(self.warmup_steps, num_steps, "warmup_steps")

    def refreshes(self, step: int, num_steps: int | None) -> bool:
        """Return whether dynamic patterns are rebuilt at a step.

        Args:
            step: Step index, from 0.
            num_steps: Steps of the run; ``None`` if unknown.

        Raises:
            ValueError: ``warmup_steps`` or one of ``refresh_steps`` is a fraction and ``num_steps`` is unknown.
        """
        if isinstance(self.refresh_steps, tuple):
            return step in [_count(i, num_steps, "refresh_steps") for i in self.refresh_steps]
        return (step - self.first_sparse_step(num_steps)) % self.refresh_steps == 0


def _is_step(value: object) -> bool:
    if isinstance(value, float):
        return 0 <= value <= 1
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def step_bucket(edges: Sequence[float], step: int, num_steps: int | None) -> int:
    """Return the index of the bucket that contains the middle of a step.

    Args:
        edges: Ends of the buckets as fractions of the run, ascending, the last one 1.
        step: Index of the step, from 0.
        num_steps: Steps of the run; ``None`` if unknown.

    Raises:
        ValueError: There are several buckets, and ``num_steps`` is unknown.
    """
    if len(edges) == 1:
        return 0
    if num_steps is None:
        raise ValueError(
            f"which of {len(edges)} step buckets a call is in depends on the number of denoising steps, which is "
            "unknown: enable sparse attention on the pipeline that you call, or use a plan with one bucket"
        )
    return min(bisect_right(edges, (step + 0.5) / num_steps), len(edges) - 1)


def check_edges(edges: Sequence[float]) -> None:
    """Check the ends of step buckets.

    Args:
        edges: Fractions of the run in (0, 1], ascending, the last one 1.

    Raises:
        ValueError: They are not ascending fractions that end at 1.
    """
    numbers = all(isinstance(edge, (int, float)) and not isinstance(edge, bool) for edge in edges)
    if not numbers or not edges or edges[-1] != 1 or any(a >= b for a, b in itertools.pairwise((0, *edges))):
        raise ValueError(f"edges of step buckets must be fractions ascending to 1, such as (0.2, 1), got {edges!r}")


def _known(num_steps: int | None, name: str) -> int:
    if num_steps is None:
        raise ValueError(
            f"{name} depends on the number of denoising steps, which is unknown: enable sparse attention on the "
            "pipeline that you call; for a bare transformer, as in training, give a schedule with warmup_steps as a "
            "count, such as Schedule(), refresh_steps as counts and no tail_steps"
        )
    return num_steps


def _count(value: int | float, num_steps: int | None, name: str) -> int:
    if isinstance(value, int):
        return value
    if value == 0:
        return 0
    # round to nine digits first: 0.1 * 30 is three steps, not four
    return math.ceil(round(value * _known(num_steps, name), 9))
