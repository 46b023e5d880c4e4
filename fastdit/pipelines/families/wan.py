"""Wan 2.1 and 2.2: text and image to video, and VACE. Text is in cross-attention only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ...tokens import VideoGrid
from .family import Boundary, ModelFamily, attentions_of_blocks, patched, register_family


@register_family
class Wan(ModelFamily):
    """Wan, whose latent is ``(B, C, F, H, W)``. VACE's control blocks attend over the same tokens."""

    name = "wan"
    transformers = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    blocks = ("blocks",)

    def self_attentions(self, transformer: Module) -> list[tuple[str, Module]]:
        """List those of the main blocks, then those of VACE's control blocks."""
        lists = (*self.blocks, "vace_blocks") if hasattr(transformer, "vace_blocks") else self.blocks
        return attentions_of_blocks(transformer, lists, self.attention)

    def grid(self, transformer: Module, arguments: Mapping[str, Any]) -> VideoGrid | str:
        return patched(arguments["hidden_states"].shape[-3:], transformer.config.patch_size)

    def boundary(self, transformer: Module) -> Boundary | None:
        """Name where tokens enter and leave; VACE adds control tokens in between."""
        stock = type(transformer).__name__ == "WanTransformer3DModel"
        return Boundary("patch_embedding", "rope", "proj_out") if stock else None
