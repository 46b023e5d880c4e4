"""Transformers of real models with random weights, for timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..api import SparseAttention
from ..generation.loading import outline
from ..generation.sources import DEMO, find_model
from ..schedule import Schedule
from .e2e import Subject, Timing
from .inputs.capture import capture
from .inputs.problems import Problem
from .inputs.synthetic import Sample

_WAN = {
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "freq_dim": 256,
    "patch_size": (1, 2, 2),
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}


@dataclass(frozen=True)
class RandomModel:
    """The configuration of a transformer and the inputs of its forward.

    Args:
        class_name: Of diffusers.
        config: Of the released checkpoint, where it differs from the defaults of the class.
        latent: From channels and the grid of tokens to the shape of the latent, batch 1.
        text: ``(tokens, channels)`` of the text, where the sequence of self-attention has none of it.
        extra: Makes the other arguments of a forward from text tokens and grid.
    """

    class_name: str
    config: dict[str, Any]
    latent: Callable[[int, tuple[int, int, int]], tuple[int, ...]]
    text: tuple[int, int]
    extra: Callable[[int, tuple[int, int, int]], dict[str, Any]] = field(default=lambda text, grid: {})

    def make(self, device: str, changes: dict[str, Any] | None = None) -> Module:
        """Make the transformer.

        Args:
            device: Where its weights are, ``"meta"`` for nowhere.
            changes: Fields of the configuration that differ.
        """
        import diffusers

        with torch.device(device):
            return getattr(diffusers, self.class_name)(**{**self.config, **(changes or {})})


def _patched(channels: int, grid: tuple[int, int, int]) -> tuple[int, ...]:
    return (1, channels, grid[0], 2 * grid[1], 2 * grid[2])


def _flat(channels: int, grid: tuple[int, int, int]) -> tuple[int, ...]:
    return (1, grid[0] * grid[1] * grid[2], channels)


def _frames_first(frames: int) -> Callable[[int, tuple[int, int, int]], tuple[int, ...]]:
    return lambda channels, grid: (1, frames * grid[0], channels, 2 * grid[1], 2 * grid[2])


def _masked(text: int, grid: tuple[int, int, int]) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.ones(1, text, dtype=torch.bool)}


def _sized(text: int, grid: tuple[int, int, int]) -> dict[str, Any]:
    return {**_masked(text, grid), **dict(zip(("num_frames", "height", "width"), grid, strict=True))}


def _pooled(text: int, grid: tuple[int, int, int]) -> dict[str, Any]:
    return {**_masked(text, grid), "pooled_projections": torch.zeros(1, 768), "guidance": torch.full((1,), 6000.0)}


def _rotary(text: int, grid: tuple[int, int, int]) -> dict[str, Any]:
    angles = torch.zeros(grid[0] * grid[1] * grid[2], 64)
    return {"image_rotary_emb": (angles.cos(), angles.sin())}


def _wan(layers: int, heads: int, ffn_dim: int, **more: Any) -> RandomModel:
    config = {**_WAN, "num_layers": layers, "num_attention_heads": heads, "ffn_dim": ffn_dim, **more}
    return RandomModel("WanTransformer3DModel", config, _patched, (512, 4096))


def _cog(layers: int, heads: int, frames: int, **more: Any) -> RandomModel:
    config = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64, **more}
    model = RandomModel("CogVideoXTransformer3DModel", config, _frames_first(frames), (226, 4096))
    return replace(model, extra=_rotary) if "use_rotary_positional_embeddings" in more else model


_COG5 = {"use_rotary_positional_embeddings": True}
_COG15 = {**_COG5, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}
_LTX_13B = {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}

MODELS: dict[str, RandomModel] = {
    "wan-1.3b": _wan(30, 12, 8960),
    "wan-14b": _wan(40, 40, 13824),
    "wan-2.2-5b": _wan(30, 24, 14336, in_channels=48, out_channels=48),
    "hunyuan": RandomModel("HunyuanVideoTransformer3DModel", {"guidance_embeds": True}, _patched, (256, 4096), _pooled),
    "cogvideox-2b": _cog(30, 30, 1),
    "cogvideox-5b": _cog(42, 48, 1, **_COG5),
    "cogvideox-1.5-5b": _cog(42, 48, 2, **_COG15),
    "mochi": RandomModel("MochiTransformer3DModel", {}, _patched, (256, 4096), _masked),
    "ltx-2b": RandomModel("LTXVideoTransformer3DModel", {}, _flat, (128, 4096), _sized),
    "ltx-13b": RandomModel("LTXVideoTransformer3DModel", _LTX_13B, _flat, (128, 4096), _sized),
}


def model_of(problem: Problem) -> RandomModel | None:
    """Return the model of a problem, ``None`` if it is of none: the longest name that it begins with.

    Args:
        problem: The problem.
    """
    names = [name for name in MODELS if problem.name == name or problem.name.startswith(name + "-")]
    return MODELS[max(names, key=len)] if names else None


def problem_outline(problem: Problem) -> SimpleNamespace:
    """Return an outline of the model that a problem is of; that of the demo, if it is of none.

    Args:
        problem: The problem.
    """
    model = model_of(problem)
    if model is None:
        return outline(find_model(DEMO))
    return SimpleNamespace(transformer=model.make("meta", {"num_layers": 1}))


@dataclass(eq=False)
class RandomScheduler:
    """A minimal scheduler.

    Args:
        timesteps: ``(steps,)``, falling.
        step_index: The step at which it is.
    """

    timesteps: Tensor
    step_index: int = 0


@dataclass(frozen=True, eq=False)
class RandomPipeline:
    """A minimal pipeline that tracks its step, because schedules are fractions of all steps.

    Args:
        transformer: The model.
        scheduler: What its steps are.
    """

    transformer: Module
    scheduler: RandomScheduler

    def at_step(self, step: int) -> Tensor:
        """Go to a step and return its timestep, ``(1,)``.

        Args:
            step: Index of the step, from 0.
        """
        self.scheduler.step_index = step
        return self.scheduler.timesteps[step : step + 1]

    def denoise(self, step: int, arguments: dict[str, Any], dtype: torch.dtype) -> None:
        """Call the transformer as a pipeline does in a step.

        Args:
            step: Index of the step.
            arguments: The arguments of its forward, by name.
            dtype: Dtype of the timestep.
        """
        self.transformer(**arguments, timestep=self.at_step(step).to(dtype))


def random_subject(
    problem: Problem, *, dtype: torch.dtype, device: str, seed: int = 0, changes: dict[str, Any] | None = None
) -> Subject:
    """Make a transformer of a real configuration with random weights, to be timed.

    Not every step of a video is run, but one of each kind: dense, the first sparse one with its first-call
    costs, with masks built anew, with masks that are reused.

    Args:
        problem: The problem.
        dtype: Dtype of the weights.
        device: Their device.
        seed: Random seed.
        changes: Fields of the configuration that differ, for fewer layers.

    Raises:
        ValueError: The problem is of no model that is known.
    """
    model = model_of(problem)
    if model is None:
        raise ValueError(f"there is no configuration for {problem.name!r}; there are: {', '.join(MODELS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = model.make(device, changes)
        Module.to(transformer, dtype).eval()  # skips diffusers' warning, which concerns trained weights
        arguments = _arguments(model, transformer, problem, dtype, device)

    timesteps = torch.linspace(1000, 0, problem.steps + 1)[:-1].to(device)
    pipeline = RandomPipeline(transformer, RandomScheduler(timesteps))

    @torch.no_grad()
    def run_step(step: int) -> float:
        begin = time.perf_counter()
        for _ in range(problem.passes):
            pipeline.denoise(step, arguments, dtype)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    def samples(every_layer: bool) -> list[Sample]:
        middle = problem.steps // 2
        return capture(pipeline, lambda: run_step(middle), (middle,), every_layer)

    def run(handle: SparseAttention) -> Timing:
        return _video(handle, problem.steps, run_step)

    return Subject(pipeline, run, samples, device, {"weights": "random"})


def step_kinds(schedule: Schedule, num_steps: int) -> list[str]:
    """Say for each step what kind it is: ``"dense"``, ``"first"``, ``"rebuilt"`` or ``"reused"``.

    Args:
        schedule: Which steps are dense, and when masks are rebuilt.
        num_steps: Steps of a video, at least 1.
    """
    of_steps = replace(schedule, dense_layers=())

    def kinds() -> Iterator[str]:
        begun = False
        for step in range(num_steps):
            if of_steps.dense_reason(0, 1, step, num_steps) is not None:
                yield "dense"
                continue
            again = "rebuilt" if schedule.refreshes(step, num_steps) else "reused"
            yield again if begun else "first"
            begun = True

    return list(kinds())


def _video(handle: SparseAttention, num_steps: int, run_step: Callable[[int], float]) -> Timing:
    """Run the first step of each kind, and count it as often as a video has that kind."""
    kinds = step_kinds(handle.schedule, num_steps)
    seconds, steps = 0.0, []
    counted, before = torch.zeros(4, dtype=torch.float64), _counts(handle)
    for kind in dict.fromkeys(kinds):
        taken, count = run_step(kinds.index(kind)), kinds.count(kind)
        after = _counts(handle)
        counted += count * (after - before)
        before = after
        seconds += count * taken
        steps += [taken] * count
    attention, calls, sparse, kept = counted.tolist()
    return Timing(seconds, attention, tuple(steps), kept / sparse if sparse else None, (kept + calls - sparse) / calls)


def _counts(handle: SparseAttention) -> Tensor:
    """Return seconds of attention, calls, sparse ones, and the sum of the densities of these: ``(4,)`` fp64."""
    totals = handle.report()["totals"]
    kept = totals["sparse_calls"] * (handle.density or 0.0)
    return torch.tensor([handle.attention_seconds, totals["calls"], totals["sparse_calls"], kept], dtype=torch.float64)


def _arguments(
    model: RandomModel, transformer: Module, problem: Problem, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    config: Any = transformer.config
    grid = problem.tokens.grid.shape
    tokens, channels = model.text
    given = {
        "hidden_states": torch.randn(model.latent(config.in_channels, grid)),
        "encoder_hidden_states": torch.randn(1, tokens, channels),
        **model.extra(tokens, grid),
    }

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(placed(each) for each in value)
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return {name: placed(value) for name, value in given.items()}
