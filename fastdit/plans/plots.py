"""Pictures of a plan that are understood at a glance, and legible on a phone. They need matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .contents import bucket_names, shares, short_names, span_name
from .head_maps import head_maps
from .plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 6.0
"""Of every picture, in inches: on a phone the text is then about as large as that of a page."""
DPI = 200

# the colours of Okabe and Ito, which colour-blind people tell apart; greys are for all and for nothing
_HUES = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")
_DENSE, _NOTHING, _KEPT, _CHOSEN = "#555555", "#F2F2F2", "#0072B2", "#D55E00"
_COSTS = {"density": "% of pairs computed", "seconds": "time of attention, % of dense"}
_PALEST = 0.8
_BAR: dict[str, Any] = {"orientation": "horizontal", "aspect": 35, "fraction": 0.08, "pad": 0.03}
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_NUMBERS = {
    "densities": ("Density of each head", "% of pairs computed", "Blues"),
    "errors": ("Error expected of each head", "% of the layer's output", "Oranges"),
}


def check_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is not installed: pip install matplotlib, or fastdit with its extra plots"
        ) from error


def draw_methods(plan: Plan, title: str) -> Figure:
    """Draw which candidate each head takes, layer by layer, for each step bucket.

    Args:
        plan: The plan.
        title: The transformer.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = _colors(plan)
    found = np.array(plan.transformers[title].choices).swapaxes(1, 2)
    used = shares(plan, title)
    names = short_names(plan.candidates)
    with _style():
        figure, panels = _heat_maps(plan, title, found, extra=0.24 * len(used) + 0.3)
        for axes, values in zip(panels, found, strict=True):
            inks = [_ink(colors[i]) for i in values.flat]
            _cells(axes, values, inks, "{:d}", cmap=ListedColormap(colors), vmin=-0.5, vmax=len(colors) - 0.5)
        figure.suptitle("Method of each head")
        handles = [
            Patch(facecolor=colors[i], edgecolor="#999999", label=f"{i}: {names[i]} ({share:.0%} of heads)")
            for i, share in used.items()
        ]
        figure.legend(handles=handles, loc="outside lower left", frameon=False, handlelength=1.2, borderaxespad=0)
    return figure


def draw_numbers(plan: Plan, title: str, name: str) -> Figure:
    """Draw a number of each head, layer by layer, for each step bucket.

    Args:
        plan: The plan.
        title: The transformer.
        name: ``"densities"`` or ``"errors"``.
    """
    heading, unit, colormap = _NUMBERS[name]
    found = 100 * np.array(getattr(plan.transformers[title], name)).swapaxes(1, 2)
    top = 100.0 if name == "densities" else max(float(found.max()), 1e-3)
    with _style():
        figure, panels = _heat_maps(plan, title, found, extra=0.75)
        image: Any = None
        for axes, values in zip(panels, found, strict=True):
            inks = ["white" if x > 0.6 * top else "black" for x in values.flat]
            image = _cells(axes, values, inks, "{:.3g}", cmap=colormap, vmin=0, vmax=top)
        figure.suptitle(heading)
        figure.colorbar(image, ax=panels, label=unit, **_BAR)
    return figure


def draw_distances(plan: Plan, title: str) -> Figure:
    """Draw how dense attention is spread over the distance between frames, head by head.

    Args:
        plan: The plan, with ``frame_mass``.
        title: The transformer.
    """
    from matplotlib.colors import PowerNorm

    mass = 100 * np.array(plan.transformers[title].frame_mass)
    layers, heads, frames = mass.shape
    with _style():
        figure = _figure(1.9 + min(0.3 * layers * heads, 7))
        axes = figure.subplots()
        edges = np.arange(frames + 1) - 0.5, np.arange(layers * heads + 1) / heads - 0.5
        # most attention is near: the root makes the rest visible
        colors = {"cmap": "Blues", "norm": PowerNorm(0.5, 0, max(float(mass.max()), 1e-3))}
        image = axes.pcolormesh(*edges, mass.reshape(-1, frames), **colors)
        axes.hlines(np.arange(1, layers) - 0.5, -0.5, frames - 0.5, color="white", linewidth=min(1.5, 30 / layers))
        axes.set_ylim(layers - 0.5, -0.5)
        axes.set_xticks(_ticks(frames, 12))
        axes.set_yticks(_ticks(layers, 15))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("frames apart")
        axes.set_ylabel("layer" if heads == 1 else f"layer, with a row for each of {heads} heads")
        figure.colorbar(image, ax=axes, label="% of attention", **_BAR)
        figure.suptitle("How far attention looks" + ("" if len(plan.transformers) == 1 else f": {title}"))
    return figure


def draw_curve(plan: Plan) -> Figure:
    """Draw the error that other budgets would have had over their cost, and the point that was chosen.

    Args:
        plan: The plan, with a curve.
    """
    name, here = _COSTS[plan.curve_unit], plan.density if plan.curve_unit == "density" else 1 / max(plan.speedup, 1e-9)
    with _style():
        figure = _figure(3.6)
        axes = figure.subplots()
        cost, error = 100 * np.array(plan.curve).T
        axes.plot(cost, error, color=_KEPT, linewidth=2, label="best plan at each cost")
        chosen = f"this plan: density {plan.density:.2f}, attention {plan.speedup:.2f}x as fast"
        axes.plot(100 * here, 100 * plan.error, "*", color=_CHOSEN, markersize=17, label=chosen, clip_on=False)
        axes.set_xlim(0, max(100, *cost))
        axes.set_ylim(0, 1.05 * max(*error, 100 * plan.error, 1e-3))
        axes.set_xlabel(name)
        axes.set_ylabel("error, % of a layer's output")
        axes.grid(color="#DDDDDD")
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        figure.suptitle("Error against cost")
    return figure


