"""What is in a plan, in short: names of candidates, and what is chosen how often, by layer, by head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ..attention import AttentionMethod
from ..attention.methods.paro.masks import ParoPlan
from .plan import Plan

_CELLS = ("choices", "densities", "errors", "seconds")
_SAMPLED = ("error_means", "error_stds", "recalls")


def short_names(candidates: Sequence[AttentionMethod]) -> list[str]:
    """Name candidates as briefly as can be: method, density, and the fields in which those of one method differ.

    Args:
        candidates: The candidates.

    Returns:
        One name for each, no two the same.
    """
    values: dict[str, dict[str, set[Any]]] = {}
    for method in candidates:
        known = values.setdefault(method.name, {f.name: set() for f in fields(method)})
        for name, seen in known.items():
            seen.add(getattr(method, name))

    def brief(method: AttentionMethod) -> str:
        said = [
            (f.name, getattr(method, f.name))
            for f in fields(method)
            if f.name == "density" or len(values[method.name][f.name]) > 1
        ]
        plain = [(name, value) for name, value in said if value is not None and not isinstance(value, ParoPlan)]
        plain.sort(key=lambda pair: pair[0] != "density")
        return " ".join([method.name, *(f"{name}={_brief(value)}" for name, value in plain)])

    names = [brief(method) for method in candidates]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} #{index}" for index, name in enumerate(names)]


def bucket_names(edges: Sequence[float]) -> list[str]:
    """Name step buckets by the part of the run that they are.

    Args:
        edges: Ends of the buckets as fractions of the run, ascending, the last one 1.
    """
    return [span_name(edges, bucket, bucket) for bucket in range(len(edges))]


def span_name(edges: Sequence[float], first: int, last: int) -> str:
    """Name step buckets that follow each other by the part of the run that they are.

    Args:
        edges: Ends of the buckets as fractions of the run, ascending, the last one 1.
        first: Index of the first bucket, from 0.
        last: Index of the last bucket, from 0.
    """
    start = edges[first - 1] if first else 0.0
    if start == 0 and edges[last] == 1:
        return "all steps"
    return f"{100 * start:.3g} to {100 * edges[last]:.3g} % of the steps"


def shares(plan: Plan, title: str | None = None) -> dict[int, float]:
    """Count how often candidates are chosen: index and share of all heads and step buckets, the largest first.

    Args:
        plan: The plan.
        title: The transformer; default: all of them.
    """
    choices = _joined(plan, "choices") if title is None else np.array(plan.transformers[title].choices)
    count = Counter(choices.flat)
    return {int(index): n / choices.size for index, n in sorted(count.items(), key=lambda pair: (-pair[1], pair[0]))}


def chosen(plan: Plan) -> list[dict[str, Any]]:
    """Return what is chosen at all, the most frequent first, as values that JSON can hold.

    Args:
        plan: The plan.

    Returns:
        For each candidate its index, short name, method and fields, share of all heads and step buckets, mean density,
        and root mean square of the errors of these heads.
    """
    names = short_names(plan.candidates)
    choices, errors, densities = (_joined(plan, name) for name in ("choices", "errors", "densities"))
    return [
        {
            "index": index,
            "name": names[index],
            "method": plan.candidates[index].name,
            "fields": plan.candidates[index].describe(),
            "share": share,
            "density": float(densities[choices == index].mean()),
            "error": float(np.sqrt(np.square(errors[choices == index]).mean())),
        }
        for index, share in shares(plan).items()
    ]


def layers(plan: Plan, title: str) -> list[dict[str, Any]]:
    """Return what is chosen layer by layer, as values that JSON can hold.

    Args:
        plan: The plan.
        title: The transformer.

    Returns:
        For each layer its index, mean density, error, mean and spread of the error over samples, mean attention mass
        covered by the heads of which it is known, share of dense attention on a query's own frame, and which methods
        have which share of its heads and step buckets. Errors and spread are those of the layer's output, as if its
        heads erred apart, root mean squares over buckets. What was not measured is ``None``.
    """
    found = plan.transformers[title]
    choices, errors, densities = (np.array(getattr(found, name)) for name in ("choices", "errors", "densities"))
    mass = found.frame_mass
    recalls = np.array(found.recalls or np.full(choices.shape, None), np.float64)
    rows = []

    def whole(values: Any, layer: int) -> float | None:
        # of a layer, from those of its heads
        return float(np.sqrt(np.square(np.array(values)[:, layer]).sum() / len(plan.buckets))) if len(values) else None

    for layer in range(found.layers):
        count = Counter(plan.candidates[index].name for index in choices[:, layer].flat)
        rows.append(
            {
                "layer": layer,
                "density": float(densities[:, layer].mean()),
                "error": whole(errors, layer),
                "error_mean": whole(found.error_means, layer),
                "error_std": whole(found.error_stds, layer),
                "recall": _mean(recalls[:, layer]),
                "same_frame": float(np.mean([row[0] for row in mass[layer]])) if mass else None,
                "methods": {name: n / choices[:, layer].size for name, n in count.most_common()},
            }
        )
    return rows


def head_choices(plan: Plan, title: str, layer: int, head: int) -> list[dict[str, Any]]:
    """Return what one head runs in each step bucket, as values that JSON can hold.

    Args:
        plan: The plan.
        title: The transformer.
        layer: Index of the layer, from 0.
        head: Index of the head, from 0.
    """
    found, names = plan.transformers[title], short_names(plan.candidates)
    cells = [
        [bucket[layer][head] for bucket in getattr(found, name) or np.full(np.shape(found.choices), None)]
        for name in (*_CELLS, *_SAMPLED)
    ]
    return [
        {
            "bucket": name,
            "name": names[index],
            "method": plan.candidates[index].name,
            "fields": plan.candidates[index].describe(),
            "density": density,
            "error": error,
            "error_mean": mean,
            "error_std": std,
            "recall": recall,
            "seconds": seconds,
        }
        for name, index, density, error, seconds, mean, std, recall in zip(
            bucket_names(plan.buckets), *cells, strict=True
        )
    ]


def _joined(plan: Plan, name: str) -> np.ndarray:
    return np.concatenate([np.array(getattr(found, name)).ravel() for found in plan.transformers.values()])


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(_brief, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
