"""What is compared: methods with their fields, brought to the same realised density."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from ..attention import AttentionMethod, BlockMethod, MethodState, get_method, list_methods, method_class
from ..attention.paro_calibration import calibrate
from ..functional import pattern
from ..schedule import Schedule
from .synthetic import Sample

CLOSE = 0.02
"""How far, relatively, a realised density may be from the one asked for before it is tried again."""

TRIES = 8

WARMUP = 0.3
EVERY_STEP = Schedule(warmup_steps=WARMUP)
# AdaSpa's first search is a dense step, so one warm-up step less is as many dense steps
SEARCH = Schedule(warmup_steps=0.2, refresh_steps=(0.2, 0.6))


class NotAdjustable(ValueError):
    """Say why a method cannot be brought to a density."""


@dataclass(frozen=True)
class Setting:
    """Name a method with fields; its density comes later.

    Args:
        name: As rows and tables say it.
        method: Name of the method.
        fields: Fields of the method, without its density.
        schedule: Which steps stay dense, and when masks are rebuilt.
    """

    name: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = EVERY_STEP

    def at(self, density: float, samples: Sequence[Sample]) -> AttentionMethod:
        """Make the method so that it computes a fraction of the pairs of some calls, as nearly as it can.

        Args:
            density: The fraction, in (0, 1].
            samples: Calls to look at. A method that is calibrated learns from them too, so they are not those that
                are measured.

        Raises:
            NotAdjustable: The method has nothing to turn.
        """
        if self.method == "paro":
            calls = [(sample.q, sample.k, sample.call) for sample in samples]
            return get_method("paro", plan=calibrate(calls, density=density), **self.fields)
        if self.method == "radial":
            grid = samples[0].call.tokens.grid.shape
            order = self.fields.get("order", "raster")
            return get_method("radial", **{**radial_fields(grid, density, order), **self.fields})
        if "density" not in {f.name for f in fields(method_class(self.method))}:
            raise NotAdjustable(f"{self.method} has no density to set; give it as {self.method}(field=value)")
        return _matched(self, density, samples[:1])


def setting_at(setting: Setting, density: float, samples: Callable[[bool], Sequence[Sample]]) -> AttentionMethod | str:
    """Return the method of a setting at a density, or the reason why there is none.

    Args:
        setting: The setting.
        density: In (0, 1].
        samples: Makes the calls to calibrate on, of every layer or of one in the middle.
    """
    try:
        return setting.at(density, samples(setting.method == "paro"))
    except NotAdjustable as error:
        return str(error)


def default_settings() -> list[Setting]:
    """List every method that needs no trained weights, as published and in the orders and tiles that we know better."""
    found = [_default(name) for name in list_methods() if name not in ("dense", "skip")]
    tiles = {"order": "tile"}
    more = [
        Setting("draft-4x4x4", "draft", {"tile": (4, 4, 4)}),
        Setting("adaspa-tile", "adaspa", dict(tiles), SEARCH),
        Setting("sla-tile", "sla", dict(tiles)),
        Setting("radial-tile", "radial", dict(tiles)),
    ]
    return sorted([*filter(None, found), *more], key=lambda setting: setting.name)


def find_settings(names: Iterable[str] | None, *, means: bool = False) -> list[Setting]:
    """Return settings by name.

    Args:
        names: Names, such as ``"draft"``, ``"sla-tile"``; default: all.
        means: Whether each is listed a second time with blocks that stand in by their means.

    Raises:
        ValueError: There is no such setting.
    """
    known = {setting.name: setting for setting in default_settings()}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}; settings are: {', '.join(known)}")
    chosen = list(known.values()) if names is None else [known[name] for name in names]
    if not means:
        return chosen
    return [each for setting in chosen for each in (setting, *_with_means(setting))]


def _with_means(setting: Setting) -> list[Setting]:
    if not issubclass(method_class(setting.method), BlockMethod):
        return []
    return [Setting(f"{setting.name}+mean", setting.method, {**setting.fields, "compensate": "mean"}, setting.schedule)]


def _default(name: str) -> Setting | None:
    adjustable = {"density"} & {f.name for f in fields(method_class(name))} or name in ("paro", "radial")
    return Setting(name, name, schedule=SEARCH if name == "adaspa" else EVERY_STEP) if adjustable else None


def _matched(setting: Setting, density: float, samples: Sequence[Sample]) -> AttentionMethod:
    """Turn the density of a method until what it computes is what was asked for."""
    low, high, asked = 0.0, 1.0, density
    best: tuple[float, AttentionMethod] | None = None
    for _ in range(TRIES):
        method = get_method(setting.method, density=asked, **setting.fields)
        realised = sum(_realised(method, sample) for sample in samples) / len(samples)
        if best is None or abs(realised - density) < best[0]:
            best = (abs(realised - density), method)
        if abs(realised - density) <= CLOSE * density:
            break
        low, high = (low, asked) if realised > density else (asked, high)
        asked = (low + high) / 2
    assert best is not None
    return best[1]


def _realised(method: AttentionMethod, sample: Sample) -> float:
    return method.pattern(sample.q, sample.k, sample.call, MethodState()).density


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
        found = {"decay": decay, "min_band": min_band, "sink": sink, "block_size": 64, "order": order}
        found |= {"tile": (1, 8, 8)} if order == "tile" else {}
        off = abs(pattern("radial", grid=grid, **found).density - density)
        if off < best[0] - 1e-3:  # of two that are about as near, the one with a sink
            best = (off, found)
    return best[1]
