"""Timing: a warm-up, interleaved repeats, medians; and peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

FLUSHED = 256 << 20
"""Bytes written between runs on a GPU, more than any level-2 cache holds."""

SECONDS = 0.4
"""How long a short run is repeated at least, in all."""

FEWEST = 3
"""Repeats from which on there is a spread."""

MOST = 100
"""Repeats at most."""

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Times:
    """Times of one contender.

    Args:
        samples: Seconds of each repeat, in order.
    """

    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Return the median."""
        return median(self.samples)

    @property
    def spread(self) -> float | None:
        """Return the standard error of the median in seconds, from the middle half of three repeats or more."""
        if len(self.samples) < FEWEST:
            return None
        ordered = sorted(self.samples)
        low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.25, 0.75))
        # of normal noise, the middle half is 1.35 deviations wide, and a median errs 1.25 times as much as a mean
        return 1.2533 * (high - low) / 1.349 / math.sqrt(len(ordered))


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device | str,
    *,
    repeats: int = 5,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Time runs in turn, so that what else the machine does falls on all of them alike.

    Args:
        runs: What is timed, by name; each is run once before.
        device: Where it runs; a GPU's cache is flushed between runs.
        repeats: Rounds at least, 1 or more; short runs are repeated for 0.4 s, at most 100 times.
        advance: Called after each round.
    """
    device = torch.device(device)
    flush = torch.empty(FLUSHED, dtype=torch.int8, device=device) if device.type == "cuda" else None
    once = {name: _time(run, device, flush) for name, run in runs.items()}
    total = sum(once.values())
    rounds = max(repeats, min(MOST, math.ceil(SECONDS / max(total, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_time(run, device, flush))
        advance()
    return {name: Times(tuple(values)) for name, values in samples.items()}


def reset_peak(device: torch.device | str) -> None:
    """Reset the peak of memory.

    Args:
        device: Where memory is used: a GPU, or else this process, as far as the system can do so.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_memory(device: torch.device | str) -> int | None:
    """Return the bytes that were used at most since ``reset_peak``.

    Args:
        device: Where: a GPU, of which tensors count, or else this process, all of it; ``None`` where the system does
            not say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _CLEAR.exists():
        return None
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)


def extra_memory(run: Callable[[], Any], device: torch.device | str) -> int | None:
    """Measure the peak memory of a run above what is allocated before it, in bytes; ``None`` on a CPU.

    Args:
        run: The run.
        device: Device to run on.
    """
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _time(run: Callable[[], Any], device: torch.device, flush: torch.Tensor | None) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    assert flush is not None
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(torch.cuda.current_stream(device))
    run()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end) / 1000


@cache
def throughput(device: str) -> float:
    """Measure the floating point operations a second of dense attention, roughly and in a moment.

    Args:
        device: The device.
    """
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    q = torch.randn(1, 2, 2048, 64, device=device, dtype=dtype)
    run = partial(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    return 4 * 2 * 2048**2 * 64 / min(interleaved({"dense": run}, device)["dense"].samples)
