"""Transformers of real models with random weights, which take as long as the real ones and show nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .capture import capture, middle_layer
from .e2e import Subject, Timing
from .problems import Problem

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
    """Say how a transformer is made and called.

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


def _cog(layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64, **more}


_COG5 = {"use_rotary_positional_embeddings": True}
_COG15 = {**_COG5, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}

MODELS: dict[str, RandomModel] = {
    "wan-1.3b": RandomModel(
        "WanTransformer3DModel",
        {**_WAN, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        _patched,
        (512, 4096),
    ),
    "wan-14b": RandomModel(
        "WanTransformer3DModel",
        {**_WAN, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
        _patched,
        (512, 4096),
    ),
    "wan-2.2-5b": RandomModel(
        "WanTransformer3DModel",
        {
            **_WAN,
            "num_layers": 30,
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        },
        _patched,
        (512, 4096),
    ),
    "hunyuan": RandomModel("HunyuanVideoTransformer3DModel", {"guidance_embeds": True}, _patched, (256, 4096), _pooled),
    "cogvideox-2b": RandomModel("CogVideoXTransformer3DModel", _cog(30, 30), _frames_first(1), (226, 4096)),
    "cogvideox-5b": RandomModel(
        "CogVideoXTransformer3DModel", _cog(42, 48, **_COG5), _frames_first(1), (226, 4096), _rotary
    ),
    "cogvideox-1.5-5b": RandomModel(
        "CogVideoXTransformer3DModel", _cog(42, 48, **_COG15), _frames_first(2), (226, 4096), _rotary
    ),
    "mochi": RandomModel("MochiTransformer3DModel", {}, _patched, (256, 4096), _masked),
    "ltx-2b": RandomModel("LTXVideoTransformer3DModel", {}, _flat, (128, 4096), _sized),
    "ltx-13b": RandomModel(
        "LTXVideoTransformer3DModel",
        {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
        _flat,
        (128, 4096),
        _sized,
    ),
}


def model_of(problem: Problem) -> RandomModel | None:
    """Return the model of a problem, ``None`` if it is of none: the longest name that it begins with.

    Args:
        problem: The problem.
    """
    found = [name for name in MODELS if problem.name == name or problem.name.startswith(name + "-")]
    return MODELS[max(found, key=len)] if found else None


def random_subject(
    problem: Problem,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    changes: dict[str, Any] | None = None,
    passes: int = 2,
) -> Subject:
    """Make a transformer of a real configuration with random weights, to be timed.

    Args:
        problem: The problem.
        dtype: Of the weights.
        device: Where they are.
        seed: Of weights and inputs.
        changes: Fields of the configuration that differ, for fewer layers.
        passes: Forward passes of one run, at least 1; the time of a video is computed from them.

    Raises:
        ValueError: The problem is of no model that is known.
    """
    import diffusers

    model = model_of(problem)
    if model is None:
        raise ValueError(f"there is no configuration for {problem.name!r}; there are: {', '.join(MODELS)}")
    torch.manual_seed(seed)
    with torch.device(device):
        transformer: Module = getattr(diffusers, model.class_name)(**{**model.config, **(changes or {})})
    Module.to(transformer, dtype).eval()  # the warning of diffusers is about weights that mean something
    arguments = _arguments(model, transformer, problem, dtype, device)

    @torch.no_grad()
    def forward() -> None:
        transformer(**arguments)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    def run() -> Timing:
        steps = []
        for _ in range(passes):
            begin = time.perf_counter()
            forward()
            steps.append(time.perf_counter() - begin)
        return Timing(sum(steps), tuple(steps))

    return Subject(
        transformer,
        run,
        lambda every_layer: capture(transformer, forward, (0,), None if every_layer else (middle_layer(transformer),)),
        device,
        lambda timing: timing.seconds / passes * problem.steps * problem.passes,
        {"weights": "random", "passes": passes},
    )


def _arguments(
    model: RandomModel, transformer: Module, problem: Problem, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    config: Any = transformer.config
    grid = problem.tokens.grid.shape
    tokens, channels = model.text
    given = {
        "hidden_states": torch.randn(model.latent(config.in_channels, grid)),
        "encoder_hidden_states": torch.randn(1, tokens, channels),
        "timestep": torch.full((1,), 500.0),
        **model.extra(tokens, grid),
    }

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(placed(each) for each in value)
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return {name: placed(value) for name, value in given.items()}
