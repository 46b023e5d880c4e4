"""Samples for calibrations that go through them several times: made anew each time, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from queue import Queue
from threading import Thread
from typing import Any

from torch import Tensor
from torch.nn import Module

from ..attention import AttentionMethod, MethodState, Pattern
from ..attention.dense import Dense
from ..pipelines.base import ModelFamily
from ..schedule import Schedule
from ..tokens import AttentionCall
from .capture import probing

_DENSE = Dense()

Sample = tuple[Tensor, Tensor, AttentionCall]


class LiveSamples:
    """Give queries and keys of a transformer's attention calls, each time from a new run of the pipeline.

    The pipeline runs in a thread of its own and waits while a sample is looked at, so that no more than one call's
    tensors are ever held.

    Args:
        pipeline: A diffusers pipeline.
        title: The transformer whose calls are wanted.
        schedule: Which calls are given: those that it does not call dense.
        generate: Runs the pipeline; the same video every time.
    """

    def __init__(self, pipeline: Any, title: str, schedule: Schedule, generate: Callable[[], Any]) -> None:
        self.pipeline = pipeline
        self.title = title
        self.schedule = schedule
        self.generate = generate

    def any(self) -> bool:
        """Say whether there are samples; where there are, the pipeline runs no further than to the first."""
        with closing(iter(self)) as samples:
            return next(samples, None) is not None

    def __iter__(self) -> Generator[Sample, None, None]:
        """Run the pipeline and yield ``(q, k, call)``, with ``(B, H, S, D)`` queries and keys."""
        window = _Window()
        thread = Thread(target=self._run, args=(window,), daemon=True)
        thread.start()
        outcome: Sample | BaseException | None = None
        try:
            while isinstance(outcome := window.given.get(), tuple):
                yield outcome
                window.wanted.put(True)
        finally:
            window.wanted.put(False)
            thread.join()
        if outcome is not None:
            raise outcome

    def _run(self, window: _Window) -> None:
        def method(title: str, family: ModelFamily, transformer: Module) -> AttentionMethod:
            return window if title == self.title else _DENSE

        try:
            with probing(self.pipeline, method, self.schedule):
                self.generate()
            window.given.put(None)
        except _Closed:
            return
        except BaseException as error:  # noqa: BLE001 - it is raised again where the samples are looked at
            window.given.put(error)


class _Closed(BaseException):
    """Nobody looks at samples any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Window(AttentionMethod):
    """Attend to everything, and wait while somebody looks at queries and keys."""

    given: Queue[Any] = field(default_factory=Queue)
    wanted: Queue[bool] = field(default_factory=Queue)

    name = "window"

    def pattern(self, q: Tensor, k: Tensor, call: AttentionCall, state: MethodState) -> Pattern:
        return _DENSE.pattern(q, k, call, state)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState) -> Tensor:
        self.given.put((q, k, call))
        if not self.wanted.get():
            raise _Closed
        return _DENSE.forward(q, k, v, call, state)
