"""Seeded, captioned clips of the demo world: one bright moving object on a dim background."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np

from fastdit.demo.captions import BACKGROUND_COLORS, OBJECT_COLORS, Attributes, sample_attributes, write_caption

RADIUS = {"small": 0.15, "": 0.185, "big": 0.22}
STRIPES = 8


@dataclass(frozen=True)
class Scene:
    """A scene before it is drawn.

    ``attributes`` is what the caption says, ``shown`` what the frames show (never ``None`` fields).
    ``center`` is ``(F, 2)`` as x, y and ``radius`` is ``(F,)``, both in units of the frame.
    """

    caption: str
    attributes: Attributes
    shown: Attributes
    center: np.ndarray
    radius: np.ndarray

    def render(
        self,
        height: int = 192,
        width: int = 192,
        frames: slice = slice(None),
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> np.ndarray:
        """Draw ``(F, H, W, 3)`` uint8, or only the part of it that the slices name.

        Edges are antialiased over about one pixel.
        """
        x = ((np.arange(width) + 0.5) / width).astype(np.float32)[None, columns]
        y = ((np.arange(height) + 0.5) / height).astype(np.float32)[rows, None]
        ground = _background(self.shown, y, x)
        ink = np.array(OBJECT_COLORS[self.shown.color or "red"], np.float32)
        center, radius = self.center[frames], self.radius[frames]
        clip = np.empty((len(center), *ground.shape), np.float32)
        for index, ((cx, cy), r) in enumerate(zip(center, radius, strict=True)):
            distance = _distance(self.shown.shape, x - np.float32(cx), y - np.float32(cy), r)
            cover = np.clip(0.5 - distance * min(height, width), 0.0, 1.0)
            clip[index] = ground + cover[..., None] * (ink - ground)
        return np.rint(clip * 255.0).astype(np.uint8)


def sample_scene(seed: int, num_frames: int = 45, attributes: Attributes | None = None, silent: float = 0.1) -> Scene:
    """Draw the scene of ``seed``.

    Args:
        seed: Decides everything; the same seed with more frames is the same scene, slower.
        num_frames: Frames; the motion always spans the whole clip.
        attributes: What to show, drawn when ``None``; its ``None`` fields are drawn.
        silent: Chance in [0, 1] that a drawn caption does not name the background's colour.
    """
    rng = random.Random(seed)
    drawn = sample_attributes(rng)
    hide = rng.random() < silent
    named = attributes or (replace(drawn, background=None) if hide else drawn)
    shown = Attributes(
        color=named.color or drawn.color,
        shape=named.shape or drawn.shape,
        motion=named.motion or drawn.motion,
        background=named.background or drawn.background,
        size=named.size,
        kind=named.kind,
    )
    center, radius = _trajectory(shown, rng, np.linspace(0.0, 1.0, num_frames))
    caption = write_caption(named, color_first=rng.random() < 0.25)
    return Scene(caption, named, shown, center, radius)


def _trajectory(shown: Attributes, rng: random.Random, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centres ``(F, 2)`` (x, y) and radii ``(F,)``, both in units of the frame.

    Raises:
        ValueError: There is no such motion.
    """
    size = RADIUS[shown.size] * rng.uniform(0.95, 1.05)
    radius = np.full_like(time, size)
    across = np.full_like(time, 0.5 + rng.uniform(-0.2, 0.2))
    start = rng.uniform(0.20, 0.26)
    along = start + (1.0 - 2.0 * start) * time
    match shown.motion:
        case "right":
            x, y = along, across
        case "left":
            x, y = 1.0 - along, across
        case "down":
            x, y = across, along
        case "up":
            x, y = across, 1.0 - along
        case "bouncing":
            floor = 0.95 - size
            x, y = across, floor - (floor - 0.24) * np.abs(np.cos(2.0 * math.pi * time))
        case "growing":
            x, y = across, np.full_like(time, 0.5 + rng.uniform(-0.1, 0.1))
            radius = size * (0.5 + 1.25 * time)
        case _:
            raise ValueError(f"no motion called {shown.motion!r}; the motions are in captions.py")
    return np.stack([x, y], axis=1), radius


def _distance(shape: str | None, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance ``(H, W)`` to the outline, in units of the frame.

    Raises:
        ValueError: There is no such shape.
    """
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(0.9 * radius)
    if shape == "triangle":
        slope = (np.abs(dx) * 2.0 - (dy + np.float32(radius))) / np.float32(math.sqrt(5.0))
        return np.maximum(slope, dy - np.float32(radius))
    raise ValueError(f"no shape called {shape!r}; the shapes are in captions.py")


def _background(shown: Attributes, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the still background ``(H, W, 3)`` float32 in [0, 1]."""
    base = np.array(BACKGROUND_COLORS[shown.background or "gray"], np.float32)
    if shown.background == "black" and shown.kind:
        base = base + 0.05
    if shown.kind == "gradient":
        light = 1.3 - 1.0 * y
    elif shown.kind == "striped":
        light = np.where(np.floor(y * STRIPES) % 2 == 0, 1.15, 0.55)
    else:
        light = np.ones_like(y)
    light = np.broadcast_to(light, (y.shape[0], x.shape[1]))
    return (base * light[..., None]).astype(np.float32)
