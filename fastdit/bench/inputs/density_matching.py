"""Density matching: methods with the fields, or calibrated, so that they compute a given fraction of pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

import torch

from ...attention import AttentionMethod, MethodState, get_method, method_class
from ...attention.methods.paro.calibration import Look, calibrate
from ...attention.per_head.table import Table
from ...functional import pattern
from ...schedule import step_bucket
from ...search.candidates import SPARSE_VDIT as MODES
from .synthetic import Sample

SPARSE_VDIT = "sparse-vdit"
"""Named as a method here: for each head one of its patterns."""

CLOSE = 0.02
"""How far, relatively, a realised density may be from the one asked for before it is tried again."""

TRIES = 8

PARO_EDGES = (0.6, 1.0)
"""Ends of the parts of a run for which ``paro`` is calibrated, where there are calls of both."""


class NotAdjustable(ValueError):
    """A method that has no density to set."""


def at_density(method: str, given: dict[str, Any], density: float, samples: Sequence[Sample]) -> AttentionMethod:
    """Make a method that computes a fraction of the pairs of some calls, as nearly as it can.

    Args:
        method: Its name, or ``"sparse-vdit"``.
        given: Fields that are not turned.
        density: The fraction, in (0, 1].
        samples: Calls to look at, of every layer for methods that are in ``CALIBRATED``.

    Raises:
        NotAdjustable: The method has nothing to turn.
    """
    adjust = _ADJUST.get(method)
    if adjust is not None:
        return adjust(given, density, samples)
    if "density" not in {f.name for f in fields(method_class(method))}:
        raise NotAdjustable(f"{method} has no density to set")
    return _turned(method, given, density, samples[0])


def _turned(method: str, given: dict[str, Any], density: float, sample: Sample) -> AttentionMethod:
    """Turn the field ``density`` until what is computed is what was asked for."""
    low, high, asked = 0.0, 1.0, density
    best: tuple[float, AttentionMethod] | None = None
    for _ in range(TRIES):
        made = get_method(method, density=asked, **given)
        realised = made.pattern(sample.q, sample.k, sample.call, MethodState()).density
        if best is None or abs(realised - density) < best[0]:
            best = (abs(realised - density), made)
        if abs(realised - density) <= CLOSE * density:
            break
        low, high = (low, asked) if realised > density else (asked, high)
        asked = (low + high) / 2
    assert best is not None
    return best[1]


def _radial(given: dict[str, Any], density: float, samples: Sequence[Sample]) -> AttentionMethod:
    matched = radial_fields(samples[0].call.tokens.grid.shape, density, tuple(sorted(given.items())))
    return get_method("radial", **matched)


def _paro(given: dict[str, Any], density: float, samples: Sequence[Sample]) -> AttentionMethod:
    def run(look: Look) -> None:
        for sample in samples:
            look(sample.q, sample.k, sample.call)

    parts = {step_bucket(PARO_EDGES, sample.call.step, sample.call.num_steps) for sample in samples}
    edges = PARO_EDGES if len(parts) == len(PARO_EDGES) else (1.0,)
    return get_method("paro", plan=calibrate(run, density=density, edges=edges), **given)


@torch.no_grad()
def _sparse_vdit(given: dict[str, Any], density: float, samples: Sequence[Sample]) -> AttentionMethod:
    """Give each head the pattern of least error; the paper's rule weighs work too, which is equal here."""
    modes = tuple(_turned(mode, given, density, samples[0]) for mode in MODES)
    errors: dict[int, torch.Tensor] = {}
    for sample in samples:
        q, k, v, call = sample.q, sample.k, sample.v, sample.call
        dense = sample.dense()
        of_heads = [sample.errors(mode.forward(q, k, v, call, MethodState()), dense) for mode in modes]
        errors[call.layer] = errors.get(call.layer, torch.zeros(())) + torch.tensor(of_heads).square()
    choices = tuple(tuple(errors[layer].argmin(0).tolist()) for layer in sorted(errors))
    return Table(edges=(1.0,), methods=modes, choices=(choices,))


_ADJUST: dict[str, Callable[[dict[str, Any], float, Sequence[Sample]], AttentionMethod]] = {
    "radial": _radial,
    "paro": _paro,
    SPARSE_VDIT: _sparse_vdit,
}
CALIBRATED = ("paro", SPARSE_VDIT)
"""Methods that learn from calls of every layer."""


@cache
def radial_fields(
    grid: tuple[int, int, int], density: float, given: tuple[tuple[str, Any], ...] = ()
) -> dict[str, Any]:
    """Find the fields with which radial attention comes nearest to a density.

    Args:
        grid: ``(frames, height, width)`` in tokens.
        density: Wanted fraction, in (0, 1].
        given: Names and values of fields that are not turned; tiles lie in one frame, as bands are between frames.
    """
    best: tuple[float, dict[str, Any]] = (math.inf, {})
    for sink, min_band, decay in itertools.product((True, False), (1, 128, 512, 1024, 2048), (0.05, 0.2, 0.5, 1.0)):
        turned: dict[str, Any] = {"decay": decay, "min_band": min_band, "sink": sink, "block_size": 64}
        turned |= {"tile": (1, 8, 8)} if ("order", "tile") in given else {}
        turned |= dict(given)
        off = abs(pattern("radial", grid=grid, **turned).density - density)
        if off < best[0] - 1e-3:  # prefers a sink among nearly equal ones
            best = (off, turned)
    return best[1]
