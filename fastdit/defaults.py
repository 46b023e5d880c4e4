"""Which method, schedule and precision a model gets, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.nn import Module

from .attention import AttentionMethod, get_method
from .pipelines.families.family import ModelFamily, find_family
from .pipelines.targets import require_transformers
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


@dataclass(frozen=True)
class Choice:
    """The methods, schedule and precision that a model gets, with the reason.

    Args:
        methods: The method of each transformer, by its name in the pipeline.
        schedule: Which steps and layers stay dense, and when dynamic masks are rebuilt.
        precision: Low precision of products; ``None`` for the precision of the model.
        reason: Why, as a sentence.
        source: Where the settings come from: a publication, fastdit, the file of a plan, or the caller.
    """

    methods: Mapping[str, AttentionMethod]
    schedule: Schedule
    precision: str | None
    reason: str
    source: str


def choose(target: Any, method: str | Path | AttentionMethod | Plan | None = None, **fields: Any) -> Choice:
    """Return what ``enable_sparse_attention`` would run with the same arguments, and change nothing.

    Weights are not looked at, so a model on the meta device is enough.

    Args:
        target: A diffusers pipeline or a transformer.
        method: As for ``enable_sparse_attention``.
        **fields: Fields of the method, likewise.

    Raises:
        ValueError: Model or method is unknown, or a value is out of range or does not fit the model.
        FileNotFoundError: A file that the method needs is not there.
        TypeError: The method has no such field, or fields are given together with a method object or a plan.
    """
    transformers = require_transformers(target)
    families = [find_family(transformer) for transformer in transformers.values()]
    source = "caller"
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith(".json")):
        source, method = str(method), Plan.load(method)
    if isinstance(method, (AttentionMethod, Plan)) and fields:
        what = "a plan, whose methods have their own"
        if isinstance(method, AttentionMethod):
            what = f"a method object; give the name {method.name!r}, or set them with dataclasses.replace"
        raise TypeError(f"fields ({', '.join(fields)}) cannot be combined with {what}")
    if isinstance(method, Plan):
        misfit = _misfit(method, transformers, families)
        if misfit is not None:
            raise ValueError(f"the plan does not fit: {misfit}")
        return _run_plan(method, transformers, "The plan of the caller fits the model.", source)
    model, bare = next(iter(transformers.values())), isinstance(target, Module)
    if method is None and not fields and not bare:
        shipped = find_shipped_plan(config_hash(_config(model)))
        if shipped is not None and _misfit(shipped, transformers, families) is None:
            reason = f"fastdit ships a plan for this configuration of {type(model).__name__}."
            return _run_plan(shipped, transformers, reason, f"search with fastdit {shipped.fastdit}")
    name = method.name if isinstance(method, AttentionMethod) else method
    width = getattr(_config(model), "num_attention_heads", 0) * getattr(_config(model), "attention_head_dim", 0)
    preset = _find_preset(families[0].name, width, len(transformers), name)
    reason = f"The caller asks for {preset.method}"
    if method is None:
        reason = f"{preset.method} is the default method of a {type(model).__name__} of width {width}"
    if method is None or isinstance(method, str):
        source, method = preset.source, get_method(preset.method, **{**preset.fields, **fields})
    if not isinstance(method, AttentionMethod):
        raise TypeError(f"method must be a name, a method, a plan or None, got {type(method).__name__}")
    reason += f", with {', '.join(fields)} as given" if fields else ""
    reason += "; every call is sparse, because a bare transformer does not know the number of steps" if bare else ""
    schedule = Schedule() if bare else preset.schedule
    return Choice(dict.fromkeys(transformers, method), schedule, None, f"{reason}.", source)


def _run_plan(plan: Plan, titles: Iterable[str], reason: str, source: str) -> Choice:
    return Choice({title: plan.method(title) for title in titles}, plan.schedule, plan.precision, reason, source)


def _misfit(plan: Plan, transformers: Mapping[str, Module], families: Sequence[ModelFamily]) -> str | None:
    for (title, transformer), family in zip(transformers.items(), families, strict=True):
        config = _config(transformer)
        reason = plan.fits(
            title,
            model_class=type(transformer).__name__,
            config_hash=config_hash(config),
            layers=len(family.self_attentions(transformer)),
            heads=getattr(config, "num_attention_heads", 0),
        )
        if reason is not None:
            return reason
    return None


def _config(transformer: Module) -> Any:
    return transformer.config


def _find_preset(family: str, width: int, experts: int, method: str | None) -> Preset:
    for preset in PRESETS:
        if (
            preset.family in (None, family)
            and width >= preset.width
            and preset.method == (method or preset.method)
            and preset.experts in (None, experts)
        ):
            return preset
    return Preset(method or "draft", _QUARTER, "defaults of the method; schedule of fastdit")
