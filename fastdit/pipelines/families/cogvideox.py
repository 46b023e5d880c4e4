"""CogVideoX 1.0 and 1.5, text and image to video: text comes first in every self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ...tokens import VideoGrid
from .family import ModelFamily, patched, register_family


@register_family
class CogVideoX(ModelFamily):
    """CogVideoX, whose latent is ``(B, F, C, H, W)``."""

    name = "cogvideox"
    transformers = ("CogVideoXTransformer3DModel",)
    text = "first"

    def grid(self, transformer: Module, arguments: Mapping[str, Any]) -> VideoGrid | str:
        """Divide the latent by the patch size; version 1.5 has patches of two frames."""
        _, frames, _, height, width = arguments["hidden_states"].shape
        config = transformer.config
        return patched((frames, height, width), (config.patch_size_t or 1, config.patch_size, config.patch_size))
