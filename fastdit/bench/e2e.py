"""How much faster whole videos are: measured, and as the share of attention predicts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median
from typing import Any

import torch

from ..api import SparseAttention, disable_sparse_attention, enable_sparse_attention
from ..schedule import Schedule
from .jobs import Job, Outcome
from .measure import Times
from .rows import Row
from .settings import Setting, settings_by_part
from .synthetic import Sample

DENSE = "dense"


@dataclass(frozen=True)
class Timing:
    """Hold the times of one run in seconds.

    Args:
        seconds: All of it.
        steps: Each denoising step; empty if nobody knows.
    """

    seconds: float
    steps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Subject:
    """Say what is timed.

    Args:
        target: The pipeline or transformer whose attention is made sparse.
        run: Makes one video, or runs as many forward passes as can be afforded.
        samples: Makes the calls that densities are matched on, of every layer or of one in the middle.
        device: Where it runs.
        video: Seconds of a whole video from the timing of a run.
        about: What rows say of it.
    """

    target: Any
    run: Callable[[], Timing]
    samples: Callable[[bool], Sequence[Sample]]
    device: str
    video: Callable[[Timing], float] = lambda timing: timing.seconds
    about: dict[str, Any] = field(default_factory=dict)


def e2e_jobs(
    name: str,
    subject: Callable[[], Subject],
    settings: Sequence[Setting],
    *,
    densities: Sequence[float],
    about: dict[str, Any],
    repeats: int = 3,
    seconds: float | None = None,
) -> list[Job]:
    """Make a job: dense and all settings in turn.

    Args:
        name: Of the model and size.
        subject: Loads what is timed, when it is first needed.
        settings: The settings.
        densities: Fractions of the pairs of sparse calls, each in (0, 1].
        about: What rows say of model and size.
        repeats: Rounds after the first, cold one; at least 1.
        seconds: Estimate of one dense run; ``None``: no estimate.
    """
    parts = {DENSE: None, **settings_by_part(settings, densities)}
    job = partial(_measure, cache(subject), parts, repeats)
    total = None if seconds is None else seconds * len(parts) * (1 + repeats)
    return [Job("e2e", name, tuple(parts), job, total, {"model": name, **about}, len(parts) * (1 + repeats))]


def _measure(
    shared: Callable[[], Subject],
    parts: dict[str, tuple[Setting, float | None] | None],
    repeats: int,
    todo: Collection[str],
    advance: Callable[[], None],
) -> Outcome:
    outcome, subject = Outcome(), shared()
    methods: dict[str, tuple[Any, Schedule | None]] = {DENSE: (DENSE, Schedule())}
    calibration = cache(subject.samples)
    for part in todo:
        chosen = parts[part]
        if chosen is not None:
            method = chosen[0].at(chosen[1], calibration)
            if isinstance(method, str):
                outcome.absent[part] = method
            else:
                methods[part] = (method, chosen[0].schedule)
    runs: dict[str, list[tuple[Timing, float, int | None, SparseAttention]]] = {part: [] for part in methods}
    for _ in range(1 + repeats):  # in turn, so that what else the machine does falls on all alike; the first is cold
        for part, (method, how) in methods.items():
            runs[part].append(_run(subject, method, how))
            advance()
    dense = _row(runs[DENSE], subject)
    for part, made in runs.items():
        row = _row(made, subject)
        attention = row["attention_seconds"]
        gain = dense["attention_seconds"] / attention if attention else None
        share = dense["attention_seconds"] / dense["run_seconds"]
        row |= {
            "dense_seconds": dense["seconds"],
            "speedup": dense["run_seconds"] / row["run_seconds"],
            "attention_share": share,
            "attention_speedup": gain,
            "predicted_speedup": amdahl(share, gain) if gain else None,
            **({} if parts[part] is None else _named(parts[part], methods[part][0])),
            **subject.about,
        }
        outcome.rows[part] = row
    return outcome


def amdahl(share: float, gain: float) -> float:
    """Return how many times as fast the whole is, if a part of it is.

    Args:
        share: Fraction of the time that the part takes, in [0, 1].
        gain: How many times as fast the part is, above 0.
    """
    return 1 / (1 - share + share / gain)


def _named(chosen: tuple[Setting, float | None] | None, method: Any) -> Row:
    assert chosen is not None
    return {"setting": chosen[0].describe(method), "asked": chosen[1]}


def _run(subject: Subject, method: Any, schedule: Schedule | None) -> tuple[Timing, float, int | None, SparseAttention]:
    cuda = subject.device.startswith("cuda")
    handle = enable_sparse_attention(subject.target, method, schedule=schedule)
    if cuda:
        torch.cuda.reset_peak_memory_stats(subject.device)
    try:
        timing = subject.run()
    finally:
        disable_sparse_attention(subject.target)
    peak = torch.cuda.max_memory_allocated(subject.device) if cuda else None
    return timing, handle.attention_seconds, peak, handle


def _row(made: Sequence[tuple[Timing, float, int | None, SparseAttention]], subject: Subject) -> Row:
    cold, warm = made[0], made[1:] or made
    times = Times(tuple(timing.seconds for timing, *_ in warm))
    steps = [step for timing, *_ in warm for step in timing.steps]
    handle, peaks = made[-1][3], [peak for _, _, peak, _ in made if peak is not None]
    video = median(subject.video(timing) for timing, *_ in warm)
    return {
        "density": handle.density if handle.density is not None else 1.0,
        "overall_density": handle.overall_density,
        "seconds": video,
        "seconds_spread": times.spread * video / times.seconds,
        "run_seconds": times.seconds,
        "step_seconds": median(steps) if steps else None,
        "cold_seconds": cold[0].seconds,
        "attention_seconds": median(attention for _, attention, *_ in warm),
        "peak_bytes": max(peaks) if peaks else None,
        "repeats": len(warm),
    }
