"""Search stages that run the pipeline or measure time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..attention import AttentionMethod
from ..attention.methods.paro.calibration import PASSES, Look, NoSamples, calibrate
from ..attention.methods.paro.paro import Paro
from ..files import moved_when_complete
from ..pipelines.families.family import find_family
from ..pipelines.observe import ObservedCall, observe
from ..pipelines.targets import require_transformers
from ..plans.schema import write_json
from .candidates import describe
from .capture import capturing
from .cost import ROUNDS, TOO_SLOW, CostModel, device_name, measure_cost
from .fingerprint import fingerprint, plain
from .sampling import SampledSteps, Sampling
from .scores import Scores, Shape, digest
from .statistics import check_covered

Progress = Callable[[str, int, int], None]


@dataclass
class Task:
    """The pipeline of a search and how it is run.

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
        left_out: frozenset[int],
        changes: bool,
        folder: Path | None,
    ) -> list[Scores]:
        """Score candidates on the videos of all prompts, as far as files do not have the scores already.

        Args:
            candidates: The candidates; the first is dense.
            prompts: The prompts.
            seed: Of the noise of the first; each of the others has the next.
            left_out: Indices of candidates that are not scored.
            changes: Whether to measure, with the first, what single sparse layers change.
            folder: Where the files are; ``None`` for none.

        Returns:
            The scores of each prompt.

        Raises:
            ValueError: A transformer was never sampled.
        """
        settings = {
            **self._settings(),
            "candidates": [describe(candidate) for candidate in candidates],
            "left_out": sorted(left_out),
        }
        meter = Meter(self.progress, "capture", len(prompts), self._estimate(len(candidates) - 1 - len(left_out)))
        options = {"kernel": self.kernel, "precision": self.precision, "left_out": left_out, "advance": meter.advance}
        runs = []
        for index, prompt in enumerate(prompts):
            mine = {**settings, "prompt": prompt, "seed": seed + index, "changes": changes and index == 0}
            path = None if folder is None else folder / f"{digest(mine)}.json"
            scores = None if path is None else Scores.load(path, mine)
            if scores is None:
                schedule = SampledSteps(sampling=self.sampling)
                with capturing(self.pipeline, candidates, schedule, changes=mine["changes"], **options) as scores:
                    self.generate(prompt, seed + index)
                check_covered(scores, self.sampling)
                if path is not None:
                    scores.save(path, mine)
            runs.append(scores)
            meter.finish_part()
        return runs

    def survey(self, prompt: str, seed: int) -> Shape:
        """Return how large the attention calls are, from the first one that the pipeline makes.

        Args:
            prompt: What the video would show.
            seed: Of its noise.

        Raises:
            ValueError: No call can run sparse; the error says why.
        """

        def stop(seen: ObservedCall) -> None:
            raise _FirstCall(Shape.of(seen.q, seen.call))

        with observe(self.pipeline, stop) as observed:
            try:
                self.generate(prompt, seed)
            except _FirstCall as first:
                return first.shape
        reasons = {reason for _, runtime in observed for layer in runtime.layers for reason in layer.stats.fallbacks}
        raise ValueError(
            f"no attention call of this pipeline can run sparse: {'; '.join(sorted(reasons)) or 'none is made'}"
        )

    def cost(
        self, candidates: Sequence[AttentionMethod], shape: Shape, known: CostModel | None, folder: Path | None
    ) -> CostModel:
        """Return a cost model: the one given, the one kept in the folder, or one that is measured now.

        Args:
            candidates: The candidates; the first is dense.
            shape: The size of the calls.
            known: A cost model of another device; ``None`` for this one.
            folder: Where it is kept; ``None`` for nowhere.

        Raises:
            ValueError: ``known`` does not know one of the candidates.
        """
        if known is not None:
            return known.select(candidates).scaled_to(shape)
        about = {
            "shape": plain(asdict(shape)),
            "device": device_name(torch.device(shape.device)),
            "threads": torch.get_num_threads(),
            "kernel": self.kernel,
            "precision": self.precision,
            "candidates": [describe(candidate) for candidate in candidates],
        }
        path = None if folder is None else folder / f"cost-{digest(about)}.json"
        if path is not None and path.exists():
            return CostModel.load(path).select(candidates)
        meter = Meter(self.progress, "cost", 1, (ROUNDS + 1) * len(candidates))
        options = {"kernel": self.kernel, "precision": self.precision, "advance": meter.advance}
        model = measure_cost(candidates, shape, **options)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with moved_when_complete(path) as part:
                part.write_text(write_json(model.record()), encoding="utf-8")
        return model

    def slower_than_dense(self, model: CostModel) -> frozenset[int]:
        """Return the candidates that take far longer than dense attention in every bucket: nothing speaks for them.

        Those that take little longer stay: on a shared machine times vary, and a density may be met with them all the
        same. A limit on time leaves them out by itself.

        Args:
            model: What the candidates cost.

        Raises:
            ValueError: All take longer than dense attention.
        """
        buckets = [each for each in self.sampling.calls(self.num_steps) if each[0]]
        dense = float(model.seconds(0, 1.0))
        least = {
            index: min(float(model.seconds(index, timing.density, calls=n, refreshes=r)) for n, r in buckets)
            for index, timing in enumerate(model.timings[1:], start=1)
        }
        if min(least.values()) > dense:
            raise ValueError(
                f"every candidate takes longer than dense attention on {model.device} with {model.tokens} tokens: "
                "sparse attention has nothing to win here; search at the size that the plan is for"
            )
        return frozenset(index for index, seconds in least.items() if seconds > TOO_SLOW * dense)

    def calibrate_paro(self, prompt: str, seed: int, density: float) -> dict[str, Paro]:
        """Calibrate PARO's orders and masks for each transformer that is sampled, on one video made three times.

        Args:
            prompt: What it shows.
            seed: Of its noise.
            density: Fraction of pairs to keep, in (0, 1].

        Raises:
            NoSamples: The only transformer was not sampled.
            ValueError: It was not sampled in each bucket.
        """
        titles = list(require_transformers(self.pipeline))
        meter = Meter(self.progress, "calibrate", PASSES * len(titles), 1)
        schedule = SampledSteps(sampling=self.sampling)
        # of two transformers each runs in a part of the steps only
        edges = self.sampling.edges(self.num_steps) if len(titles) == 1 else (1.0,)

        def run(title: str, look: Look) -> None:
            def show(seen: ObservedCall) -> None:
                if seen.title == title:
                    look(seen.q, seen.k, seen.call)

            with observe(self.pipeline, show, schedule=schedule):
                self.generate(prompt, seed)
            meter.advance(1)
            meter.finish_part()

        methods = {}
        for title in titles:
            try:
                methods[title] = Paro(plan=calibrate(partial(run, title), density=density, edges=edges))
            except NoSamples:
                if len(titles) == 1:
                    raise
                meter.skip_parts(PASSES - 1)  # it runs in dense steps only
        return methods

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
    """A counter of work that corrects its estimate of the total after each part.

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

    def skip_parts(self, count: int) -> None:
        """Take note that parts need no work.

        Args:
            count: How many, at least 0.
        """
        self.left -= count
        self.progress(self.stage, self.done, self.done + self.left * self.estimate)

    def finish_part(self) -> None:
        """Take note that a part is done; one without work was known already, and says nothing about the others."""
        if self.done > self.before:
            self.estimate = self.done - self.before
        self.left -= 1
        self.before = self.done
        self.progress(self.stage, self.done, self.done + self.left * self.estimate)


class _FirstCall(Exception):
    """The end of a survey at its first call."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.shape = shape


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Turn off the pipeline's own progress bar for a while."""
    before = dict(getattr(pipeline, "_progress_bar_config", None) or {})
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
