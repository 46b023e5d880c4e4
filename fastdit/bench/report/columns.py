"""Columns of each benchmark: titles, units, which direction is better, and what counts as a change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...metrics import mean_psnr
from ..measuring.measure import FEWEST
from .result_store import Row, key, latest

SIGMAS = 3.0
"""Standard errors beyond which times differ."""

SAME = 0.02
"""Relative change of a time that is never called one, however quiet the machine was."""


@dataclass(frozen=True)
class Column:
    """One number of a row.

    Args:
        name: Its name in the row.
        title: Its heading.
        form: How it is written.
        better: 1 if larger is better, -1 if smaller is, 0 if neither.
        noise: Name of the number that says how far it may be off; ``None`` if it is the same in every run.
        factor: What it is multiplied by before it is written.
    """

    name: str
    title: str
    form: str = "{:.3f}"
    better: int = 0
    noise: str | None = None
    factor: float = 1.0

    def write(self, row: Mapping[str, Any]) -> str:
        """Write the number of a row for people; ``-`` where nothing was measured.

        Args:
            row: The row.
        """
        value = row.get(self.name)
        if value is None:
            return "-"
        return value if isinstance(value, str) else self.form.format(value * self.factor)


DENSITY = Column("density", "density")

COLUMNS: dict[str, tuple[Column, ...]] = {
    "kernels": (
        DENSITY,
        Column("seconds", "ms", "{:.2f}", -1, "seconds_spread", 1e3),
        Column("tflops", "TFLOP/s", "{:.3g}"),
        Column("speedup", "x dense", "{:.2f}"),
        Column("ideal", "of ideal", "{:.0%}"),
        Column("extra_bytes", "extra MiB", "{:.1f}", -1, None, 2**-20),
    ),
    "methods": (
        DENSITY,
        Column("error", "relative L2", "{:.3f}", -1),
        Column("recall", "recall", "{:.3f}", 1),
        Column("choice", "choice / call", "{:.0%}"),
        Column("first", "first / call", "{:.1f}"),
    ),
    "quality": (
        DENSITY,
        Column("overall_density", "all steps"),
        Column("psnr", "PSNR", "{:.1f}", 1),
        Column("ssim", "SSIM", "{:.3f}", 1),
        Column("lpips", "LPIPS", "{:.3f}", -1),
        Column("flicker_ratio", "flicker / dense", "{:.2f}"),
        Column("accuracy", "prompt", "{:.2f}", 1),
        Column("dense_accuracy", "prompt, dense", "{:.2f}"),
        Column("clips", "clips", "{:.0f}"),
    ),
    "e2e": (
        DENSITY,
        Column("seconds", "s / video", "{:.1f}", -1, "seconds_spread"),
        Column("step_seconds", "s / step", "{:.3f}"),
        Column("cold_seconds", "first, s", "{:.1f}"),
        Column("speedup", "x dense", "{:.2f}"),
        Column("attention_speedup", "attention x", "{:.2f}"),
        Column("attention_share", "share", "{:.0%}"),
        Column("predicted_speedup", "Amdahl says", "{:.2f}"),
        Column("peak_bytes", "peak GiB", "{:.2f}", -1, None, 2**-30),
    ),
}

TITLES = {
    "kernels": "Kernels",
    "methods": "Methods on single calls",
    "quality": "Quality of videos",
    "e2e": "Whole videos",
}


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    """Average the clips of each setting in the rows of ``quality``; others stay as they are.

    Args:
        rows: Rows of one benchmark.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    out = []
    for row in rows:
        if row["benchmark"] != "quality" or "absent" in row:
            out.append(row)
        else:
            groups.setdefault((row["model"], row["part"]), []).append(row)
    for group in groups.values():
        row = dict(group[0])
        for name in ("density", "overall_density", "ssim", "lpips", "accuracy", "dense_accuracy"):
            values = [each[name] for each in group if each.get(name) is not None]
            row[name] = sum(values) / len(values) if values else None
        psnr = mean_psnr(float(each["psnr"]) for each in group)
        row["psnr"] = psnr if math.isfinite(psnr) else "inf"
        steady = sum(each["dense_flicker"] for each in group)
        row["flicker_ratio"] = sum(each["flicker"] for each in group) / steady if steady else None
        out.append(row | {"clips": len(group)})
    return out


def compared(old: Sequence[Row], new: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the rows that two runs have both, each as it was and as it is.

    Args:
        old: Rows of the earlier run.
        new: Rows of the later one.
    """
    before = {key(row): row for row in latest(old)}
    return [(before[key(row)], row) for row in latest(new) if key(row) in before]


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[dict[str, Any]]:
    """List what differs between two runs beyond noise.

    Times differ if they are apart by three standard errors of both together and by 2 %; fewer than three repeats are
    never called different. Everything else is computed the same way from the same seed, and differs if it is not equal
    to three digits.

    Args:
        old: Rows of the earlier run.
        new: Rows of the later one.

    Returns:
        ``benchmark``, ``job``, ``part``, ``column``, ``old``, ``new``, and ``better``: True, False, or ``None`` where
        it is unknown. Rows that only one of the two has are left out.
    """
    differences = []
    for earlier, row in compared(old, new):
        if ("absent" in row) != ("absent" in earlier):
            differences.append(
                _change(row, "runs here", "absent" not in earlier, "absent" not in row, "absent" not in row)
            )
        for column in COLUMNS[row["benchmark"]]:
            a, b = earlier.get(column.name), row.get(column.name)
            if column.better and isinstance(a, (int, float)) and isinstance(b, (int, float)):
                noise = _noise(column, earlier, row)
                if abs(b - a) > noise:
                    differences.append(_change(row, column.title, a, b, (b - a) * column.better > 0, column))
    return differences


def _change(row: Row, title: str, old: Any, new: Any, better: bool, column: Column | None = None) -> dict[str, Any]:
    def written(value: Any) -> str:
        return str(value) if column is None else column.write({column.name: value})

    about = {name: row[name] for name in ("benchmark", "job", "part")}
    return {**about, "column": title, "old": written(old), "new": written(new), "better": better}


def _noise(column: Column, old: Row, new: Row) -> float:
    a = abs(old[column.name])
    if column.noise is None:
        return 2e-3 * max(a, 1e-9)
    if min(row.get("repeats") or 0 for row in (old, new)) < FEWEST:
        return math.inf
    spread = math.hypot(old.get(column.noise) or 0.0, new.get(column.noise) or 0.0)
    return max(SIGMAS * spread, SAME * a)
