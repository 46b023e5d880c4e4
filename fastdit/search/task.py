"""The parts of a search that run the pipeline or take time, with what they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..attention import AttentionMethod
from ..attention.paro import Paro, calibrate
from ..pipelines.base import find_family
from ..pipelines.targets import require_transformers
from .candidates import describe
from .capture import capturing
from .cells import Cells, check_covered
from .cost import ROUNDS, CostModel, measure_cost
from .fingerprint import fingerprint, plain
from .live import LiveSamples
from .sampling import SampledSteps, Sampling
from .scores import Scores, digest

Progress = Callable[[str, int, int], None]

_PASSES = 3
"""How often a calibration goes through its samples."""


@dataclass
class Task:
    """Run the pipeline of a search.

    Args:
        pipeline: A diffusers pipeline.
        sampling: Which steps are sampled.
        arguments: Keywords of its call but the prompt.
        kernel: Name of the kernel to use; ``None`` chooses.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; ``None`` for that of the model.
        progress: Called with the stage, what is done and an estimate of all there is to do.
    """

    pipeline: Any
    sampling: Sampling
    arguments: dict[str, Any]
    kernel: str | None
    precision: str | None
    progress: Progress

    @property
    def num_steps(self) -> int:
        """Return the number of denoising steps that the pipeline is asked for."""
        steps = self.arguments.get("num_inference_steps")
        return steps or inspect.signature(self.pipeline.__call__).parameters["num_inference_steps"].default

    def generate(self, prompt: str, seed: int) -> None:
        """Make a video and drop it.

        Args:
            prompt: What it shows.
            seed: Of its noise.
        """
        noise = torch.Generator("cpu").manual_seed(seed)
        with _quiet(self.pipeline):
            self.pipeline(**{"output_type": "latent", **self.arguments, "prompt": prompt, "generator": noise})

    def capture(
        self,
        candidates: Sequence[AttentionMethod],
        prompts: Sequence[str],
        *,
        seed: int,
        changes: bool,
        folder: Path | None,
    ) -> list[Scores]:
        """Score candidates on the videos of all prompts, as far as files do not have the scores already.

        Args:
            candidates: The candidates; the first is dense.
            prompts: The prompts.
            seed: Of the noise of the first; each of the others has the next.
            changes: Whether to measure, with the first, what single sparse layers change.
            folder: Where the files are; ``None`` for none.

        Returns:
            The scores of each prompt.

        Raises:
            ValueError: A transformer was never sampled.
        """
        settings = {**self._settings(), "candidates": [describe(candidate) for candidate in candidates]}
        meter = Meter(self.progress, "capture", len(prompts), self._estimate(len(candidates) - 1))
        runs = []
        for index, prompt in enumerate(prompts):
            mine = {**settings, "prompt": prompt, "seed": seed + index, "changes": changes and index == 0}
            path = None if folder is None else folder / f"{digest(mine)}.json"
            scores = None if path is None else Scores.load(path, mine)
            if scores is None:
                schedule = SampledSteps(sampling=self.sampling)
                options = {"kernel": self.kernel, "precision": self.precision, "changes": mine["changes"]}
                with capturing(self.pipeline, candidates, schedule, advance=meter.advance, **options) as scores:
                    self.generate(prompt, seed + index)
                check_covered(scores, self.sampling)
                if path is not None:
                    scores.save(path, mine)
            runs.append(scores)
            meter.finish_part()
        return runs

    def costs(
        self, candidates: Sequence[AttentionMethod], cells: Sequence[Cells], known: CostModel | None
    ) -> dict[str, CostModel]:
        """Return a cost model for the calls of each transformer.

        Args:
            candidates: The candidates; the first is dense.
            cells: What was found about each transformer.
            known: A cost model of another device; ``None`` measures this one.

        Raises:
            ValueError: ``known`` does not know one of the candidates.
        """
        shape = cells[0].shape
        if known is None:
            meter = Meter(self.progress, "cost", 1, (ROUNDS + 1) * len(candidates))
            options = {"kernel": self.kernel, "precision": self.precision, "advance": meter.advance}
            known = measure_cost(candidates, shape, **options)
        else:
            known = known.select(candidates).scaled_to(shape)
        return {each.title: known if each.shape == shape else known.scaled_to(each.shape) for each in cells}

    def calibrate_paro(self, prompt: str, seed: int, density: float) -> dict[str, Paro]:
        """Calibrate PARO's orders and masks for each transformer, on one video that is made three times.

        Args:
            prompt: What it shows.
            seed: Of its noise.
            density: Fraction of pairs to keep, in (0, 1].

        Raises:
            ValueError: A transformer was not sampled, or the only one not in each bucket.
        """
        titles = list(require_transformers(self.pipeline))
        meter = Meter(self.progress, "calibrate", _PASSES * len(titles), 1)

        def generate() -> None:
            self.generate(prompt, seed)
            meter.advance(1)
            meter.finish_part()

        schedule = SampledSteps(sampling=self.sampling)
        # of two transformers each runs in a part of the steps only
        edges = self.sampling.edges(self.num_steps) if len(titles) == 1 else (1.0,)
        return {
            title: Paro(
                plan=calibrate(LiveSamples(self.pipeline, title, schedule, generate), density=density, edges=edges)
            )
            for title in titles
        }

    def _settings(self) -> dict[str, Any]:
        scheduler = self.pipeline.scheduler
        transformers = require_transformers(self.pipeline)
        return {
            "pipeline": type(self.pipeline).__name__,
            "scheduler": [type(scheduler).__name__, plain(dict(scheduler.config))],
            "models": {title: fingerprint(transformer) for title, transformer in transformers.items()},
            "sampling": plain(asdict(self.sampling)),
            "arguments": plain(self.arguments),
            "kernel": self.kernel,
            "precision": self.precision,
        }

    def _estimate(self, candidates: int) -> int:
        """Guess how many attention calls a video takes: two guidance passes, until the first video tells."""
        transformer = next(iter(require_transformers(self.pipeline).values()))
        layers = len(find_family(transformer).self_attentions(transformer))
        return 2 * layers * (self.num_steps + len(self.sampling.sampled(self.num_steps)) * candidates)


class Meter:
    """Count work, and correct the estimate of all of it by what the parts so far took.

    Args:
        progress: Called with the stage, what is done and an estimate of all there is to do.
        stage: What is counted.
        parts: How many parts there are, at least 1.
        estimate: Of the work of one part.
    """

    def __init__(self, progress: Progress, stage: str, parts: int, estimate: int) -> None:
        self.progress, self.stage = progress, stage
        self.left, self.estimate = parts, estimate
        self.done = self.before = 0
        progress(stage, 0, parts * estimate)

    def advance(self, count: int) -> None:
        """Count work.

        Args:
            count: How much.
        """
        self.done += count
        current = max(self.estimate, self.done - self.before)
        self.progress(self.stage, self.done, self.before + current + (self.left - 1) * self.estimate)

    def finish_part(self) -> None:
        """Take note that a part is done; one without work was known already, and says nothing about the others."""
        if self.done > self.before:
            self.estimate = self.done - self.before
        self.left -= 1
        self.before = self.done
        self.progress(self.stage, self.done, self.done + self.left * self.estimate)


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Turn off the pipeline's own progress bar for a while."""
    before = dict(getattr(pipeline, "_progress_bar_config", None) or {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
