"""Tracking of the denoising step and guidance pass of forward calls."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from .targets import find_transformers

MAX_PASSES = 4
"""Passes of one name at one timestep that a loop without a pipeline may make; one more is taken for a new video."""

MAX_PARTS = 64
"""The same in one step of a pipeline, whose videos are told apart by their lists of timesteps."""


@dataclass(frozen=True)
class PassContext:
    """The information about a forward call that a pipeline passes to ``cache_context``.

    Args:
        name: The guidance pass.
        step: Index of the denoising step, if said.
        num_steps: Steps of the run, if said.
    """

    name: str
    step: int | None = None
    num_steps: int | None = None


@dataclass(frozen=True)
class Position:
    """The position of one forward call in a denoising run.

    Args:
        step: Index of the denoising step, from 0.
        num_steps: Steps of the run; ``None`` if unknown.
        branch: The guidance pass.
        turn: Passes of the branch before this one in the same step: pipelines may go through a batch in parts.
        video: Number of the video within the run's caller; method memory lives for one of them.
    """

    step: int
    num_steps: int | None
    branch: str
    turn: int
    video: int


class Run:
    """The consecutive denoising runs of one caller: a pipeline, or a thread with a custom loop.

    The step comes from ``cache_context`` where the pipeline gives it, else from the scheduler of the pipeline, else
    from changes of the timestep. A new video is noticed by a new list of timesteps, a step that goes back, or a
    timestep that turns round.
    """

    def __init__(self) -> None:
        self._timesteps: Any = None
        self._timestep: Any = None
        self._index: int | None = None
        self._follows: bool | None = None
        self._direction = 0
        self._seen: Counter[str] = Counter()
        self._step = -1
        self._video = 0

    def begin(
        self, timestep: Any, said: PassContext | None = None, scheduler: Any = None, num_steps: int | None = None
    ) -> Position:
        """Return the position of the forward call that starts now.

        Args:
            timestep: The transformer's timestep argument: a number, or a tensor with one value per sample, frame or
                token.
            said: What the pipeline says through ``cache_context``, if anything.
            scheduler: The scheduler that owns the timestep, with its list ``timesteps``; ``None`` if unknown.
            num_steps: Steps that the pipeline makes, where it may leave out the first timesteps of the scheduler.
        """
        timesteps = None if scheduler is None else scheduler.timesteps
        if timesteps is not self._timesteps:
            self._timesteps = timesteps
            self._start_video()
        before = (self._video, self._step)
        step = None if said is None else said.step
        if timesteps is not None:
            num_steps = len(timesteps) if num_steps is None else num_steps
            if step is None:
                step = self._scheduler_step(scheduler, timestep, max(0, len(timesteps) - num_steps))
        if scheduler is None and self._follows is not None and self._follows != (step is None):
            self._start_video()
        self._follows = step is None
        if step is None:
            self._follow(timestep)
        else:
            if step < self._step:
                self._start_video()
            self._step = step
        if (self._video, self._step) == before:
            passes = self._seen.total() if said is None else self._seen[said.name]
            if passes >= (MAX_PASSES if scheduler is None else MAX_PARTS):
                self._video += 1
        if (self._video, self._step) != before:
            self._seen.clear()
        branch = _unnamed_branch(self._seen.total()) if said is None else said.name
        self._seen[branch] += 1
        if said is not None and said.num_steps is not None:
            num_steps = said.num_steps
        return Position(self._step, num_steps, branch, self._seen[branch] - 1, self._video)

    def _start_video(self) -> None:
        self._video += 1
        self._step = -1
        self._direction = 0
        self._follows = self._index = self._timestep = None

    def _scheduler_step(self, scheduler: Any, timestep: Any, skipped: int) -> int | None:
        """Return the current step of the scheduler; ``None`` if another scheduler is stepped."""
        if _is_part(timestep, scheduler.timesteps):
            return max(0, int(timestep.storage_offset() - scheduler.timesteps.storage_offset()) - skipped)
        if self._follows or not hasattr(scheduler, "step_index"):
            return None
        index = scheduler.step_index
        # check only an index that stays, because reading values synchronises with the device
        if self._step >= 0 and index == self._index and _value(timestep) != _value(self._timestep):
            return None  # copies of the scheduler are stepped, as for diffusion forcing
        self._index, self._timestep = index, timestep
        return 0 if index is None else max(0, int(index) - skipped)

    def _follow(self, timestep: Any) -> None:
        previous, value = _value(self._timestep), _value(timestep)
        self._timestep = value
        if self._step < 0 or value == previous:
            self._step = max(self._step, 0)
            return
        direction = 1 if (value or 0) > (previous or 0) else -1
        if self._timesteps is None and self._direction not in (0, direction):
            self._start_video()
            self._timestep, self._follows = value, True
        else:
            self._direction = direction
        self._step += 1


class RunTracker:
    """The runs of forward calls, for all transformers of a pipeline and any number of threads.

    The pipeline that runs a call is looked up on the stack, never inferred from the state of an earlier run. Without
    one, a timestep from the scheduler of the pipeline that sparse attention was enabled on belongs to that pipeline.
    All other calls belong to a custom loop of the calling thread.

    Args:
        pipeline: The pipeline that sparse attention is enabled on, kept by weak reference; ``None`` for a bare
            transformer.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._lock = threading.Lock()
        self._of_scheduler: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()
        self._thread = _Thread()

    def __deepcopy__(self, memo: dict[int, Any]) -> RunTracker:
        pipeline = None if self._pipeline is None else memo.get(id(self._pipeline()))
        memo[id(self)] = copied = RunTracker(pipeline)
        return copied

    @contextmanager
    def named(self, context: PassContext) -> Iterator[None]:
        """Store the context of a pipeline in its thread while its ``cache_context`` is active.

        Args:
            context: The context.
        """
        previous, self._thread.said = self._thread.said, context
        try:
            yield
        finally:
            self._thread.said = previous

    def begin(self, transformer: Module, timestep: Any) -> tuple[Run, Position]:
        """Return the run of the forward call that starts now, and its position in it.

        Args:
            transformer: The model that is called.
            timestep: Its timestep argument: a number, or a tensor with one value per sample, frame or token.
        """
        said, pipeline = self._thread.said, _pipeline_on_stack(transformer)
        if pipeline is None:
            mine = None if self._pipeline is None else self._pipeline()
            scheduler, count = getattr(mine, "scheduler", None), None
            if not _is_part(timestep, getattr(scheduler, "timesteps", None)):
                return self._thread.run, self._thread.run.begin(timestep, said)
        else:
            scheduler, count = pipeline.scheduler, getattr(pipeline, "_num_timesteps", None)
            count = count if isinstance(count, int) else None
        with self._lock:
            run = self._of_scheduler.setdefault(scheduler, Run())
        return run, run.begin(timestep, said, scheduler, count)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.said: PassContext | None = None
        self.run = Run()


def _pipeline_on_stack(transformer: Module) -> Any:
    """Return the innermost ``self`` on the stack with this transformer and a scheduler with timesteps."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            caller = frame.f_locals.get("self")
            scheduler = getattr(caller, "__dict__", {}).get("scheduler")  # runs no properties of other packages
            if getattr(scheduler, "timesteps", None) is not None and transformer in find_transformers(caller).values():
                return caller
        frame = frame.f_back
    return None


def _is_part(timestep: Any, timesteps: Any) -> bool:
    """Return whether a timestep is a view into a scheduler's list, which gives its index without synchronising."""
    if not isinstance(timestep, Tensor) or not isinstance(timesteps, Tensor) or timestep.is_meta:
        return False
    same = timestep.device == timesteps.device and timestep.dtype == timesteps.dtype and timesteps.ndim == 1
    return same and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()


def _value(timestep: Any) -> float | None:
    if isinstance(timestep, Tensor):
        # the mean, because some frames or tokens may stay at one timestep while others move
        return None if timestep.is_meta else float(timestep.detach().double().mean())
    return None if timestep is None else float(timestep)


def _unnamed_branch(index: int) -> str:
    return ("cond", "uncond")[index] if index < 2 else f"pass {index}"
