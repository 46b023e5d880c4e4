"""Mochi: text comes last; each sample is a call of its own, over the video and its real text only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ...tokens import VideoGrid
from .family import ModelFamily, patched, register_family


@register_family
class Mochi(ModelFamily):
    """Mochi, whose latent is ``(B, C, F, H, W)``."""

    name = "mochi"
    transformers = ("MochiTransformer3DModel",)
    text = "last"

    def grid(self, transformer: Module, arguments: Mapping[str, Any]) -> VideoGrid | str:
        """Divide the latent by the patch size; patches are one frame deep."""
        patch = transformer.config.patch_size
        return patched(arguments["hidden_states"].shape[-3:], (1, patch, patch))

    def calls(self, arguments: Mapping[str, Any]) -> int:
        return arguments["hidden_states"].shape[0]
