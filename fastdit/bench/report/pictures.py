"""Pictures of a report, as SVG in the colour of the surrounding text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .result_store import Row

INK = "#010203"
"""Stands for the colour of the page's text, which is not known here."""

PALETTE = ("#4c8dd6", "#e2813b", "#3fa66b", "#d4566a", "#9a7bd0", "#a3792c", "#d571b8", "#7f8a93", "#b5a92c", "#2fa9b8")
MARKERS = "osD^vP*X<>"


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    ideal: Sequence[tuple[float, float]] = (),
    smaller_is_better: bool = False,
) -> str:
    """Draw lines with their points, and a wider one along those that nothing beats.

    Args:
        series: Points by name.
        x: What lies on the first axis.
        y: What lies on the second.
        ideal: Points of a dotted line.
        smaller_is_better: Whether lower is better; left is better on the first axis if it is a density.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_style()):
        figure = Figure(figsize=(6, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(series.items()):
            ordered = sorted(points)
            color, marker = PALETTE[i % len(PALETTE)], MARKERS[(i // len(PALETTE) + i) % len(MARKERS)]
            xs, ys = zip(*ordered, strict=True)
            axes.plot(xs, ys, marker=marker, markersize=5, linewidth=1.2, color=color, label=name)
        front = pareto([p for points in series.values() for p in points], smaller_is_better, left="density" in x)
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=INK, linewidth=5, alpha=0.18, zorder=0, label="best")
        if ideal:
            axes.plot(*zip(*ideal, strict=True), ":", color=INK, linewidth=1, label="ideal")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.2)
        if len(series) > 1 or ideal:
            figure.legend(loc="outside lower center", frameon=False, fontsize=10, ncols=3)
        return _svg(figure)


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], label: str) -> str:
    """Draw numbers as colours, written out.

    Args:
        rows: Names of the rows.
        columns: Names of the columns.
        values: Of each row, each at least 0; ``None`` stays empty.
        label: What the numbers are.
    """
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    table = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    with rc_context(_style()):
        figure = Figure(figsize=(1.9 + 0.62 * len(columns), 1.1 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(table, cmap="viridis_r", aspect="auto", vmin=0, vmax=max(1e-9, float(np.nanmax(table))))
        axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.spines[:].set_visible(False)
        middle = np.nanmax(table) / 2
        for i, j in np.ndindex(*table.shape):
            if not np.isnan(table[i, j]):
                color = "white" if table[i, j] > middle else "black"
                axes.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", fontsize=8.5, color=color)
        figure.colorbar(image, ax=axes, label=label, shrink=0.8).outline.set_visible(False)  # type: ignore[operator]
        return _svg(figure)


def pareto(points: Sequence[tuple[float, float]], smaller: bool, *, left: bool) -> list[tuple[float, float]]:
    """Return the points that no other beats on both axes, from left to right.

    Args:
        points: The points.
        smaller: Whether smaller is better on the second axis.
        left: Whether it is on the first.
    """

    def better(a: tuple[float, float], b: tuple[float, float]) -> bool:
        first = a[0] <= b[0] if left else a[0] >= b[0]
        second = a[1] <= b[1] if smaller else a[1] >= b[1]
        return first and second and a != b

    return sorted({p for p in points if not any(better(other, p) for other in points)})


def kernel_pictures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Draw how much faster than dense each kernel is: titles and pictures.

    Args:
        rows: Rows of ``kernels``.
    """
    pictures = []
    for job in dict.fromkeys(row["job"] for row in rows):
        mine = [row for row in rows if row["job"] == job and "@" in row["part"] and row.get("speedup")]
        series = _group(mine, lambda row: row["contender"], "density", "speedup")
        if series:
            at = sorted({row["density"] for row in mine})
            ideal = [(d, 1 / d) for d in at]
            pictures.append((job, curves(series, x="density", y="times as fast as dense", ideal=ideal)))
    return pictures


def method_pictures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Draw error over density, and the error of each kind of head: titles and pictures.

    Args:
        rows: Rows of ``methods``.
    """
    pictures = []
    for source in dict.fromkeys(row["source"] for row in rows):
        mine = [row for row in rows if row["source"] == source]
        series = _group(mine, lambda row: row["part"], "density", "error")
        pictures.append((source, curves(series, x="density", y="relative L2 error", smaller_is_better=True)))
        asked = {row["asked"] for row in mine if row["asked"] is not None}
        typical = min(asked, key=lambda density: abs(density - 0.2), default=None)
        some = [row for row in mine if row["asked"] in (typical, None)]
        kinds = list(some[0]["heads"])
        values = [[row["heads"].get(kind) for kind in kinds] for row in some]
        title = f"{source}: error of each head" + ("" if typical is None else f", density {typical:g} asked for")
        pictures.append((title, heat_map([row["part"] for row in some], kinds, values, "relative L2")))
    return pictures


def quality_pictures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Draw PSNR over density: titles and pictures.

    Args:
        rows: Rows of ``quality``, averaged over clips.
    """
    pictures = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and isinstance(row["psnr"], float)]
        # schedules differ between methods, and so does what their first, dense calls count for
        over_density = _group(mine, _setting, "overall_density", "psnr")
        if over_density:
            pictures.append(
                (f"{model}: quality over density", curves(over_density, x="density, all steps", y="PSNR to dense, dB"))
            )
    return pictures


def time_pictures(rows: Sequence[Row], quality: Sequence[Row]) -> list[tuple[str, str]]:
    """Draw PSNR over time, of settings whose videos were both timed and compared: titles and pictures.

    Args:
        rows: Rows of ``e2e``.
        quality: Rows of ``quality``, averaged over clips.
    """
    psnr = {(row["model"], row["part"]): row["psnr"] for row in quality if isinstance(row["psnr"], float)}
    both = [row | {"psnr": psnr[row["model"], row["part"]]} for row in rows if (row["model"], row["part"]) in psnr]
    pictures = []
    for model in dict.fromkeys(row["model"] for row in both):
        series = _group([row for row in both if row["model"] == model], _setting, "speedup", "psnr")
        pictures.append(
            (f"{model}: quality over time", curves(series, x="times as fast as dense", y="PSNR to dense, dB"))
        )
    return pictures


def _setting(row: Row) -> str:
    return row["setting"]["name"]


def _group(rows: Sequence[Row], name: Any, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if isinstance(row.get(x), (int, float)) and isinstance(row.get(y), (int, float)):
            series.setdefault(name(row), []).append((row[x], row[y]))
    return series


def _style() -> Any:
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(ink, INK),
        "font.size": 11,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "fastdit",
    }


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
