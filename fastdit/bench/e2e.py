"""End-to-end benchmark: measured speed-up of whole videos, and the one Amdahl's law predicts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median
from typing import Any

from ..api import SparseAttention, disable_sparse_attention, enable_sparse_attention
from ..schedule import Schedule
from .inputs.settings import Setting, settings_by_part
from .inputs.synthetic import Sample
from .jobs import Job, Outcome
from .measuring.measure import Times, peak_memory, reset_peak
from .report.result_store import Row

DENSE = "dense"

Enable = Callable[[Any], SparseAttention]
"""Makes the attention of a pipeline sparse, or counts what it does dense."""


@dataclass(frozen=True)
class Timing:
    """Times of a video in seconds, and densities of its attention.

    Args:
        seconds: All of it.
        attention_seconds: All calls of self-attention.
        steps: Each denoising step that was timed; empty if unknown.
        density: Mean of the sparse calls, in (0, 1]; ``None`` if there were none.
        overall_density: Mean of all calls, in (0, 1]; ``None`` if unknown.
    """

    seconds: float
    attention_seconds: float
    steps: tuple[float, ...] = ()
    density: float | None = None
    overall_density: float | None = None

    @classmethod
    def of(cls, handle: SparseAttention, seconds: float, steps: tuple[float, ...]) -> Timing:
        """Return the times of a video that was made from beginning to end.

        Args:
            handle: What counted its attention.
            seconds: All of it.
            steps: Each denoising step; empty if unknown.
        """
        return cls(seconds, handle.attention_seconds, steps, handle.density, handle.overall_density)


@dataclass(frozen=True)
class Subject:
    """A pipeline to time.

    Args:
        target: The pipeline whose attention is made sparse.
        run: Makes one video with the attention as it is now, or the steps that its times can be computed from.
        samples: Makes the calls that densities are matched on, of every layer or of one in the middle.
        device: Device to run on.
        about: Description of it in the rows.
    """

    target: Any
    run: Callable[[SparseAttention], Timing]
    samples: Callable[[bool], Sequence[Sample]]
    device: str
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
        about: Description of model and size in the rows.
        repeats: Rounds after the warm-up; at least 1.
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
    # dense runs again even where only others are missing: ratios are of one run
    ways: dict[str, Enable] = {DENSE: partial(enable_sparse_attention, method=DENSE, schedule=Schedule())}
    calibration = cache(subject.samples)
    for part in todo:
        chosen = parts[part]
        if chosen is not None:
            method = chosen[0].at(chosen[1], calibration)
            if isinstance(method, str):
                outcome.absent[part] = method
            else:
                ways[part] = partial(chosen[0].enable, method=method, density=chosen[1])
    if ways.keys().isdisjoint(todo):
        return outcome
    cold: dict[str, float] = {}
    runs: dict[str, list[Timing]] = {part: [] for part in ways}
    peaks: dict[str, list[int]] = {part: [] for part in ways}
    handles: dict[str, SparseAttention] = {}
    for number in range(1 + repeats):  # interleaved, so that other load affects all alike
        for part, enable in ways.items():
            timing, peak, handles[part] = _run(subject, enable)
            if number:
                runs[part].append(timing)
            else:  # the first round includes one-time compilation
                cold[part] = timing.seconds
            peaks[part] += [] if peak is None else [peak]
            advance()
    dense = _row(runs[DENSE])
    for part, made in runs.items():
        row = _row(made)
        gain = dense["attention_seconds"] / row["attention_seconds"] if row["attention_seconds"] else None
        share = dense["attention_seconds"] / dense["seconds"]
        row |= {
            "cold_seconds": cold[part],
            "peak_bytes": max(peaks[part], default=None),
            "dense_seconds": dense["seconds"],
            "speedup": dense["seconds"] / row["seconds"],
            "attention_share": share,
            "attention_speedup": gain,
            "predicted_speedup": amdahl(share, gain) if gain else None,
            **_named(parts[part], handles[part]),
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


def _named(chosen: tuple[Setting, float | None] | None, handle: SparseAttention) -> Row:
    if chosen is None:
        return {}
    return {"setting": chosen[0].describe(handle.method, handle.schedule), "asked": chosen[1]}


def _run(subject: Subject, enable: Enable) -> tuple[Timing, int | None, SparseAttention]:
    handle = enable(subject.target)
    reset_peak(subject.device)
    try:
        timing = subject.run(handle)
    finally:
        disable_sparse_attention(subject.target)
    return timing, peak_memory(subject.device), handle


def _row(made: Sequence[Timing]) -> Row:
    times = Times(tuple(timing.seconds for timing in made))
    steps = [step for timing in made for step in timing.steps]
    last = made[-1]
    return {
        "density": 1.0 if last.density is None else last.density,
        "overall_density": last.overall_density,
        "seconds": times.seconds,
        "seconds_spread": times.spread,
        "step_seconds": median(steps) if steps else None,
        "attention_seconds": median(timing.attention_seconds for timing in made),
        "repeats": len(made),
    }
