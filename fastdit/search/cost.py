"""Cost models of candidates, measured on this device or read from a file of another."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.functional import interpolate

from ..attention import AttentionMethod, MethodState, PatternCache
from ..attention.methods.dense import Dense
from ..pipelines.stats import Stopwatch
from ..tokens import AttentionCall
from ..validation import describe_error
from .candidates import describe
from .scores import Shape
from .scoring import known_pattern, naming

ROUNDS = 3
"""Timing rounds of each candidate; the median is used."""

TOO_SLOW = 1.5
"""Limit of a candidate's time relative to dense attention; times on shared machines vary by a third or more."""

_COARSE = 4


@dataclass(frozen=True)
class Timing:
    """The times of one candidate, for all heads and samples of one call, in seconds.

    Args:
        candidate: Its name and fields.
        kind: What sets the speed of its kernel: block sizes and compensation.
        density: Fraction of pairs computed, in [0, 1].
        first_density: That of the first call of a video, from which it may learn.
        first: The first call of a video.
        refreshed: A later one that chooses its blocks anew.
        reused: A later one that does not.
        order: Of a reused one, the ordering of tokens.
    """

    candidate: dict[str, Any]
    kind: str
    density: float
    first_density: float
    first: float
    refreshed: float
    reused: float
    order: float


