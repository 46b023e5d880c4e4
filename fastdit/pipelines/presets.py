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

# Family, smallest width (heads x head dim), density of DraftAttention; the first line that fits counts. The paper
# gives 0.25 for Wan 2.1 14B and 0.1 for HunyuanVideo. Nothing is published for the others: smaller models have
# fewer tokens and heads to spare and keep more.
_DENSITIES = (
    ("wan", 5120, 0.25),
    ("wan", 3072, 0.3),
    ("wan", 0, 0.4),
    ("hunyuan_video", 0, 0.1),
    ("cogvideox", 3072, 0.3),
    ("mochi", 3072, 0.3),
    ("ltx", 4096, 0.3),
)
_DENSITY = 0.4


def find_preset(family: ModelFamily, transformer: Module) -> Preset:
    """Return the default for a model.

    Args:
        family: Its family.
        transformer: The model.
    """
    config: Any = transformer.config
    width = getattr(config, "num_attention_heads", 0) * getattr(config, "attention_head_dim", 0)
    fitting = (density for name, least, density in _DENSITIES if name == family.name and width >= least)
    return Preset("draft", {"density": next(fitting, _DENSITY)}, _SCHEDULE)
