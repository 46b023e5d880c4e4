"""Prompt accuracy: read colour, shape, motion and background back from decoded frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .captions import BACKGROUND_COLORS, OBJECT_COLORS, SHAPES, Attributes

VIVID = 0.62
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}


@dataclass(frozen=True)
class Reading:
    """The attributes read from a clip; a field is ``None`` where nothing was recognised."""

    color: str | None
    shape: str | None
    motion: str | None
    background: str | None

    def score(self, wanted: Attributes) -> dict[str, bool]:
        """Compare with a caption; what the caption does not name counts as right.

        Returns:
            ``color``, ``shape``, ``motion``, ``background``, and ``all``: colour, motion and
            background right together.
        """
        right = {
            name: getattr(wanted, name) in (None, getattr(self, name))
            for name in ("color", "shape", "motion", "background")
        }
        right["all"] = right["color"] and right["motion"] and right["background"]
        return right


def read_clip(frames: np.ndarray) -> Reading:
    """Read the attributes of a clip of the demo world.

    Args:
        frames: ``(F, H, W, 3)``, uint8, or float in [0, 1].

    The object is what is vivid (the brightest channel above 0.62), as backgrounds are dim.
    """
    clip = frames.astype(np.float32) / 255.0 if frames.dtype == np.uint8 else frames
    vivid = clip.max(-1) > VIVID
    background = _background_name(clip, vivid)
    area = vivid.mean((1, 2))
    seen = area > 0.004
    if seen.mean() < 0.5:
        return Reading(None, None, None, background)
    color = _nearest_color(np.median(clip[vivid], axis=0), OBJECT_COLORS)
    center = np.array([_center(mask) for mask in vivid[seen]])
    time = np.linspace(0.0, 1.0, len(clip))[seen]
    return Reading(color, _shape_name(vivid[seen]), _motion(time, center, area[seen]), background)


def _nearest_color(value: np.ndarray, colors: dict[str, tuple[float, float, float]]) -> str:
    return min(colors, key=lambda name: float(np.abs(np.array(colors[name]) - value).sum()))


def _background_name(clip: np.ndarray, vivid: np.ndarray) -> str:
    """Name the background by its hue where it has one, else by its brightness."""
    value = clip[~vivid].mean(0) if not vivid.all() else clip.mean((0, 1, 2))
    if value.max() - value.min() < 0.06:
        return "gray" if value.mean() > 0.18 else "black"
    chroma = value / np.linalg.norm(value)
    hues = {n: np.array(c) for n, c in BACKGROUND_COLORS.items() if n not in ("gray", "black")}
    return max(hues, key=lambda name: float(hues[name] / np.linalg.norm(hues[name]) @ chroma))


def _center(mask: np.ndarray) -> tuple[float, float]:
    """Return the centroid x, y in [0, 1] of a boolean ``(H, W)`` mask."""
    y, x = np.nonzero(mask)
    return (x.mean() + 0.5) / mask.shape[1], (y.mean() + 0.5) / mask.shape[0]


def _shape_name(vivid: np.ndarray) -> str:
    """Name the shape by how much of its bounding box it fills, over the frames ``(F, H, W)``."""
    fills = []
    for mask in vivid:
        y, x = np.nonzero(mask)
        low_y, high_y = np.percentile(y, (0.5, 99.5))
        low_x, high_x = np.percentile(x, (0.5, 99.5))
        fills.append(len(y) / ((high_y - low_y + 1) * (high_x - low_x + 1)))
    fill = float(np.median(fills))
    return min(SHAPES, key=lambda name: abs(FILL[name] - fill))


def _motion(time: np.ndarray, center: np.ndarray, area: np.ndarray) -> str | None:
    """Name the motion from centroids ``(F, 2)`` and areas ``(F,)`` over ``time`` in [0, 1]."""
    grown = np.polyfit(time, np.sqrt(area), 1)[0] / np.sqrt(area).mean()
    if grown > 0.5:
        return "growing"
    y = center[:, 1] - center[:, 1].mean()
    template = -np.abs(np.cos(2.0 * np.pi * time))
    template -= template.mean()
    slope_x, slope_y = np.polyfit(time, center, 1)[0]
    likeness = float(template @ y / (np.linalg.norm(template) * np.linalg.norm(y) + 1e-6))
    if likeness > 0.6 and y.std() > 0.04 and abs(slope_x) < 0.25:
        return "bouncing"
    if max(abs(slope_x), abs(slope_y)) < 0.15:
        return None
    if abs(slope_x) > abs(slope_y):
        return "right" if slope_x > 0 else "left"
    return "down" if slope_y > 0 else "up"
