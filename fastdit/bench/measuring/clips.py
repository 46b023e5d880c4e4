"""Similarity of a video to the dense one, and flicker."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from ...metrics import SSIM_WINDOW, psnr, ssim

LPIPS_SIDE = 64
"""Pixels below which AlexNet has nothing left to compare."""


def compare_clips(clip: np.ndarray, dense: np.ndarray) -> dict[str, float | str | None]:
    """Compare a video with the dense one of the same prompt and seed.

    Args:
        clip: ``(F, H, W, 3)`` fp32 in [0, 1].
        dense: ``(F, H, W, 3)`` fp32 in [0, 1].

    Returns:
        ``psnr`` in dB, inf for identical videos; ``ssim`` in [-1, 1]; ``lpips``, at least 0; ``None`` for what cannot
        be measured here, and ``lpips_absent``, the reason. ``flicker`` and ``dense_flicker``, see ``flicker``.
    """
    a, b = (torch.from_numpy(np.ascontiguousarray(x)).float() for x in (clip, dense))
    size = min(a.shape[1:3])
    distance = lpips_distance() if size >= LPIPS_SIDE else f"it takes {LPIPS_SIDE} pixels, the videos have {size}"
    missing = {"lpips_absent": distance} if isinstance(distance, str) else {}
    return {
        "psnr": float(psnr(a, b)),
        "ssim": float(ssim(a, b)) if size >= SSIM_WINDOW else None,
        "lpips": None if isinstance(distance, str) else distance(a, b),
        **missing,
        "flicker": flicker(clip),
        "dense_flicker": flicker(dense),
    }


def flicker(clip: np.ndarray) -> float:
    """Return the mean absolute change from frame to frame, of 255: what VBench calls temporal flickering, inverted.

    Args:
        clip: ``(F, H, W, 3)`` in [0, 1].
    """
    return float(np.abs(np.diff(clip.astype(np.float64), axis=0)).mean() * 255) if len(clip) > 1 else 0.0


@cache
def lpips_distance() -> Callable[[torch.Tensor, torch.Tensor], float] | str:
    """Return LPIPS with AlexNet, a mean over frames ``(F, H, W, 3)`` in [0, 1], or why it cannot be measured."""
    if find_spec("lpips") is None:
        return "the package lpips is not installed (fastdit[metrics])"
    try:
        import lpips

        network: Any = lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:  # noqa: BLE001 - torchvision may not fit torch, and fetches weights in whatever way
        return f"LPIPS cannot be loaded: {type(error).__name__}: {error}"

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        pairs = zip(a.split(8), b.split(8), strict=True)
        values = [network(*(x.permute(0, 3, 1, 2) * 2 - 1 for x in pair)).flatten() for pair in pairs]
        return float(torch.cat(values).mean())

    return distance


def strip(dense: np.ndarray, clip: np.ndarray, columns: int = 6, height: int = 96) -> np.ndarray:
    """Show frames of the dense video above the same frames of another: ``(H, W, 3)`` uint8.

    Args:
        dense: ``(F, H, W, 3)`` in [0, 1].
        clip: ``(F, H, W, 3)`` in [0, 1].
        columns: Frames, at least 1.
        height: Of a frame in pixels, about.
    """
    step = max(1, math.ceil(dense.shape[1] / height))
    chosen = np.linspace(0, len(dense) - 1, columns).round().astype(int)
    rows = [
        np.concatenate(
            [np.pad(video[i, ::step, ::step], ((2, 2), (2, 2), (0, 0)), constant_values=1) for i in chosen], 1
        )
        for video in (dense, clip)
    ]
    return (np.concatenate(rows, 0).clip(0, 1) * 255 + 0.5).astype(np.uint8)
