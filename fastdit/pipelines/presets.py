"""The default method for a model, from published settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.nn import Module

from ..schedule import Schedule
from .base import ModelFamily


@dataclass(frozen=True)
class Preset:
    """Hold a default for models of one family and size.

    Args:
        method: Name of the method.
        fields: Its fields.
        schedule: Which steps and layers stay dense.
    """

    method: str
    fields: dict[str, Any]
    schedule: Schedule


# Radial Attention's released scripts keep 12 of 50 steps dense and, but for HunyuanVideo, the first layer.
_SCHEDULE = Schedule(warmup_steps=0.25, dense_layers=(0,))

# For ten steps and six layers; chosen on a single clip of the demo (docs/decisions.md).
_TINY_SCHEDULE = Schedule(warmup_steps=0.3)

# Family, smallest width (heads x head dim), fields of DraftAttention, schedule; the first line that fits counts. The
# paper gives density 0.25 for Wan 2.1 14B and 0.1 for HunyuanVideo. Nothing is published for the others: smaller
# models have fewer tokens and heads to spare and keep more. The narrowest is the demo's.
_TABLE: tuple[tuple[str, int, dict[str, Any], Schedule], ...] = (
    ("wan", 5120, {"density": 0.25}, _SCHEDULE),
    ("wan", 3072, {"density": 0.3}, _SCHEDULE),
    ("wan", 1024, {"density": 0.4}, _SCHEDULE),
    ("wan", 0, {"density": 0.2, "tile": (4, 4, 4)}, _TINY_SCHEDULE),
    ("hunyuan_video", 0, {"density": 0.1}, _SCHEDULE),
    ("cogvideox", 3072, {"density": 0.3}, _SCHEDULE),
    ("mochi", 3072, {"density": 0.3}, _SCHEDULE),
    ("ltx", 4096, {"density": 0.3}, _SCHEDULE),
)
_OTHER: dict[str, Any] = {"density": 0.4}


def find_preset(family: ModelFamily, transformer: Module) -> Preset:
    """Return the default for a model.

    Args:
        family: Its family.
        transformer: The model.
    """
    config: Any = transformer.config
    width = getattr(config, "num_attention_heads", 0) * getattr(config, "attention_head_dim", 0)
    for name, least, fields, schedule in _TABLE:
        if name == family.name and width >= least:
            return Preset("draft", fields, schedule)
    return Preset("draft", _OTHER, _SCHEDULE)
