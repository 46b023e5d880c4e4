"""LTX-Video: tokens arrive packed, and the grid beside them. Text is in cross-attention only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ...tokens import VideoGrid
from .family import Boundary, ModelFamily, register_family


@register_family
class LTX(ModelFamily):
    """LTX-Video, whose grid is in the arguments ``num_frames``, ``height`` and ``width``."""

    name = "ltx"
    transformers = ("LTXVideoTransformer3DModel",)

    def grid(self, transformer: Module, arguments: Mapping[str, Any]) -> VideoGrid | str:
        """Return the grid the caller names; conditioning pipelines give coordinates instead."""
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        if frames is None or height is None or width is None:
            return "the pipeline passes video_coords instead of num_frames, height and width: the grid is unknown"
        return VideoGrid(frames, height, width)

    def boundary(self, transformer: Module) -> Boundary | None:
        stock = type(transformer).__name__ == "LTXVideoTransformer3DModel"
        return Boundary("proj_in", "rope", "proj_out") if stock else None
