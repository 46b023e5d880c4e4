"""Statistics of a layer: calls, densities, times, and the reasons for dense calls."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

MAX_PENDING = 256

Result = TypeVar("Result")


class Stopwatch:
    """The total time of calls, measured on CUDA by events that synchronise only when the total is read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._pending: list[tuple[Any, Any]] = []

    def time(self, device: torch.device, run: Callable[[], Result]) -> Result:
        """Run a function and add its time.

        Args:
            device: Where it computes.
            run: The function.

        Returns:
            What the function returns.
        """
        if device.type != "cuda":
            start = time.perf_counter()
            result = run()
            with self._lock:
                self._seconds += time.perf_counter() - start
            return result
        with torch.cuda.device(device):  # the current device may not be that of the call
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            return run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(device))
        result = run()
        end.record(torch.cuda.current_stream(device))
        with self._lock:
            self._pending.append((begin, end))
            if len(self._pending) > MAX_PENDING:
                self._collect([pair for pair in self._pending if pair[1].query()])
        return result

    @property
    def seconds(self) -> float:
        """Return the total in seconds, synchronising with pending calls."""
        with self._lock:
            for _, end in self._pending:
                end.synchronize()
            self._collect(list(self._pending))
            return self._seconds

    def _collect(self, finished: list[tuple[Any, Any]]) -> None:
        self._seconds += sum(begin.elapsed_time(end) for begin, end in finished) / 1e3
        done = {id(pair) for pair in finished}
        self._pending = [pair for pair in self._pending if id(pair) not in done]


class LayerStats:
    """The thread-safe statistics of one layer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sparse_calls = 0
        self.scheduled: Counter[str] = Counter()
        """Calls kept dense by the method or the schedule, by reason."""
        self.fallbacks: Counter[str] = Counter()
        """Calls that could not run sparse, by reason."""
        self.precision_fallbacks: Counter[str] = Counter()
        """Sparse calls that were requested in low precision but ran in the model's precision, by reason."""
        self.sparse_time = Stopwatch()
        self.dense_time = Stopwatch()
        self.parts: defaultdict[str, Stopwatch] = defaultdict(Stopwatch)
        """Shares of the sparse time: ``"choice"`` of blocks and ``"order"`` of tokens."""
        self._kept: Tensor | None = None
        self._measured = 0

    @property
    def dense_calls(self) -> int:
        """Count all dense calls."""
        return self.scheduled.total() + self.fallbacks.total()

    @property
    def calls(self) -> int:
        """Count all calls."""
        return self.sparse_calls + self.dense_calls

    @property
    def kept(self) -> float:
        """Sum the densities of the sparse calls that measured one."""
        return 0.0 if self._kept is None else float(self._kept)

    @property
    def measured(self) -> int:
        """Count the sparse calls that measured their density."""
        return self._measured

    def count_scheduled(self, reason: str) -> None:
        """Count a call kept dense by the method or the schedule.

        Args:
            reason: The reason.
        """
        with self._lock:
            self.scheduled[reason] += 1

    def count_fallback(self, reason: str) -> None:
        """Count a call that could not run sparse.

        Args:
            reason: The reason.
        """
        with self._lock:
            self.fallbacks[reason] += 1

    def count_sparse(self, kept: Tensor | None, excuses: Iterable[str] = ()) -> None:
        """Count a sparse call.

        Args:
            kept: Its density, 0-d tensor, or ``None`` if not measured.
            excuses: Why it did not run in low precision.
        """
        with self._lock:
            self.sparse_calls += 1
            self.precision_fallbacks.update(excuses)
            if kept is not None:
                kept = kept.detach().double()
                self._kept = kept if self._kept is None else self._kept + kept.to(self._kept.device)
                self._measured += 1
