"""Plans for methods that need one, calibrated on a clip that no comparison shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdit
from fastdit.attention.paro_calibration import calibrate
from fastdit.tokens import AttentionCall

from .clips import make_clip
from .settings import Setting

FOLDER = Path("build/benches")
PROMPT, SEED = "a purple square moving right on a black background", 100
EDGES = (0.6, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorder(fastdit.AttentionMethod):
    """Attend to everything and keep the queries and keys of one step in each part of the run.

    Args:
        steps: The steps.
        samples: Queries and keys, ``(B, H, S, D)`` each, and their call.
    """

    name = "recorder"
    steps: tuple[int, ...]
    samples: list[tuple[Tensor, Tensor, AttentionCall]] = field(default_factory=list)

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: fastdit.MethodState) -> fastdit.Pattern:
        """Decide nothing.

        Args:
            q: ``(B, H, S, D)`` queries.
            k: ``(B, H, S, D)`` keys.
            call: The call.
            state: Not used.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: fastdit.MethodState) -> Tensor:
        """Attend to everything: ``(B, H, S, D)``.

        Args:
            q: ``(B, H, S, D)`` queries.
            k: ``(B, H, S, D)`` keys.
            v: ``(B, H, S, D)`` values.
            call: The call.
            state: Not used.
        """
        if call.step in self.steps and call.branch == "cond":
            self.samples.append((q.clone(), k.clone(), call))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=call.scale)


def calibrated(pipeline: Any, setting: Setting) -> dict[str, Any]:
    """Return the field that a setting lacks: the plan of ``paro``, from a file if it was made before.

    Args:
        pipeline: The demo.
        setting: The setting.
    """
    if setting.method != "paro":
        return {}
    path = FOLDER / f"paro-{setting.density}.safetensors"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        recorder = Recorder(steps=(4, 8))
        with fastdit.sparse_attention(pipeline, recorder, schedule=fastdit.Schedule()):
            make_clip(pipeline, PROMPT, SEED)
        calibrate(recorder.samples, density=setting.density, edges=EDGES).save(path)
    return {"plan": str(path)}
