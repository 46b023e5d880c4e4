"""One timed run of a pipeline."""

from __future__ import annotations

import inspect
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import InputError
from .progress import Display


@dataclass(frozen=True)
class Clip:
    """A video and its times in seconds.

    Args:
        frames: ``(F, H, W, 3)`` in [0, 1].
        text_encoding: From the call to the first denoising step, noise included.
        steps: Each denoising step; empty if the pipeline does not tell when one ends.
        denoising: All steps together.
        decoding: From the last step to the frames.
        load: Load average of the machine over the last minute; ``None`` if unknown.
    """

    frames: np.ndarray
    text_encoding: float
    steps: tuple[float, ...]
    denoising: float
    decoding: float
    load: float | None = None

    @property
    def seconds(self) -> float:
        """Return the seconds from the call to the frames: no loading, no writing of files."""
        return self.text_encoding + self.denoising + self.decoding

    def seconds_of(self, steps: list[int]) -> float | None:
        """Return the seconds of some steps together, ``None`` if they are not known.

        Args:
            steps: Step indices, from 0.
        """
        if not steps or not self.steps or max(steps) >= len(self.steps):
            return None
        return sum(self.steps[i] for i in steps)


def warm_up(pipeline: Any, arguments: dict[str, Any]) -> None:
    """Run one denoising step and throw the result away, so that no first-call costs fall on what is timed next.

    Args:
        pipeline: The pipeline.
        arguments: Keywords of its call.
    """
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**{**arguments, "num_inference_steps": 1, "output_type": "latent"})


def run_timed(pipeline: Any, arguments: dict[str, Any], *, screen: Display, device: str, label: str = "") -> Clip:
    """Make one video and time its parts.

    Args:
        pipeline: The pipeline.
        arguments: Keywords of its call.
        screen: Shows the progress.
        device: Where the pipeline runs; its work is waited for at the end of each step.
        label: Name of the run in progress bars, if there are several.

    Raises:
        InputError: The frames contain NaN or Inf.
    """
    clock = _Clock(pipeline, screen, device, label)
    tells_steps = "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters
    callback = {"callback_on_step_end": clock.on_step} if tells_steps else {}
    pipeline.set_progress_bar_config(disable=True)
    pipeline.progress_bar = clock.on_bar
    try:
        clock.begin()
        output = pipeline(**arguments, output_type="np", **callback)
        clip = clock.end(np.asarray(output.frames[0]))
    finally:
        del pipeline.progress_bar
    if not np.isfinite(clip.frames).all():
        raise InputError("the frames contain NaN or Inf; try another --dtype, or check the weights")
    return clip


class _Clock:
    def __init__(self, pipeline: Any, screen: Display, device: str, label: str) -> None:
        self.pipeline, self.screen, self.device, self.label = pipeline, screen, device, label
        self.stock_bar = pipeline.progress_bar
        self.total: int | None = None
        self.first: float | None = None
        self.steps: list[float] = []

    def now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def show(self, name: str, total: int | None = None) -> None:
        self.bar = self.screen.start(f"{name} {self.label}".strip(), total)

    def begin(self) -> None:
        self.start = self.now()
        self.show("encoding")

    def on_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        if self.first is None:
            self.first = self.now()
            # schedulers that call the model twice a step have more time steps than the user asked for
            self.total = getattr(self.pipeline, "num_timesteps", None) or total
            self.bar.finish()
            self.show("denoising", self.total)
        return self.stock_bar(iterable, total)

    def on_step(self, _: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self.steps.append(self.now())
        self.bar.advance()
        if len(self.steps) == self.total:
            self.bar.finish()
            self.show("decoding")
        return values

    def end(self, frames: np.ndarray) -> Clip:
        end = self.now()
        self.bar.finish()
        first = self.start if self.first is None else self.first
        last = self.steps[-1] if self.steps else end
        times = tuple(b - a for a, b in zip([first, *self.steps], self.steps, strict=False))
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return Clip(frames, first - self.start, times, last - first, end - last, load)
