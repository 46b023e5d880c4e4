"""Sizes and lengths that a pipeline can make, from its configuration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from .errors import InputError

# diffusers' pipelines name the compression of their autoencoder in these ways
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


@dataclass(frozen=True)
class SizeLimits:
    """Sizes and lengths that a pipeline can make.

    Args:
        height_step: Heights are multiples of this many pixels.
        width_step: Widths are multiples of this many pixels.
        frame_step: Numbers of frames are one more than a multiple of this.
        longest_axis: Tokens along the longest axis that the position embedding reaches, or ``None``.
    """

    height_step: int
    width_step: int
    frame_step: int
    longest_axis: int | None = None

    @classmethod
    def of(cls, pipeline: Any) -> SizeLimits:
        """Read the limits of a pipeline.

        Args:
            pipeline: The pipeline.
        """
        config = pipeline.transformer.config
        patch = getattr(config, "patch_size", 1)
        if isinstance(patch, int):
            patch = (1, patch, patch)
        spatial = _first(pipeline, _SPATIAL)
        return cls(
            height_step=spatial * patch[-2],
            width_step=spatial * patch[-1],
            frame_step=_first(pipeline, _TEMPORAL),
            longest_axis=getattr(config, "rope_max_seq_len", None),
        )

    def check(self, name: str, value: int) -> None:
        """Check one length.

        Args:
            name: ``"height"``, ``"width"`` or ``"frames"``.
            value: Pixels or frames.

        Raises:
            InputError: The model cannot take it; the message names the nearest that it can.
        """
        nearest = self.nearest(name, value)
        if nearest == value:
            return
        step, extra = self._rule(name)
        rule = f"one more than a multiple of {step}" if extra else f"a multiple of {step}"
        if self.longest_axis is not None:
            rule += f", at most {step * (self.longest_axis - extra) + extra}"
        asked = f"{value} frames" if name == "frames" else f"a {name} of {value} pixels"
        raise InputError(f"this model cannot make {asked}: it must be {rule}; the nearest is {nearest}")

    def nearest(self, name: str, value: int) -> int:
        """Return the nearest length that the model can take; of two equally near, the larger.

        Args:
            name: ``"height"``, ``"width"`` or ``"frames"``.
            value: Pixels or frames.
        """
        step, extra = self._rule(name)
        tokens = (2 * (value - extra) + step) // (2 * step) + extra
        tokens = max(tokens, 1)
        if self.longest_axis is not None:
            tokens = min(tokens, self.longest_axis)
        return step * (tokens - extra) + extra

    def _rule(self, name: str) -> tuple[int, int]:
        rules = {
            "height": (self.height_step, 0),
            "width": (self.width_step, 0),
            "frames": (self.frame_step, 1),
        }
        return rules[name]


def check_sizes(pipeline: Any, arguments: dict[str, Any]) -> None:
    """Check height, width and number of frames, given or by default, before anything is computed.

    Args:
        pipeline: The pipeline.
        arguments: Keywords of its call.

    Raises:
        InputError: The model cannot take one of them.
    """
    limits = SizeLimits.of(pipeline)
    parameters = inspect.signature(pipeline.__call__).parameters
    for name, keyword in (("height", "height"), ("width", "width"), ("frames", "num_frames")):
        default = parameters[keyword].default if keyword in parameters else None
        value = arguments.get(keyword, default)
        if isinstance(value, int):
            limits.check(name, value)


def _first(pipeline: Any, names: tuple[str, ...]) -> int:
    for name in names:
        if hasattr(pipeline, name):
            return int(getattr(pipeline, name))
    return 1
