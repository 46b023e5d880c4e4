"""Which method, schedule and precision a model gets, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.nn import Module

from .attention import AttentionMethod, get_method
from .pipelines.families.family import ModelFamily
from .plans.plan import Plan, config_hash
from .plans.shipped import find_shipped_plan
from .schedule import Schedule

_OURS = "fastdit: nothing is published; smaller models have fewer tokens and heads to spare and keep more"
_DEMO = "fastdit, docs/methods.md: chosen on prompts of the demo"
_DRAFT = "DraftAttention, section 4 and its code"
_RADIAL = "Radial Attention, inference scripts"

# Not in the paper. On the demo stand-ins bring every method nearer to dense (docs/methods.md), and SVG-EAR reports the
# same for large models; they cost one key per block.
_MEANS = {"compensate": "mean"}
_CUBES = {"tile": (4, 4, 4), "per_row": True, "parts": 8}

# Draft's code goes by noise level, which for the models it knows is 20 to 30 % of the steps; the paper says 25 %.
_QUARTER = Schedule(warmup_steps=0.25, dense_layers=(0,))
_DEMO_STEPS = Schedule(warmup_steps=0.2, refresh_steps=2)
_TWO_LAYERS = Schedule(warmup_steps=0.25, dense_layers=(0, 1))


@dataclass(frozen=True)
class Preset:
    """Hold the settings of a method for the models of one family and size.

    Args:
        method: Name of the method.
        schedule: Which steps and layers stay dense, and when dynamic masks are rebuilt.
        source: Where the settings come from.
        fields: Fields of the method that differ from its own defaults.
        family: Name of the family; ``None`` for all.
        width: Smallest number of heads times head dim, at least 0.
        experts: Transformers of the pipeline, 2 in Wan 2.2 14B; ``None`` for any number.
    """

    method: str
    schedule: Schedule
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None
    width: int = 0
    experts: int | None = None


PRESETS: tuple[Preset, ...] = (
    # the default method of each family first, the widest models first
    Preset("draft", _QUARTER, _DRAFT, {"density": 0.25, **_MEANS}, "wan", 5120),
    Preset("draft", _QUARTER, _OURS, {"density": 0.3, **_MEANS}, "wan", 3072),
    Preset("draft", _QUARTER, _OURS, {"density": 0.4, **_MEANS}, "wan", 1024),
    Preset("profiled", _DEMO_STEPS, _DEMO, {"density": 0.17, **_MEANS}, "wan"),
    Preset("draft", _DEMO_STEPS, _DEMO, {"density": 0.17, **_CUBES, **_MEANS}, "wan"),
    Preset("draft", _TWO_LAYERS, _DRAFT, {"density": 0.1, **_MEANS}, "hunyuan_video"),
    Preset("draft", _QUARTER, _OURS, {"density": 0.3, **_MEANS}, "cogvideox", 3072),
    Preset("draft", _QUARTER, _OURS, {"density": 0.3, **_MEANS}, "mochi", 3072),
    Preset("draft", _QUARTER, _OURS, {"density": 0.3, **_MEANS}, "ltx", 4096),
    Preset("draft", _QUARTER, _OURS, {"density": 0.4, **_MEANS}),
    Preset("radial", Schedule(warmup_steps=0.275, dense_layers=(0,)), _RADIAL, {"decay": 0.8}, "wan", 5120, 2),
    Preset("radial", Schedule(warmup_steps=0.24, dense_layers=(0,)), _RADIAL, {"decay": 0.2}, "wan"),
    Preset("radial", Schedule(warmup_steps=0.24), _RADIAL, {"decay": 0.95, "sink": False}, "hunyuan_video"),
    Preset("adaspa", Schedule(warmup_steps=0.2, refresh_steps=(0.2, 0.6)), "AdaSpa, section 5"),
    Preset("sla", Schedule(), "SLA, its code and TurboDiffusion's: every layer and step, of models trained with it"),
)


def _choose(
    method: str | Path | AttentionMethod | Plan | None,
    fields: Mapping[str, Any],
    transformers: Mapping[str, Module],
    families: Sequence[ModelFamily],
    bare: bool,
) -> tuple[dict[str, AttentionMethod], Schedule, str | None]:
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith(".json")):
        method = Plan.load(method)
    if isinstance(method, (AttentionMethod, Plan)) and fields:
        what = "a plan, whose methods have their own"
        if isinstance(method, AttentionMethod):
            what = f"a method object; give the name {method.name!r}, or set them with dataclasses.replace"
        raise TypeError(f"fields ({', '.join(fields)}) cannot be combined with {what}")
    if method is None and not fields and not bare:
        shipped = find_shipped_plan(_config_hash(next(iter(transformers.values()))))
        if shipped is not None and _misfit(shipped, transformers, families) is None:
            method = shipped
    if isinstance(method, Plan):
        reason = _misfit(method, transformers, families)
        if reason is not None:
            raise ValueError(f"the plan does not fit: {reason}")
        return {title: method.method(title) for title in transformers}, method.schedule, method.precision
    name = method.name if isinstance(method, AttentionMethod) else method
    preset = find_preset(families[0], next(iter(transformers.values())), name, len(transformers))
    if method is None or isinstance(method, str):
        method = get_method(preset.method, **{**preset.fields, **fields})
    if not isinstance(method, AttentionMethod):
        raise TypeError(f"method must be a name, a method, a plan or None, got {type(method).__name__}")
    return dict.fromkeys(transformers, method), Schedule() if bare else preset.schedule, None


def _misfit(plan: Plan, transformers: Mapping[str, Module], families: Sequence[ModelFamily]) -> str | None:
    for (title, transformer), family in zip(transformers.items(), families, strict=True):
        reason = plan.fits(
            title,
            model_class=type(transformer).__name__,
            config_hash=_config_hash(transformer),
            layers=len(family.self_attentions(transformer)),
            heads=getattr(transformer.config, "num_attention_heads", 0),
        )
        if reason is not None:
            return reason
    return None


def _config_hash(transformer: Module) -> str:
    config: Any = transformer.config
    return config_hash(config)


def find_preset(family: ModelFamily, transformer: Module, method: str | None = None, experts: int = 1) -> Preset:
    """Return the settings for a model: the first that fit.

    Args:
        family: Its family.
        transformer: The model.
        method: Name of the method wanted; ``None`` for the model's default method.
        experts: Transformers of the pipeline, at least 1.
    """
    config: Any = transformer.config
    width = getattr(config, "num_attention_heads", 0) * getattr(config, "attention_head_dim", 0)
    for preset in PRESETS:
        if (
            preset.family in (None, family.name)
            and width >= preset.width
            and preset.method == (method or preset.method)
            and preset.experts in (None, experts)
        ):
            return preset
    return Preset(method or "draft", _QUARTER, _OURS)
