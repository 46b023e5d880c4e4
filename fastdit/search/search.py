"""The search for a plan: cost, capture, choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn import Module

from ..attention import AttentionMethod
from ..defaults import choose
from ..pipelines.families.family import find_family
from ..pipelines.targets import require_transformers
from ..plans.plan import Plan, TransformerPlan, config_hash
from .allocation import Choices, Problem, Target, choose_modes
from .candidates import make_candidates, sparse_vdit_candidates
from .cost import CostModel
from .sampling import Sampling
from .scores import Scores, Shape
from .stages import Progress, Task
from .statistics import QUANTILE, Cells, collect

BUDGET = 0.25
"""Default mean density of a plan."""

PARO_DENSITY = 0.5
"""Default density of PARO's masks, the first in the paper."""

PRESETS = ("sparse-vdit", "paro")

PROMPTS = 4
"""Number of built-in prompts used by default."""

CALIBRATION_PROMPTS = (
    "A golden retriever runs along a beach at sunset, waves breaking behind it, the camera following from the side.",
    "A slow aerial shot over a mountain lake in autumn, mist drifting between the trees.",
    "A chef chops vegetables in a bright kitchen, close-up of hands and knife, steam rising in the background.",
    "Rain falls on a neon-lit street at night, people with umbrellas walk past, reflections in the puddles.",
    "A paper boat floats down a small stream, turning slowly, leaves passing by.",
    "An astronaut walks across a red desert, dust blowing, a static camera far away.",
    "A ballet dancer spins on a dark stage under a single spotlight.",
    "Time lapse of clouds moving over a city skyline from day to night.",
    "A macro shot of a bee landing on a purple flower, its wings moving fast.",
    "Two children build a sand castle, laughing, hand-held camera, midday sun.",
    "A steam train crosses a stone bridge in the snow, smoke trailing behind.",
    "An old man reads a newspaper in a quiet cafe, almost motionless, warm light from the window.",
)
"""Built-in prompts; the first few differ most from each other."""