@dataclass(frozen=True)
class CostModel:
    """Predicted times of candidates, from times measured in one run together with dense attention.

    Within a kind the kernel's time is a line over the pairs computed, ``a + b * density * tokens**2 * head_dim`` for
    one head and sample. A candidate's own time is the base, the slope of its kind takes it to another density.

    Args:
        device: Name of the device.
        dtype: Name of the dtype.
        kernel: Name of the kernel asked for; ``None``: chosen.
        precision: Precision asked for; ``None``: that of the dtype.
        tokens: Tokens of the sequence, at least 1.
        heads: Heads of the call, at least 1.
        head_dim: Channels of a head, at least 1.
        batch: Samples of the call, at least 1.
        dense: Seconds of the dense call.
        timings: One for each candidate; the first is dense.
    """

    VERSION: ClassVar[int] = 1

    device: str
    dtype: str
    kernel: str | None
    precision: str | None
    tokens: int
    heads: int
    head_dim: int
    batch: int
    dense: float
    timings: tuple[Timing, ...]

    @property
    def work(self) -> float:
        """Return ``tokens**2 * head_dim``: what the time of one head and sample is proportional to."""
        return float(self.tokens) ** 2 * self.head_dim

    @cached_property
    def fits(self) -> dict[str, tuple[float, float]]:
        """Return for each kind the line of its kernel: seconds of a head, and seconds per unit of work; at least 0."""
        points: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for timing in self.timings:
            if timing.density > 0:
                seconds = max(timing.reused - timing.order, 0.0) / (self.heads * self.batch)
                points[timing.kind].append((timing.density * self.work, seconds))
        return {kind: _line(np.array(found)) for kind, found in points.items()}

    def seconds(self, index: int, density: ArrayLike, *, calls: int = 1, refreshes: int = 0) -> NDArray[np.float64]:
        """Predict the mean time of a call for one head and all samples.

        Args:
            index: Index of the candidate.
            density: Fraction of pairs that the head computes, in [0, 1].
            calls: Calls in a row with it, at least 1.
            refreshes: How many of them choose the blocks anew, the first included; 0: the choice costs nothing.

        Returns:
            As many as there are densities, above 0.
        """
        timing = self.timings[index]
        slope = self.fits.get(timing.kind, (0.0, 0.0))[1] * self.work * self.batch
        seconds = timing.reused / self.heads + slope * (np.asarray(density, np.float64) - timing.density)
        if refreshes:
            extra = timing.first - timing.reused + (refreshes - 1) * (timing.refreshed - timing.reused)
            seconds = seconds + max(extra, 0.0) / self.heads / calls
        return seconds.clip(min=1e-3 * self.dense / self.heads * timing.density + 1e-12)

    def scaled_to(self, shape: Shape) -> CostModel:
        """Return what the times would be for calls of another size: kernels by their lines, the rest by the tokens.

        Args:
            shape: The other size.
        """
        tokens, units, was = shape.tokens.num_tokens, shape.heads * shape.batch, self.heads * self.batch
        other = replace(self, tokens=tokens, heads=shape.heads, head_dim=shape.head_dim, batch=shape.batch)
        computed = units * other.work / (was * self.work)
        moved = units * tokens * shape.head_dim / (was * self.tokens * self.head_dim)

        def scale(timing: Timing) -> Timing:
            start, slope = self.fits.get(timing.kind, (0.0, 1.0))
            here, there = (start + slope * timing.density * model.work for model in (self, other))
            kernel = (timing.reused - timing.order) * units * there / (was * here) if here else 0.0
            reused = kernel + timing.order * moved
            learning = computed if timing.first_density > timing.density else moved
            return replace(
                timing,
                first=reused + (timing.first - timing.reused) * learning,
                refreshed=reused + (timing.refreshed - timing.reused) * moved,
                reused=reused,
                order=timing.order * moved,
            )

        return replace(other, dense=self.dense * computed, timings=tuple(scale(t) for t in self.timings))

    def select(self, candidates: Sequence[AttentionMethod]) -> CostModel:
        """Return the model with the timings of some candidates, in their order.

        Args:
            candidates: The candidates.

        Raises:
            ValueError: One was not measured.
        """
        known = {json.dumps(t.candidate, sort_keys=True): t for t in self.timings}
        wanted = [describe(candidate) for candidate in candidates]
        missing = [each for each in wanted if json.dumps(each, sort_keys=True) not in known]
        if missing:
            raise ValueError(
                f"the cost model of {self.device} has no times of {len(missing)} candidates, such as {missing[0]}; "
                "measure it with these candidates, or leave them out"
            )
        return replace(self, timings=tuple(known[json.dumps(each, sort_keys=True)] for each in wanted))

    def record(self) -> dict[str, Any]:
        """Return the model as JSON values, with the lines of its kernels beside the times they come from."""
        lines = {kind: {"seconds": a, "seconds_per_work": b} for kind, (a, b) in self.fits.items()}
        return {"version": self.VERSION, **json.loads(json.dumps(asdict(self))), "kernels": lines}

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Read a cost model from a JSON file: a record, as a search keeps beside its scores, or a plan, which has one.

        Args:
            path: The file.

        Raises:
            ValueError: It cannot be read, or holds no cost model.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = content["cost_model"] if isinstance(content, dict) and "fastdit_plan" in content else content
            if isinstance(record, dict) and record.get("version", cls.VERSION) != cls.VERSION:
                raise ValueError(f"it has version {record['version']}, and this fastdit reads {cls.VERSION}")
            # from JSON, where strict types take objects for dataclasses; earlier records say more
            return TypeAdapter(cls).validate_json(json.dumps(record, allow_nan=False), strict=True)
        except (OSError, ValueError, KeyError) as error:
            known = isinstance(error, ValidationError)
            fault = f"it is no cost model, or a damaged one: {describe_error(error)}" if known else error
            raise ValueError(
                f"cannot read a cost model from {path}: {fault}; give a plan, or a cost-*.json beside the scores of one"
            ) from error


@torch.no_grad()
def measure_cost(
    candidates: Sequence[AttentionMethod],
    shape: Shape,
    *,
    kernel: str | None = None,
    precision: str | None = None,
    rounds: int = ROUNDS,
    advance: Callable[[int], None] = lambda count: None,
) -> CostModel:
    """Time candidates on made-up queries, keys and values of the right size.

    Dense attention is timed before each of them, and a candidate's time is its ratio to that, so that a machine which
    speeds up or slows down meanwhile does not favour any of them.

    Args:
        candidates: The candidates; the first is dense.
        shape: The size.
        kernel: Name of the kernel to use; ``None`` chooses.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; ``None`` for that of the dtype.
        rounds: How often to time each, at least 1.
        advance: Called with 1 after each candidate of each round, one round for warming up included.
    """
    q, k, v = structured_qkv(shape)
    call = AttentionCall(shape.tokens, num_layers=shape.layers, num_steps=1)  # masks may differ between parts of a run
    caches = [PatternCache() for _ in candidates]
    dense, ratios, found = [], defaultdict(list), {}
    for turn in range(rounds + 1):
        for index, method in enumerate(candidates):
            base = _time(lambda: Dense().forward(q, k, v, call, MethodState()), q.device)
            state = MethodState(cache=caches[index], kernel=kernel, precision=precision)
            with naming(method):
                found[index], seconds = _run(method, q, k, v, call, state, base)
            if turn:  # the first round builds static patterns, compiles kernels, warms up
                ratios[index].append({name: value / base for name, value in seconds.items()})
                dense.append(base)
            advance(1)
    mean = statistics.median(dense)
    timings = []
    for index, method in enumerate(candidates):
        times = {name: mean * statistics.median(r[name] for r in ratios[index]) for name in ratios[index][0]}
        timings.append(Timing(candidate=describe(method), **found[index], **times))
    sizes = {"tokens": shape.tokens.num_tokens, "heads": shape.heads, "head_dim": shape.head_dim, "batch": shape.batch}
    return CostModel(device_name(q.device), shape.dtype, kernel, precision, **sizes, dense=mean, timings=tuple(timings))


