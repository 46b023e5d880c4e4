"""Statistics of cells: one cell for each transformer, step bucket, layer and head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schedule import step_bucket
from .cost import CostModel
from .sampling import Sampling
from .scores import CallScores, Scores, Shape

Floats = NDArray[np.float64]

QUANTILE = 0.9
"""Default quantile of errors over samples, so that most prompts are covered and not only the average."""


@dataclass(frozen=True, eq=False)
class Cells:
    """The statistics of the cells of one transformer, for every candidate.

    Args:
        title: The transformer.
        shape: The sizes of its calls.
        error: ``(buckets, layers, heads, candidates)`` upper quantile over samples of a head's error after the output
            projection, relative to the layer's output; at least 0, NaN where a candidate cannot be used.
        error_mean: Their mean, likewise.
        error_std: Their standard deviation, likewise.
        head_mse: Mean over samples of the squared error of a head's output, relative to its own square, likewise.
        recall: Mean attention mass covered, likewise; NaN where unknown.
        density: Mean fraction of pairs computed, likewise, in [0, 1].
        mass: ``(layers, heads, frames)`` mean attention on the same frame, one frame apart, and so on; in [0, 1], all
            0 for layers that were not scored.
        weights: ``(layers,)`` how much a layer's error counts, about 1.
        calls: ``(buckets, layers)`` steps of a bucket at which the layer's choice counts; 0 where it is dense anyhow.
        refreshes: ``(buckets,)`` how many of them choose blocks anew.
        dense_calls: Steps times layers that the schedule keeps dense.
    """

    title: str
    shape: Shape
    error: Floats
    error_mean: Floats
    error_std: Floats
    head_mse: Floats
    recall: Floats
    density: Floats
    mass: Floats
    weights: Floats
    calls: NDArray[np.int64]
    refreshes: NDArray[np.int64]
    dense_calls: int

    def mean_density(self, model: CostModel) -> Floats:
        """Return the mean density of all calls in a bucket, those included from which a candidate only learns.

        Args:
            model: What says what candidates learn from.

        Returns:
            ``(buckets, layers, heads, candidates)``, in [0, 1].
        """
        first = np.array([t.first_density if t.first_density > t.density else np.nan for t in model.timings])
        learning = np.where(np.isnan(first), 0.0, first - self.density)
        return self.density + learning / self.calls.clip(min=1)[:, :, None, None]

    def seconds(self, model: CostModel) -> Floats:
        """Predict the mean time of a call for each head.

        Args:
            model: The cost model, for calls of this shape.

        Returns:
            ``(buckets, layers, heads, candidates)``, above 0.
        """
        out = np.empty_like(self.density)
        for bucket, refreshes in enumerate(self.refreshes):
            for layer, calls in enumerate(self.calls[bucket].clip(min=1)):
                times = {"calls": int(calls), "refreshes": int(min(refreshes, calls))}
                for index in range(out.shape[-1]):
                    out[bucket, layer, :, index] = model.seconds(index, self.density[bucket, layer, :, index], **times)
        return out


def collect(
    runs: Sequence[Scores],
    sampling: Sampling,
    unscored: Mapping[str, Shape] | None = None,
    *,
    quantile: float = QUANTILE,
) -> list[Cells]:
    """Average the scores of several videos over prompts, steps and guidance passes.

    A bucket in which a transformer ran and was not sampled takes the scores of the nearest one.

    Args:
        runs: The scores of each video, at least one.
        sampling: Which steps were sampled.
        unscored: The sizes of transformers that run in dense steps only, by name; they can only stay dense.
        quantile: Of the errors over samples, in [0, 1].

    Returns:
        The cells of each transformer that was scored, then those of the others.

    Raises:
        ValueError: The videos differ in sizes, or a transformer was never sampled.
    """
    sizes = [
        (run.num_steps, {title: (s.layers, s.heads, s.tokens.grid) for title, s in run.shapes.items()}) for run in runs
    ]
    if any(size != sizes[0] for size in sizes):
        raise ValueError(
            "the prompts gave videos of different sizes; a plan is searched for one size and number of steps"
        )
    check_covered(runs[0], sampling)
    shapes = {**runs[0].shapes, **(unscored or {})}
    return [_cells(title, shape, runs, sampling, quantile) for title, shape in shapes.items()]


def check_covered(run: Scores, sampling: Sampling) -> None:
    """Check that every transformer that the search decides about was sampled.

    Args:
        run: The scores of a video.
        sampling: Which steps were sampled.

    Raises:
        ValueError: One was not.
    """
    num_steps = run.num_steps or 0
    sparse = set(sampling.sparse_steps(num_steps))
    for title, steps in run.steps.items():
        open_steps = sorted(sparse.intersection(steps))
        if open_steps and title not in run.shapes:
            raise ValueError(
                f"the {title} ran at steps {open_steps[0]} to {open_steps[-1]}, and none of them was sampled, only "
                f"{sorted(sampling.sampled(num_steps))}; give steps= with some of each"
            )


def layer_weights(runs: Sequence[Scores]) -> dict[tuple[str, int], float]:
    """Return how much each layer's error counts: what it changes of the transformer's output, on average 1.

    Args:
        runs: The scores of each video.

    Returns:
        The weights, root mean squares over samples, by transformer and layer; empty if nothing was measured.
    """
    ratios: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for run in runs:
        for change in run.changes:
            if change.error > 0 and np.isfinite(change.change):
                ratios[change.title, change.layer].append(change.change / change.error)
    weights = {place: float(np.sqrt(np.mean(np.square(found)))) for place, found in ratios.items()}
    scale = float(np.sqrt(np.mean(np.square(list(weights.values()))))) if weights else 0.0
    return {place: weight / scale for place, weight in weights.items()} if scale > 0 else {}


def _cells(title: str, shape: Shape, runs: Sequence[Scores], sampling: Sampling, quantile: float) -> Cells:
    num_steps = runs[0].num_steps or 0
    edges, sparse = sampling.edges(num_steps), set(sampling.sparse_steps(num_steps))
    samples: defaultdict[tuple[int, int], list[CallScores]] = defaultdict(list)
    for run in runs:
        for call in run.calls:
            if call.title == title:
                samples[step_bucket(edges, call.step, num_steps), call.layer].append(call)
    found = {place: _statistics(calls, quantile) for place, calls in samples.items()}
    places = [(bucket, layer) for bucket in range(len(edges)) for layer in range(shape.layers)]
    candidates = runs[0].calls[0].error.shape[0]
    arrays = np.full((len(_NAMES), len(edges), shape.layers, shape.heads, candidates), np.nan)
    arrays[..., 0] = np.array([_DENSE[name] for name in _NAMES])[:, None, None, None]
    for bucket, layer in places:
        known = [b for b, where in found if where == layer]
        if known:  # else the schedule keeps the layer dense, and nothing but dense can be said anything about
            nearest = min(known, key=lambda b: (abs(b - bucket), b))
            arrays[:, bucket, layer] = found[nearest, layer].transpose(0, 2, 1)
    ran = runs[0].steps.get(title, [])
    calls = np.zeros((len(edges), shape.layers), np.int64)
    refreshes = np.zeros(len(edges), np.int64)
    schedule = sampling.schedule
    for step in sparse.intersection(ran):
        bucket = step_bucket(edges, step, num_steps)
        refreshes[bucket] += schedule.refreshes(step, num_steps)
        for layer in range(shape.layers):
            calls[bucket, layer] += schedule.dense_reason(layer, shape.layers, step, num_steps) is None
    weights = layer_weights(runs)
    mass = np.zeros((shape.layers, shape.heads, shape.tokens.grid.frames))
    for layer in {layer for _, layer in samples}:
        mass[layer] = np.mean([call.mass for place, found in samples.items() if place[1] == layer for call in found], 0)
    return Cells(
        title,
        shape,
        **dict(zip(_NAMES, arrays, strict=True)),
        mass=mass,
        weights=np.array([weights.get((title, layer), 1.0) for layer in range(shape.layers)]),
        calls=calls,
        refreshes=refreshes.clip(min=1),  # the first call of a bucket always chooses
        dense_calls=len(ran) * shape.layers - int(calls.sum()),
    )


_DENSE = {"error": 0.0, "error_mean": 0.0, "error_std": 0.0, "head_mse": 0.0, "recall": 1.0, "density": 1.0}
_NAMES = tuple(_DENSE)


def _statistics(calls: Sequence[CallScores], quantile: float) -> Floats:
    error, head_error, recall, density = (
        np.stack([getattr(call, name) for call in calls]).astype(np.float64)
        for name in ("error", "head_error", "recall", "density")
    )
    parts: Mapping[str, Floats] = {
        "error": np.quantile(error, quantile, axis=0),
        "error_mean": error.mean(0),
        "error_std": error.std(0),
        "head_mse": np.square(head_error).mean(0),
        "recall": recall.mean(0),
        "density": density.mean(0),
    }
    return np.stack([parts[name] for name in _NAMES])
