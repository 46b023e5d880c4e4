"""Queries, keys and values of a pipeline's own attention calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from ...api import sparse_attention
from ...attention import AttentionMethod, MethodState, Pattern
from ...pipelines import find_family
from ...schedule import Schedule
from ...tokens import AttentionCall
from .synthetic import Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorder(AttentionMethod):
    """Attend to everything, and keep what some of the calls were given.

    Args:
        steps: Indices of the steps.
        layers: Indices of the layers; ``None`` for all.
        samples: What was kept.
    """

    name = "recorder"
    steps: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    samples: list[Sample] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return {"steps": self.steps, "layers": self.layers}

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        """Decide nothing.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        if call.step in self.steps and (self.layers is None or call.layer in self.layers) and call.branch != "uncond":
            one = [x[:1].clone() for x in (q, k, v)]
            padding = None if call.key_padding is None else call.key_padding[:1].clone()
            name = f"layer {call.layer}, step {call.step}"
            self.samples.append(Sample(name, one[0], one[1], one[2], replace(call, key_padding=padding)))
        mask = None if call.key_padding is None else ~call.key_padding[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)


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
    recorder = Recorder(steps=tuple(steps), layers=None if layers is None else tuple(layers))
    with sparse_attention(pipeline, recorder, schedule=Schedule()):
        make()
    if not recorder.samples:
        raise RuntimeError(f"no attention call at steps {sorted(steps)} and layers {layers and sorted(layers)}")
    return recorder.samples


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
