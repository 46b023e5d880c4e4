"""Queries, keys and values of a pipeline's own attention calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from ...pipelines.observe import ObservedCall, observe
from ...tokens import AttentionCall
from .synthetic import Sample


def capture(pipeline: Any, make: Callable[[], object], steps: Collection[int], every_layer: bool) -> list[Sample]:
    """Keep calls of a pipeline while it makes a video with dense attention.

    Args:
        pipeline: The pipeline.
        make: Makes the video.
        steps: Indices of the steps to keep.
        every_layer: Whether all layers are kept, or only the middle one.

    Raises:
        RuntimeError: The pipeline made no such call.
    """
    samples: list[Sample] = []

    def keep(seen: ObservedCall) -> None:
        call = seen.call
        if call.step in steps and call.branch != "uncond" and (every_layer or _is_middle(call)):
            q, k, v = (x[:1].clone() for x in (seen.q, seen.k, seen.v))
            padding = None if call.key_padding is None else call.key_padding[:1].clone()
            name = f"layer {call.layer}, step {call.step}"
            samples.append(Sample(name, q, k, v, replace(call, key_padding=padding)))

    with observe(pipeline, keep):
        make()
    if not samples:
        raise RuntimeError(f"the pipeline made no self-attention call at steps {sorted(steps)}")
    return samples


def some_layers(samples: Sequence[Sample], every_layer: bool) -> Sequence[Sample]:
    """Return the calls of all layers, or of the one in the middle.

    Args:
        samples: Calls, at least those.
        every_layer: Whether all are wanted.
    """
    return [sample for sample in samples if every_layer or _is_middle(sample.call)]


def _is_middle(call: AttentionCall) -> bool:
    return call.layer == call.num_layers // 2
