"""Which denoising step and guidance pass a forward call belongs to, read from whoever knows it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_PASSES = 4
"""Guidance passes per step that an unnamed pipeline may make; one more is taken for a new video."""


@dataclass(frozen=True)
class PassContext:
    """Hold what a pipeline says about a forward call through ``cache_context``.

    Args:
        name: The guidance pass.
        step: Index of the denoising step, if said.
        num_steps: Steps of the run, if said.
    """

    name: str
    step: int | None = None
    num_steps: int | None = None


class RunTracker:
    """Follow the denoising run of a pipeline, over all its transformers.

    The step comes from ``cache_context`` where the pipeline gives it, else from the pipeline's scheduler, else from
    changes of the timestep. A new video is noticed by a new list of timesteps, a step that goes back, or a timestep
    that turns round.

    Args:
        pipeline: The pipeline, kept by weak reference; ``None`` for a bare transformer.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._context: PassContext | None = None
        self._timesteps: Any = None
        self._follows: bool | None = None
        self._timestep: float | None = None
        self._direction = 0
        self._passes = 0
        self._place = (0, -1)
        self._seen: Counter[str] = Counter()
        self.step = -1
        self.num_steps: int | None = None
        self.branch = "cond"
        self.turn = 0
        """How many passes of the branch there were before in this step: pipelines may go through a batch in parts."""
        self.run = 0
        """Number of the video; method memory lives for one of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> RunTracker:
        pipeline = None if self._pipeline is None else memo.get(id(self._pipeline()))
        memo[id(self)] = copied = RunTracker(pipeline)
        return copied

    @contextmanager
    def named(self, context: PassContext) -> Iterator[None]:
        """Hold what the pipeline says for as long as its ``cache_context`` lasts.

        Args:
            context: What it says.
        """
        previous, self._context = self._context, context
        try:
            yield
        finally:
            self._context = previous

    def begin(self, timestep: Any) -> None:
        """Find out step, branch, turn and run of the forward call that starts now.

        Args:
            timestep: The transformer's timestep argument: a number, or a tensor with one value per sample or token.
        """
        pipeline = self._running_pipeline()
        timesteps = None if pipeline is None else getattr(pipeline.scheduler, "timesteps", None)
        if pipeline is not None and timesteps is not self._timesteps:
            self._timesteps = timesteps
            self._start_run()
        said = self._context
        step = None if said is None else said.step
        if step is None and pipeline is not None:
            step = _scheduler_step(pipeline, timesteps, timestep)
        if self._follows is not None and self._follows != (step is None):
            self._start_run()
        self._follows = step is None
        if step is None:
            self._follow(timestep)
        else:
            too_many = step == self.step and said is None and self._passes + 1 == MAX_PASSES
            if step < self.step or too_many:
                self._start_run()
            self._passes = self._passes + 1 if step == self.step else 0
            self.step = step
        if said is not None and said.num_steps is not None:
            self.num_steps = said.num_steps
        else:
            self.num_steps = None if pipeline is None else _num_steps(pipeline, timesteps)
        self.branch = _unnamed_branch(self._passes) if said is None else said.name
        if self._place != (self.run, self.step):
            self._place = (self.run, self.step)
            self._seen.clear()
        self.turn = self._seen[self.branch]
        self._seen[self.branch] += 1

    def _running_pipeline(self) -> Any:
        pipeline = None if self._pipeline is None else self._pipeline()
        if pipeline is None or getattr(pipeline, "scheduler", None) is None:
            return None
        # An idle pipeline knows nothing: its transformer is being called by another one, or by hand. Before its first
        # video a pipeline that has the property lacks what it reads.
        idle = None if hasattr(type(pipeline), "current_timestep") else True
        return None if getattr(pipeline, "_current_timestep", idle) is None else pipeline

    def _start_run(self) -> None:
        self.run += 1
        self.step = -1
        self._passes = 0
        self._direction = 0

    def _follow(self, timestep: Any) -> None:
        value = _value(timestep)
        previous, self._timestep = self._timestep, value
        if self.step < 0:
            self.step = 0
            return
        if value == previous:
            self._passes += 1
            if self._passes == MAX_PASSES and self._context is None:
                self._start_run()
                self.step = 0
            return
        direction = 1 if (value or 0) > (previous or 0) else -1
        if self._direction not in (0, direction):
            self._start_run()
            self.step = 0
            return
        self._direction = direction
        self._passes = 0
        self.step += 1


def _scheduler_step(pipeline: Any, timesteps: Any, timestep: Any) -> int | None:
    # image- and video-to-video pipelines skip the first timesteps of the scheduler
    skipped = 0
    if isinstance(timesteps, Tensor):
        skipped = max(0, len(timesteps) - (getattr(pipeline, "_num_timesteps", None) or len(timesteps)))
    if hasattr(pipeline.scheduler, "step_index"):
        index = pipeline.scheduler.step_index
        return 0 if index is None else max(0, int(index) - skipped)
    if isinstance(timesteps, Tensor) and isinstance(timestep, Tensor) and _same_storage(timesteps, timestep):
        return max(0, int(timestep.storage_offset() - timesteps.storage_offset()) - skipped)
    return None


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _num_steps(pipeline: Any, timesteps: Any) -> int | None:
    count = getattr(pipeline, "_num_timesteps", None)
    if isinstance(count, int):
        return count
    return None if timesteps is None else len(timesteps)


def _value(timestep: Any) -> float | None:
    if isinstance(timestep, Tensor):
        # the largest: image-to-video models give the tokens of the first frame timestep 0
        return float(timestep.detach().max()) if timestep.device != torch.device("meta") else None
    return None if timestep is None else float(timestep)


def _unnamed_branch(index: int) -> str:
    return ("cond", "uncond")[index] if index < 2 else f"pass {index}"
