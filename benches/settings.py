"""What is compared: methods with their fields and schedules, as data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import fastdit
from fastdit import Schedule

WARMUP = 0.3
EVERY_STEP = Schedule(warmup_steps=WARMUP)
# AdaSpa's first search is a dense step, so one warm-up step less is as many dense steps
SEARCH = Schedule(warmup_steps=0.2, refresh_steps=(0.2, 0.6))
DENSITIES = (0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Setting:
    """One row of a comparison.

    Args:
        method: Name of the method.
        density: Fraction of blocks asked for, in (0, 1].
        order: Token order, as the row names it.
        fields: Fields of the method.
        schedule: Which steps stay dense, and when masks are rebuilt.
        steps: Denoising steps; ``None`` for the pipeline's default.
    """

    method: str
    density: float
    order: str
    fields: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = EVERY_STEP
    steps: int | None = None

    @property
    def name(self) -> str:
        """Return a name that differs between any two settings."""
        fields = ",".join(f"{name}={value}" for name, value in sorted(self.fields.items()))
        refresh = self.schedule.refresh_steps
        return f"{self.method}({fields})@{self.density}/{self.order}/refresh={refresh}/steps={self.steps}"


def methods(grid: tuple[int, int, int]) -> list[Setting]:
    """List every method at equal densities, with and without compensation, in raster and in tile order.

    Args:
        grid: ``(frames, height, width)`` in tokens.
    """
    rows = []
    for density in DENSITIES:
        for compensate in (None, "mean"):
            extra = {"compensate": compensate}
            for order in ("raster", "tile"):
                how = extra | {"order": order}
                rows += [
                    Setting("radial", density, order, radial_fields(grid, density, order) | extra),
                    Setting("adaspa", density, order, how | {"density": density}, SEARCH),
                    Setting("sla", density, order, how | {"density": density}),
                ]
            draft = extra | {"density": density, "tile": (4, 4, 4)}
            rows.append(Setting("draft", density, "tile", draft | {"per_row": False}))
            rows.append(Setting("draft", density, "tile, per row", draft | {"per_row": True}))
            rows.append(Setting("paro", density, "axes", extra))
    return rows


def reuse(grid: tuple[int, int, int]) -> list[Setting]:
    """List dynamic methods with masks rebuilt every 1, 4, 10 steps and never, over 30 steps.

    Args:
        grid: Not used.
    """
    return [
        Setting(method, 0.2, "tile", fields, Schedule(warmup_steps=dense_steps, refresh_steps=refresh), steps=30)
        for method, dense_steps, fields in (
            ("draft", 9, {"density": 0.2, "tile": (4, 4, 4), "per_row": True, "compensate": "mean"}),
            ("adaspa", 8, {"density": 0.2, "order": "tile", "compensate": "mean"}),
        )
        for refresh in (1, 4, 10, 30)
    ]


def search(grid: tuple[int, int, int]) -> list[Setting]:
    """List searched plans beside the methods with one setting for all heads, at equal densities and dense steps.

    The plans are ``build/benches/plan-0.2.json`` and ``plan-0.3.json``, as ``fastdit search`` writes them.

    Args:
        grid: Not used.
    """
    rows = []
    for density in (0.2, 0.3):
        tiles = {"density": density, "tile": (4, 4, 4), "compensate": "mean"}
        early, first = Schedule(warmup_steps=0.2), Schedule(warmup_steps=0.1, refresh_steps=(0.1, 0.6))
        rows += [
            Setting("plan", density, "searched", {"path": f"build/benches/plan-{density}.json"}),
            Setting("draft", density, "tile, per row", tiles | {"per_row": True}, early),
            Setting("draft", density, "tile", tiles | {"per_row": False}, early),
            Setting("sla", density, "tile", tiles | {"order": "tile"}, early),
            Setting("adaspa", density, "tile", tiles | {"order": "tile"}, first),
        ]
    return rows


@cache
def radial_fields(grid: tuple[int, int, int], density: float, order: str) -> dict[str, Any]:
    """Find the fields with which radial attention comes nearest to a density.

    Args:
        grid: ``(frames, height, width)`` in tokens.
        density: Wanted fraction, in (0, 1].
        order: Token order; tiles lie in one frame, as bands are between frames.
    """
    best: tuple[float, dict[str, Any]] = (math.inf, {})
    for sink, min_band, decay in itertools.product((True, False), (1, 128, 512, 1024, 2048), (0.05, 0.2, 0.5, 1.0)):
        fields = {"decay": decay, "min_band": min_band, "sink": sink, "block_size": 64, "order": order}
        fields |= {"tile": (1, 8, 8)} if order == "tile" else {}
        off = abs(fastdit.pattern("radial", grid=grid, **fields).density - density)
        if off < best[0] - 1e-3:  # of two that are about as near, the one with a sink
            best = (off, fields)
    return best[1]


SUITES: dict[str, Callable[[tuple[int, int, int]], list[Setting]]] = {
    "methods": methods,
    "reuse": reuse,
    "search": search,
}
