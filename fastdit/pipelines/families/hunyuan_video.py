"""HunyuanVideo: text comes last, padded, and every call carries a mask that says which of it is real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module

from ...tokens import VideoGrid
from .family import ModelFamily, patched, register_family


@register_family
class HunyuanVideo(ModelFamily):
    """HunyuanVideo, whose latent is ``(B, C, F, H, W)``. The token refiner attends over text only and stays dense."""

    name = "hunyuan_video"
    transformers = ("HunyuanVideoTransformer3DModel",)
    text = "last"
    blocks = ("transformer_blocks", "single_transformer_blocks")
    attention = "attn"
    mask_argument = "encoder_attention_mask"

    def output_projection(self, transformer: Module, path: str) -> Module:
        """Return ``to_out`` of a two-stream block; one-stream blocks project attention and MLP together."""
        if path.startswith("single_transformer_blocks."):
            return transformer.get_submodule(path.rpartition(".")[0]).proj_out
        return super().output_projection(transformer, path)

    def grid(self, transformer: Module, arguments: Mapping[str, Any]) -> VideoGrid | str:
        config = transformer.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        return patched(arguments["hidden_states"].shape[-3:], patch)
