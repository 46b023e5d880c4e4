"""Queries, keys and values of a pipeline's own attention calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from torch.nn import Module

from ...pipelines import find_family
from ...pipelines.observe import ObservedCall, observe
from .synthetic import Sample


def capture(
    pipeline: Any, make: Callable[[], object], steps: Collection[int], layers: Collection[int] | None = None
) -> list[Sample]:
    """Keep calls of a pipeline, while it makes a video with dense attention.

    Args:
        pipeline: The pipeline.
        make: Makes the video.
        steps: Indices of the steps to keep.
        layers: Indices of the layers to keep; ``None`` for all.

    Raises:
        RuntimeError: There was no such call.
    """
    samples: list[Sample] = []

    def keep(seen: ObservedCall) -> None:
        call = seen.call
        if call.step in steps and (layers is None or call.layer in layers) and call.branch != "uncond":
            q, k, v = (x[:1].clone() for x in (seen.q, seen.k, seen.v))
            padding = None if call.key_padding is None else call.key_padding[:1].clone()
            name = f"layer {call.layer}, step {call.step}"
            samples.append(Sample(name, q, k, v, replace(call, key_padding=padding)))

    with observe(pipeline, keep):
        make()
    if not samples:
        raise RuntimeError(f"no attention call at steps {sorted(steps)} and layers {layers and sorted(layers)}")
    return samples


def some_layers(samples: Sequence[Sample], every_layer: bool) -> Sequence[Sample]:
    """Return the calls of all layers, or of the one in the middle.

    Args:
        samples: Calls, at least those.
        every_layer: Whether all are wanted.
    """
    return [s for s in samples if every_layer or s.call.layer == s.call.num_layers // 2]


def middle_layer(transformer: Module) -> int:
    """Return the index of the self-attention layer in the middle.

    Args:
        transformer: The model.
    """
    return len(find_family(transformer).self_attentions(transformer)) // 2