def draw_head(plan: Plan, title: str, layer: int, head: int) -> Figure | None:
    """Draw the blocks that a head computes, ``None`` if they depend on the video in all step buckets.

    Args:
        plan: The plan.
        title: The transformer.
        layer: Index of the layer, from 0.
        head: Index of the head, from 0.
    """
    maps = [(*span, found) for *span, found in head_maps(plan, title, layer, head) if found is not None]
    if not maps:
        return None
    names, choices = short_names(plan.candidates), plan.transformers[title].choices
    with _style():
        figure = _figure(1.1 + 2.9 * len(maps))
        panels: Any = figure.subplots(len(maps), 2, squeeze=False)
        image: Any = None
        for (left, right), (first, last, found) in zip(panels, maps, strict=True):
            left.set_title(f"{names[choices[first][layer][head]]}, {span_name(plan.buckets, first, last)}")
            _draw_map(left, "block", found.blocks)
            image = _draw_map(right, "frame", found.frames)
        figure.suptitle(f"What head {head} of layer {layer} computes")
        figure.colorbar(image, ax=panels, label="fraction of pairs computed", **_BAR)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG.

    Args:
        figure: The picture.
        path: The file.
    """
    figure.savefig(path, dpi=DPI, format="png", facecolor="white")


@contextmanager
def _style() -> Iterator[None]:
    check_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _heat_maps(plan: Plan, title: str, found: np.ndarray, extra: float) -> tuple[Figure, Sequence[Axes]]:
    """Make a picture with a panel for each step bucket, layers to the right and heads downwards."""
    buckets, heads, layers = found.shape
    figure = _figure(0.9 + extra + buckets * (heads * _cell_height(layers, heads) + 0.45))
    panels: Any = figure.subplots(buckets, 1, sharex=True, squeeze=False)[:, 0]
    names = bucket_names(plan.buckets)
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(name if len(plan.transformers) == 1 else f"{title}, {name}")
        axes.set_ylabel("head")
        axes.set_xlim(-0.5, layers - 0.5)
        axes.set_ylim(heads - 0.5, -0.5)
        axes.set_yticks(_ticks(heads, 6))
        axes.set_xticks(_ticks(layers, 15))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[-1].set_xlabel("layer")
    return figure, panels


def _cells(axes: Axes, values: np.ndarray, inks: Sequence[str], form: str, **colors: Any) -> Any:
    """Fill the cells of a panel, and write the values into them where they are large enough."""
    heads, layers = values.shape
    edges = [np.arange(n + 1) - 0.5 for n in (layers, heads)]
    image = axes.pcolormesh(*edges, values, edgecolors="white", linewidth=min(1.5, 20 / layers), **colors)
    texts = [form.format(value) for value in values.flat]
    width, height = 72 * 5.2 / layers, 72 * _cell_height(layers, heads)
    size = min(10, width / (0.65 * max(map(len, texts))), 0.7 * height)
    if size >= 6:
        for (head, layer), text, ink in zip(np.ndindex(values.shape), texts, inks, strict=True):
            axes.text(layer, head, text, color=ink, size=size, ha="center", va="center_baseline")
    return image


def _cell_height(layers: int, heads: int) -> float:
    return min(0.4, max(4.8 / layers, 0.13), 5 / heads)


def _draw_map(axes: Axes, name: str, kept: Tensor) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("kept", ["white", _KEPT])
    image = axes.imshow(kept.double().numpy(), cmap=shades, vmin=0, vmax=1, interpolation="antialiased")
    axes.set_xlabel(f"key {name}")
    axes.set_ylabel(f"query {name}")
    axes.set_yticks(_ticks(kept.shape[0], 4))
    axes.set_xticks(_ticks(kept.shape[1], 4))
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#999999")
    return image


def _ticks(count: int, most: int) -> np.ndarray:
    """Return indices to label: round distances apart, at most so many."""
    step = next(
        step for power in (1, 10, 100, 1000, 10_000) for step in (power, 2 * power, 5 * power) if count <= most * step
    )
    return np.arange(0, count, step)


def _colors(plan: Plan) -> list[str]:
    """Give each method a hue and each of its candidates a shade, the paler the less it is expected to compute."""
    from matplotlib.colors import to_hex, to_rgb

    names = [method.name for method in plan.candidates]
    others = dict.fromkeys(m.name for m in plan.candidates if not (m.stock or m.empty))
    hues = dict(zip(others, itertools.cycle(_HUES), strict=False))
    colors = []
    for index, method in enumerate(plan.candidates):
        if method.stock or method.empty:
            colors.append(_DENSE if method.stock else _NOTHING)
            continue
        same = [i for i, name in enumerate(names) if name == method.name]
        same.sort(key=lambda i: (getattr(plan.candidates[i], "density", 1.0), i))
        pale = _PALEST * (1 - (same.index(index) + 1) / len(same))
        red, green, blue = (x + (1 - x) * pale for x in to_rgb(hues[method.name]))
        colors.append(to_hex((red, green, blue)))
    return colors


def _ink(color: str) -> str:
    """Return the colour in which text on another is read best."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(color)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