def search(
    pipeline: Any,
    prompts: Sequence[str] | None = None,
    *,
    budget: float | None = None,
    target_speedup: float | None = None,
    end_to_end: bool = False,
    max_error: float | None = None,
    candidates: Sequence[str | Mapping[str, Any] | AttentionMethod] | None = None,
    preset: str | None = None,
    sampling: Sampling | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    kernel: str | None = None,
    precision: str | None = None,
    sensitivity: bool = True,
    quantile: float = QUANTILE,
    cost: CostModel | None = None,
    folder: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Plan:
    """Search for the method and parameters of every step bucket, layer and head.

    First each candidate is timed; those much slower than dense attention are left out. Then the pipeline makes a video
    of each prompt with dense attention. At the sampled steps every candidate is scored on the same queries, keys and
    values. Last, the choice with the least error within the limit is made.

    Args:
        pipeline: A diffusers pipeline that sparse attention is not enabled on.
        prompts: Prompts like those that the plan is for; default: four built-in ones.
        budget: Limit the mean density of the calls that are decided about, in (0, 1]; default, if nothing else is
            limited: 0.25.
        target_speedup: Limit the time: dense self-attention over that of the plan in a whole run, above 0.
        end_to_end: Whether ``target_speedup`` is that of all denoising.
        max_error: Limit the error: root mean square of the relative error of a layer's output, at least 0.
        candidates: Methods, their names, or text such as ``"draft(density=0.2)"``; default: a few of every method.
        preset: A paper's own procedure. ``"sparse-vdit"``: its patterns and, without a limit, its rule; ``"paro"``: the
            first prompt gives every head its order and masks, the budget is their density, 0.5 without one.
        sampling: Which steps stay dense, are told apart and are looked at; default: the model's preset, with no layer
            kept dense, in three buckets with a step of each.
        arguments: Keywords of the pipeline's call but the prompt, such as ``num_frames`` and ``num_inference_steps``.
        seed: Of the noise of the first prompt, in [-2**63, 2**64); each of the others has the next.
        kernel: Name of the kernel to use; default: the fastest that can run.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; default: that of the model.
        sensitivity: Whether to measure, with the first prompt, how much each layer's error changes the model's output.
        quantile: Of the errors over prompts, steps and guidance passes that counts, in [0, 1].
        cost: A cost model of another device; default: this one is measured. Not with preset ``"paro"``.
        folder: Where scores are kept, one file for each prompt, so that a search that was interrupted goes on, and
            another limit needs no new scores; default: nowhere. Not with preset ``"paro"``.
        progress: Called with the stage, ``"cost"``, ``"calibrate"``, ``"capture"`` or ``"solve"``, what is done and an
            estimate of all there is to do.

    Returns:
        The plan; ``save`` it, and give it to ``enable_sparse_attention``.

    Raises:
        ValueError: Something asked for does not exist, is out of range or cannot be reached; the error says which.
        TypeError: A candidate has no such field.
        RuntimeError: A candidate cannot run on this model.
    """
    limits = (budget, target_speedup, max_error)
    limited = any(limit is not None for limit in limits)
    check_preset(preset, limits, candidates=candidates, cost=cost, folder=folder)
    asked = budget
    if not limited:
        budget = BUDGET
    target = Target(budget, target_speedup, max_error, end_to_end)
    methods = sparse_vdit_candidates() if preset == "sparse-vdit" else make_candidates(candidates)
    texts = _check_prompts(prompts)
    check_seed(seed, len(texts))
    transformers = require_transformers(pipeline)
    if sampling is None:
        sampling = default_sampling(pipeline, preset, limited=limited)
    task = Task(pipeline, sampling, dict(arguments or {}), kernel, precision, progress)
    folder = None if folder is None else Path(folder)
    only: dict[str, AttentionMethod] = {}
    if preset == "paro":
        only = dict(task.calibrate_paro(texts[0], seed, PARO_DENSITY if asked is None else asked))
        methods = [methods[0], *dict.fromkeys(only.values())]
    own_rule = preset == "paro" or (preset is not None and not limited)
    shape = task.survey(texts[0], seed)
    model = task.cost(methods, shape, cost, folder)
    left_out = frozenset() if own_rule else task.slower_than_dense(model)
    changes = sensitivity and not own_rule
    runs = task.capture(methods, texts, seed=seed, left_out=left_out, changes=changes, folder=folder)
    progress("solve", 0, 1)
    others = {title: each for title, each in transformers.items() if title not in runs[0].shapes}
    unscored = {title: _shape_of(each, shape) for title, each in others.items()}
    cells = collect(runs, sampling, unscored, quantile=quantile)
    models = {each.title: model.scaled_to(each.shape) for each in cells}
    problem = Problem(cells, models)
    if only:
        chosen = {title: methods.index(method) for title, method in only.items()}
        choices = {each.title: _wherever_scored(each, chosen.get(each.title, 0)) for each in cells}
    elif own_rule:
        choices = {each.title: choose_modes(each.head_mse, each.density) for each in cells}
    else:
        choices = problem.solve(target, share=_attention_share(runs))
    expected = problem.expected(choices)
    progress("solve", 1, 1)
    unit = "seconds" if budget is None else "density"
    num_steps = runs[0].num_steps or 1
    return Plan(
        candidates=tuple(methods),
        buckets=sampling.edges(num_steps),
        transformers={
            each.title: _transformer_plan(each, transformers[each.title], choices, models[each.title]) for each in cells
        },
        tokens=cells[0].shape.tokens,
        steps=num_steps,
        scheduler=type(pipeline.scheduler).__name__,
        guidance=task.arguments.get("guidance_scale"),
        prompts=texts,
        schedule=sampling.schedule,
        density=expected.density,
        speedup=expected.speedup,
        error=expected.error,
        curve=problem.curve(unit),
        curve_unit=unit,
        cost_model=models[cells[0].title].record(),
        precision=precision,
    )


def default_sampling(pipeline: Any, preset: str | None = None, *, limited: bool = True) -> Sampling:
    """Return the steps that a search keeps dense, tells apart and looks at where the user says nothing.

    Args:
        pipeline: A diffusers pipeline.
        preset: The paper whose procedure is followed; default: none.
        limited: Whether a limit is given, instead of a rule that a preset has of its own.

    Raises:
        ValueError: Its model is of no family that is known.
    """
    sampling = Sampling(replace(choose(pipeline).schedule, dense_layers=()))
    # the table of that paper has no axis of steps
    return replace(sampling, buckets=1, per_bucket=3) if preset == "sparse-vdit" and not limited else sampling


def check_preset(
    preset: str | None,
    limits: Sequence[float | None],
    *,
    candidates: Any = None,
    cost: Any = None,
    folder: Any = None,
) -> None:
    """Check that what is asked of a search goes with the procedure of a paper, which leaves less open.

    Args:
        preset: Its name; ``None`` for no paper's.
        limits: Budget, in (0, 1], speed-up, above 0, and error, at least 0, with ``None`` for those not given.
        candidates: Candidates; ``None`` if none are given, like the others.
        cost: A cost model.
        folder: Where scores are kept.

    Raises:
        ValueError: There is no such preset, or it has no use for something.
    """
    if preset is None:
        return
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; presets are: {', '.join(PRESETS)}")
    if candidates is not None:
        raise ValueError(f"preset {preset!r} has candidates of its own; give one of the two")
    if preset != "paro":
        return
    if any(limit is not None for limit in limits[1:]):
        raise ValueError("preset 'paro' calibrates for a density: give a budget rather than a speed-up or an error")
    if cost is not None:
        raise ValueError("preset 'paro' calibrates masks that no cost model has times of; leave the cost model out")
    if folder is not None:
        raise ValueError("preset 'paro' keeps no scores, because its masks are calibrated anew; leave the folder out")


def check_seed(seed: int, count: int) -> None:
    """Check that torch takes a seed, and as many that follow it as are needed.

    Args:
        seed: The first seed.
        count: How many there are with it, at least 1.

    Raises:
        ValueError: It does not.
    """
    last = seed + count - 1
    if not -(2**63) <= seed <= last < 2**64:
        through = "" if count == 1 else f" to {last}, one for each video"
        raise ValueError(f"seeds are in [-2**63, 2**64), got {seed}{through}; give another seed")


def _check_prompts(prompts: Sequence[str] | None) -> tuple[str, ...]:
    texts = CALIBRATION_PROMPTS[:PROMPTS] if prompts is None else tuple(prompts)
    if isinstance(prompts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"prompts must be at least one text that is not empty, got {prompts!r}")
    return texts


def _attention_share(runs: Sequence[Scores]) -> float | None:
    seconds = sum(run.seconds for run in runs)
    share = sum(run.attention_seconds for run in runs) / seconds if seconds > 0 else 0.0
    return share if 0 < share <= 1 else None


def _shape_of(transformer: Module, other: Shape) -> Shape:
    """Return the sizes of a transformer's calls from those of the pipeline's other one, which sees the same tokens."""
    config: Any = transformer.config
    layers = len(find_family(transformer).self_attentions(transformer))
    return replace(other, layers=layers, heads=config.num_attention_heads, head_dim=config.attention_head_dim)


def _wherever_scored(cells: Cells, candidate: int) -> NDArray[np.int64]:
    return np.where(np.isnan(cells.density[..., candidate]), 0, candidate)


def _transformer_plan(cells: Cells, transformer: Module, choices: Choices, model: CostModel) -> TransformerPlan:
    chosen = choices[cells.title]
    config: Any = transformer.config

    def pick(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, chosen[..., None], -1)[..., 0]

    recall = pick(cells.recall).clip(0, 1).astype(object)
    recall[np.isnan(pick(cells.recall))] = None
    return TransformerPlan(
        model_class=type(transformer).__name__,
        config_hash=config_hash(dict(config)),
        head_dim=cells.shape.head_dim,
        choices=chosen.tolist(),
        errors=pick(cells.error).tolist(),
        densities=pick(cells.density).tolist(),
        seconds=pick(cells.seconds(model)).tolist(),
        error_means=pick(cells.error_mean).tolist(),
        error_stds=pick(cells.error_std).tolist(),
        recalls=recall.tolist(),
        frame_mass=cells.mass.clip(0, 1).tolist() if cells.mass.any() else (),
    )
