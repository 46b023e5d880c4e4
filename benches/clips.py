"""Clips of the demo."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastdit.demo import DEFAULTS


def make_clip(pipeline: Any, prompt: str, seed: int, steps: int | None = None) -> np.ndarray:
    """Make a clip of the demo.

    Args:
        pipeline: The demo.
        prompt: What it shows.
        seed: Of the noise.
        steps: Denoising steps; default: the demo's.

    Returns:
        ``(F, H, W, 3)`` fp32 in [0, 1].
    """
    return pipeline(
        prompt=prompt,
        negative_prompt=DEFAULTS.negative_prompt,
        num_frames=DEFAULTS.num_frames,
        height=DEFAULTS.height,
        width=DEFAULTS.width,
        num_inference_steps=steps or DEFAULTS.num_inference_steps,
        guidance_scale=DEFAULTS.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
