"""Sampled denoising steps and step buckets of a search."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..schedule import Schedule, check_edges, step_bucket


@dataclass(frozen=True)
class Sampling:
    """A division of the sparse steps of a run into buckets, with some sampled steps in each.

    Args:
        schedule: Which steps and layers stay dense whatever the search finds.
        buckets: How many buckets of as equal a number of sparse steps as can be, at least 1, or their ends as
            fractions of the run. There are never more buckets than sparse steps.
        per_bucket: Steps sampled in each bucket, at least 1, spread over it.
        steps: The steps to sample, by index from 0, instead of ``per_bucket``.

    Raises:
        ValueError: A number is smaller than it may be, or the ends are none.
    """

    schedule: Schedule = field(default_factory=Schedule)
    buckets: int | tuple[float, ...] = 3
    per_bucket: int = 1
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.buckets, int):
            if self.buckets < 1:
                raise ValueError(f"buckets must be at least 1, or their ends as fractions, got {self.buckets}")
        else:
            object.__setattr__(self, "buckets", tuple(self.buckets))
            check_edges(self.buckets)
        if self.per_bucket < 1:
            raise ValueError(f"per_bucket must be at least 1 step, got {self.per_bucket}")
        if self.steps is not None:
            object.__setattr__(self, "steps", tuple(self.steps))

    def sparse_steps(self, num_steps: int) -> list[int]:
        """Return the steps that the schedule leaves to the search.

        Args:
            num_steps: Steps of the run, at least 1.

        Raises:
            ValueError: There is none.
        """
        # dense layers are dense at every step, and no reason to call a step dense
        schedule = Schedule(self.schedule.warmup_steps, self.schedule.tail_steps)
        steps = [step for step in range(num_steps) if schedule.dense_reason(0, 1, step, num_steps) is None]
        if not steps:
            raise ValueError(f"the schedule keeps all {num_steps} steps dense, so there is nothing to search for")
        return steps

    def edges(self, num_steps: int) -> tuple[float, ...]:
        """Return the ends of the buckets as fractions of the run, ascending, the last one 1.

        Args:
            num_steps: Steps of the run, at least 1.

        Raises:
            ValueError: The schedule keeps all steps dense.
        """
        if not isinstance(self.buckets, int):
            return self.buckets
        steps = self.sparse_steps(num_steps)
        count = min(self.buckets, len(steps))
        starts = [steps[len(steps) * i // count] for i in range(1, count)]
        return (*(start / num_steps for start in starts), 1.0)

    def calls(self, num_steps: int) -> list[tuple[int, int]]:
        """Count for each bucket its sparse steps, and those of them that choose blocks anew, the first included.

        Args:
            num_steps: Steps of the run, at least 1.

        Raises:
            ValueError: The schedule keeps all steps dense.
        """
        buckets = self._divide(num_steps)
        anew = [sum(self.schedule.refreshes(step, num_steps) for step in steps) for steps in buckets]
        return [(len(steps), max(count, min(len(steps), 1))) for steps, count in zip(buckets, anew, strict=True)]

    def _divide(self, num_steps: int) -> list[list[int]]:
        edges = self.edges(num_steps)
        buckets: list[list[int]] = [[] for _ in edges]
        for step in self.sparse_steps(num_steps):
            buckets[step_bucket(edges, step, num_steps)].append(step)
        return buckets

    def sampled(self, num_steps: int) -> frozenset[int]:
        """Return the steps to sample.

        Args:
            num_steps: Steps of the run, at least 1.

        Raises:
            ValueError: The schedule keeps all steps dense, or one that was asked for.
        """
        if self.steps is not None:
            sparse = self.sparse_steps(num_steps)
            wrong = sorted(set(self.steps) - set(sparse))
            if wrong or not self.steps:
                raise ValueError(
                    f"steps must name some of the sparse steps, {sparse[0]} to {sparse[-1]} of {num_steps}, "
                    f"got {wrong or 'none'}"
                )
            return frozenset(self.steps)
        chosen: set[int] = set()
        for inside in self._divide(num_steps):
            count = min(self.per_bucket, len(inside))
            chosen |= {inside[len(inside) * (2 * i + 1) // (2 * count)] for i in range(count)}
        return frozenset(chosen)


@dataclass(frozen=True)
class SampledSteps(Schedule):
    """A schedule that keeps all steps but sampled ones dense.

    Args:
        sampling: Which steps are sampled.
    """

    sampling: Sampling = field(default_factory=Sampling)

    def dense_reason(self, layer: int, num_layers: int, step: int, num_steps: int | None) -> str | None:
        """Say why a call is left alone, or return ``None`` if it is sampled.

        Raises:
            ValueError: ``num_steps`` is unknown, or all steps are dense.
        """
        if num_steps is None:
            raise ValueError("a search needs to know the number of denoising steps: give it a pipeline, which says so")
        if step not in self.sampling.sampled(num_steps):
            return "not a sampled step"
        return self.sampling.schedule.dense_reason(layer, num_layers, step, num_steps)
