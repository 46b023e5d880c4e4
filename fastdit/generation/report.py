"""The numbers of a run, as JSON holds them."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from ..environment import installed_version

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
        about: Facts about the run as a whole.

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


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
