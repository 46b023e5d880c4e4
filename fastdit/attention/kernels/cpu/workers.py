"""Worker threads that share the jobs of one call, so that a busy core delays only its own share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from threading import Barrier, Event, Lock, Thread
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_Step = TypeVar("_Step")


class Job(Protocol[_Step]):
    """Work in steps that threads may run concurrently and in any order."""

    def start(self) -> Iterator[_Step]:
        """Prepare the work and list its steps."""
        ...

    def step(self, step: _Step) -> None:
        """Do one of them.

        Args:
            step: The step.
        """
        ...

    def finish(self) -> None:
        """Put the results in place, once all steps are done."""
        ...


def usable_threads() -> int:
    """Return how many threads a call may use: as many as PyTorch would, and 1 under a mode that sees operations.

    Such modes, among them those that count operations, belong to the thread that entered them.
    """
    return 1 if is_in_torch_dispatch_mode() else torch.get_num_threads()


def run_jobs(jobs: Iterable[Job[Any]], threads: int) -> None:
    """Run all jobs; threads with nothing left of their own help with the jobs of others.

    The threads are made for this call, which takes about 0.1 ms each, so none outlives it to break a fork, an
    interrupt or the shutdown of the interpreter. In each, PyTorch runs on one thread, in the modes of the caller.

    Args:
        jobs: The jobs.
        threads: How many, at least 1; with 1 the caller's own thread runs them, with as many threads inside each
            operation as ever.

    Raises:
        BaseException: What a step raised, the first one if there are several; the others stop after their step.
    """
    shared = [_Shared(job) for job in jobs]
    if threads > 1:
        _run_in_threads(shared, threads)
        return
    for job in shared:
        for _ in job.steps():
            pass


class _Shared(Generic[_Step]):
    def __init__(self, job: Job[_Step]) -> None:
        self._job: Job[_Step] | None = job  # None once finished, so that its memory is freed early
        self._todo: Iterator[_Step] | None = None
        self._running = 0
        self._lock = Lock()

    def steps(self) -> Iterator[None]:
        """Run steps that no other thread has taken, yielding after each."""
        while True:
            with self._lock:
                job = self._job
                if job is None:
                    return
                if self._todo is None:
                    self._todo = job.start()
                try:
                    step = next(self._todo)
                except StopIteration:
                    if self._running == 0:
                        self._job = self._todo = None
                        job.finish()
                    return
                self._running += 1
            job.step(step)
            with self._lock:
                self._running -= 1
            yield


def _run_in_threads(jobs: Sequence[_Shared[Any]], threads: int) -> None:
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    autocast = torch.is_autocast_enabled("cpu")
    dtype, cached = torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    within = torch.get_num_threads()
    ready = Barrier(threads + 1)
    errors: list[BaseException] = []

    def work(jobs: Sequence[_Shared[Any]], ended: Event) -> None:
        # Without the first line, the thread's first parallel operation undoes the second.
        torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            ready.wait()
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(grad),
                torch.autocast("cpu", dtype, enabled=autocast, cache_enabled=cached),
            ):
                for job in jobs:
                    for _ in job.steps():
                        if errors:
                            return
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            errors.append(error)
        finally:
            ended.set()

    started: list[tuple[Thread, Event]] = []
    try:
        for i in range(threads):
            first = i * len(jobs) // threads
            ended = Event()
            thread = Thread(target=work, args=([*jobs[first:], *jobs[:first]], ended), name=f"fastdit-cpu-{i}")
            started.append((thread, ended))
            thread.start()
        ready.wait()
        # The count of 1 set in a worker also applies to new threads until it is set again.
        torch.set_num_threads(within)
        for _, ended in started:
            ended.wait()
    except BaseException as error:
        errors.append(error)
        ready.abort()
        raise
    finally:
        for thread, ended in started:
            if thread.ident is not None:
                ended.wait()  # an interrupted join makes the next join return at once
                thread.join()
        torch.set_num_threads(within)
    if errors:
        raise errors.pop(0)