def device_name(device: torch.device) -> str:
    """Name a device: a GPU by its model.

    Args:
        device: The device.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def structured_qkv(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Make up queries, keys and values that vary smoothly over the video, plus noise: three ``(B, H, S, D)``.

    Args:
        shape: The size.
        seed: Of the random numbers.
    """
    grid, video = shape.tokens.grid, shape.tokens.video
    noise = torch.Generator().manual_seed(seed)
    coarse = [max(1, n // _COARSE) for n in grid.shape]

    def make() -> Tensor:
        x = torch.randn(shape.batch, shape.heads, shape.tokens.num_tokens, shape.head_dim, generator=noise)
        for head in range(shape.heads):
            smooth = torch.randn(shape.batch, shape.head_dim, *coarse, generator=noise)
            smooth = interpolate(smooth, size=grid.shape, mode="trilinear")
            x[:, head, video] += smooth.flatten(2).transpose(1, 2)
        return x.to(getattr(torch, shape.dtype)).to(shape.device)

    return make(), make(), make()


def _run(
    method: AttentionMethod, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, state: MethodState, dense: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return what a candidate is like, and the seconds of its calls in one video."""
    if method.stock:
        same = dict.fromkeys(("first", "refreshed", "reused"), dense)
        return {"kind": method.name, "density": 1.0, "first_density": 1.0}, {**same, "order": 0.0}
    if method.empty:
        nothing: dict[str, float] = dict.fromkeys(("first", "refreshed", "reused", "order"), 0.0)
        return {"kind": method.name, "density": 0.0, "first_density": 0.0}, nothing

    def time_call() -> tuple[float, float]:
        parts: defaultdict[str, Stopwatch] = defaultdict(Stopwatch)
        state.measure = lambda part, device, run: parts[part].time(device, run)
        seconds = _time(lambda: method.forward(q, k, v, call, state), q.device)
        return seconds, parts["order"].seconds

    first, order = time_call()
    about: dict[str, Any] = {"first_density": _kept(state)}
    refreshed = reused = first  # a static pattern is built once for all layers and steps
    if not method.static:
        refreshed, _ = time_call()
        state.refresh = False
        reused, order = time_call()
    pattern = known_pattern(method, q, k, call, state)
    kind = method.name if pattern is None else f"{pattern.mask.block_q}x{pattern.mask.block_k}"
    compensate = getattr(method, "compensate", None)
    about |= {"density": _kept(state), "kind": kind if compensate is None else f"{kind} {compensate}"}
    return about, {"first": first, "refreshed": refreshed, "reused": reused, "order": order}


def _kept(state: MethodState) -> float:
    assert state.kept is not None, "forward leaves the density in state.kept"
    return float(state.kept)


def _time(run: Callable[[], Any], device: torch.device) -> float:
    watch = Stopwatch()
    watch.time(device, run)
    return watch.seconds


def _line(points: NDArray[np.float64]) -> tuple[float, float]:
    """Fit seconds over work by a line with neither a negative start nor a negative slope."""
    work, seconds = points.T
    through_origin = (0.0, float(work @ seconds / (work @ work)))
    if np.ptp(work) < 0.05 * work.max():
        return through_origin
    slope, start = np.polyfit(work, seconds, 1)
    if slope <= 0:
        return float(seconds.mean()), 0.0
    return (float(start), float(slope)) if start >= 0 else through_origin
