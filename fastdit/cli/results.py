"""The numbers of a run: as JSON and as a table."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from ..packages import installed_version
from .screen import add_row, number, plain_table

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "xformers", "imageio-ffmpeg")
IDENTICAL = "inf"
"""What JSON holds for the PSNR of two identical videos, which no JSON number can say."""

SETTINGS = ("method", "method_fields", "schedule", "kernel", "steps", "sparse_steps")
SHARED = (*SETTINGS, "frames", "height", "width", "fps")
"""What is the same for all videos of one run."""

COVERS = "text encoding, denoising and decoding; not loading, the warm-up step or writing files"


def versions() -> dict[str, str | None]:
    """Return the versions of Python, fastdit and what it runs on; ``None`` for what is not installed."""
    from .. import __version__

    own = {"fastdit": __version__, "python": platform.python_version()}
    return {**own, **{package: installed_version(package) for package in PACKAGES}}


def decibels(value: float) -> float | str:
    """Return a PSNR as JSON can hold it: a number, or ``"inf"`` for identical videos.

    Args:
        value: dB, or inf.
    """
    return IDENTICAL if math.isinf(value) else value


def mean_decibels(values: Iterable[float | str]) -> float | str:
    """Return the PSNR of several videos of one length taken together, from their mean squared error.

    Args:
        values: Each as ``decibels`` gives it.
    """
    from ..metrics import mean_psnr

    return decibels(mean_psnr(float(value) for value in values))


def ratio(dense: float | None, sparse: float | None) -> float | None:
    """Return how many times faster the sparse run was, ``None`` if that is not known.

    Args:
        dense: Seconds of the dense run.
        sparse: Seconds of the sparse run.
    """
    return dense / sparse if dense and sparse else None


def summarize(clips: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Put the results of all videos into one report.

    Args:
        clips: One for each video, in order, as ``generate`` measures them.
        about: What holds for all of them, beside what they say themselves.

    Returns:
        What ``--json`` and ``--report`` write. Seconds are sums, densities means; what was not measured is ``None``.
        ``density`` is that of the sparse steps, dense layers included; ``overall_density`` that of all steps;
        ``sparse_call_density`` that of the calls that ran sparse.
    """

    def total(name: str) -> float | None:
        values = [clip[name] for clip in clips]
        return None if None in values else sum(values)

    compared = all(clip["psnr"] is not None for clip in clips)
    seconds, attention, sparse_steps = total("seconds"), total("attention_seconds"), total("sparse_steps_seconds")
    shared = {name: clips[0][name] for name in SHARED}
    own = [{name: value for name, value in clip.items() if name not in SHARED} for clip in clips]
    return {
        "method": shared.pop("method"),
        "density": _mean([clip["density"] for clip in clips]),
        "overall_density": _mean([clip["overall_density"] for clip in clips]),
        "sparse_call_density": _mean([clip["sparse_call_density"] for clip in clips]),
        "seconds": seconds,
        "seconds_cover": COVERS,
        "speedup": ratio(total("dense_seconds"), seconds),
        "speedup_sparse_steps": ratio(total("dense_sparse_steps_seconds"), sparse_steps),
        "speedup_attention": ratio(total("dense_attention_seconds"), attention),
        "psnr": mean_decibels(clip["psnr"] for clip in clips) if compared else None,
        "ssim": _mean([clip["ssim"] for clip in clips]),
        "dense_seconds": total("dense_seconds"),
        "sparse_steps_seconds": sparse_steps,
        "dense_sparse_steps_seconds": total("dense_sparse_steps_seconds"),
        "attention_seconds": attention,
        "dense_attention_seconds": total("dense_attention_seconds"),
        **shared,
        **about,
        "versions": versions(),
        "clips": own,
    }


def tables(report: dict[str, Any]) -> list[Table]:
    """Show a report as tables: what was measured in all, and for each video if there are several.

    Args:
        report: As ``summarize`` returns it.
    """
    compared = report["dense_seconds"] is not None
    columns = ("dense", "sparse", "speed-up") if compared else ("",)
    table = plain_table(f"{report['plan'] or report['method']} on {report['model']}", "", *columns)

    def row(name: str, sparse: str, dense: str = "", gain: str = "") -> None:
        add_row(table, name, *((dense, sparse, gain) if compared else (sparse,)))

    def times(name: str, key: str, speedup: str) -> None:
        sparse, dense = number(report[key], "{:.2f} s"), number(report[f"dense_{key}"], "{:.2f} s")
        row(name, sparse, dense, number(report[speedup], "{:.2f}x"))

    count, steps = len(report["sparse_steps"]), report["steps"]
    density, of_calls = report["density"], report["sparse_call_density"]
    if density is not None and of_calls is not None and abs(density - of_calls) > 0.0005:
        row("density, sparse layers", number(of_calls, "{:.3f}"), "1")
    row(f"density, sparse steps ({count})", number(density, "{:.3f}"), "1")
    row(f"density, all steps ({steps})", number(report["overall_density"], "{:.3f}"), "1")
    times(f"time, sparse steps ({count})", "sparse_steps_seconds", "speedup_sparse_steps")
    times("time, attention", "attention_seconds", "speedup_attention")
    times("time, end to end", "seconds", "speedup")
    if compared:
        row("PSNR to dense", number(report["psnr"], "{:.1f} dB"))
        row("SSIM to dense", number(report["ssim"], "{:.3f}"))
    table.caption = f"times cover {COVERS}"
    table.caption_justify = "left"
    return [table] if len(report["clips"]) == 1 else [table, _clip_table(report["clips"])]


def _clip_table(clips: list[dict[str, Any]]) -> Table:
    table = plain_table(f"{len(clips)} videos", "file", "density", "seconds", "speed-up", "PSNR", "SSIM")
    for clip in clips:
        add_row(
            table,
            Path(clip["file"]).name,
            number(clip["density"], "{:.3f}"),
            number(clip["seconds"]),
            number(ratio(clip["dense_seconds"], clip["seconds"]), "{:.2f}x"),
            number(clip["psnr"], "{:.1f}"),
            number(clip["ssim"], "{:.3f}"),
        )
    return table


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
