"""Quality benchmark: each setting against the dense video of the same prompt and seed, at equal density."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..api import SparseAttention, disable_sparse_attention, enable_sparse_attention
from ..files import distinct_names, moved_when_complete
from ..schedule import Schedule
from .inputs.capture import capture, some_layers
from .inputs.settings import Setting, settings_by_part
from .inputs.synthetic import Sample
from .jobs import Job, Outcome
from .measuring.clips import compare_clips, strip
from .report.result_store import Row

DENSE, BESIDE = "dense", "side-by-side"

NO_TITLE, NO_FOLDER = r"[^\w ,.-]|^\.|-$", r"[^\w@.+-]|^\."
"""What the names of videos and of their folders do not have."""

MOST_BYTES = 220
"""Of these names, with room for a seed."""

SPARSE = 0.7
"""Time of a sparse video over that of a dense one, about, for estimates."""


@dataclass(frozen=True)
class Studio:
    """A pipeline that makes videos, and where they are kept.

    Args:
        pipeline: The pipeline.
        make: Makes the video of a prompt and a seed: ``(F, H, W, 3)`` in [0, 1].
        steps: Denoising steps.
        calibration: What calls are kept of: a prompt and a seed that are not compared together.
        folder: Where videos go; ``None`` keeps none.
        write: Writes frames to a file of videos.
        pair: Puts two videos next to each other.
        judge: Scores how well a video shows its prompt, as the demo can; ``None`` without such a score.
    """

    pipeline: Any
    make: Callable[[str, int], np.ndarray]
    steps: int
    calibration: tuple[str, int]
    folder: Path | None = None
    write: Callable[[np.ndarray, Path], None] = lambda frames, path: None
    pair: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda dense, clip: np.concatenate([dense, clip], axis=2)
    judge: Callable[[np.ndarray, str], float] | None = None

    def samples(self, every_layer: bool) -> list[Sample]:
        """Keep calls of a video that is not compared, at a step in each half of the run.

        Args:
            every_layer: Whether those of all layers are kept, or of one in the middle.
        """
        return capture(self.pipeline, lambda: self.make(*self.calibration), self.calibration_steps, every_layer)

    @property
    def calibration_steps(self) -> tuple[int, ...]:
        """Return the indices of the steps that are kept."""
        return tuple(sorted({int(0.4 * self.steps), int(0.8 * self.steps)}))


def quality_jobs(
    studio: Callable[[], Studio],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[Setting],
    *,
    densities: Sequence[float],
    model: str,
    about: dict[str, Any],
    seconds: float | None = None,
    others: Sequence[str] = (),
) -> list[Job]:
    """Make a job for each prompt, seed, setting and density; those of one prompt and seed share the dense video.

    Args:
        studio: Loads the pipeline, when it is first needed.
        prompts: The prompts.
        seeds: Random seeds of the noise.
        settings: The settings.
        densities: Fractions of the pairs of sparse calls, each in (0, 1].
        model: Name of the model.
        about: Description of model and size in the rows.
        seconds: Estimate of one dense video; ``None``: no estimate.
        others: Prompts of earlier runs, whose videos keep their names.
    """
    shared = cache(studio)
    # one dense video serves all, whichever calls they look at
    calibration = cache(lambda: shared().samples(any(setting.is_calibrated for setting in settings)))
    parts = settings_by_part(settings, densities)
    calibrated = sum(setting.is_calibrated for setting, _ in parts.values())
    titles = distinct_names((*prompts, *others), NO_TITLE, MOST_BYTES)
    folders = distinct_names((DENSE, BESIDE, *parts), NO_FOLDER, MOST_BYTES)

    @cache
    def find(part: str) -> tuple[Setting, float | None, Any]:
        setting, density = parts[part]
        return setting, density, setting.at(density, lambda every: some_layers(calibration(), every))

    @lru_cache(maxsize=1)
    def dense(prompt: str, seed: int) -> np.ndarray:
        clip, _ = _video(shared(), prompt, seed, partial(enable_sparse_attention, method=DENSE, schedule=Schedule()))
        keep(shared(), folders[DENSE], f"{titles[prompt]}-{seed}", clip)
        return clip

    def estimate(first: bool, of_prompt: bool) -> float | None:
        if seconds is None:
            return None
        # the first job also captures dense calls; calibrated methods compute exact maps of them
        return seconds * (SPARSE + of_prompt + (1 + 2 * calibrated if first else 0))

    return [
        Job(
            "quality",
            f"{model} | {prompt} | {seed}",
            (part,),
            partial(_measure, shared, find, dense, prompt, seed, folders[part], f"{titles[prompt]}-{seed}"),
            estimate(first=i == j == 0, of_prompt=j == 0),
            {"model": model, "prompt": prompt, "clip_seed": seed, **about},
        )
        for i, (prompt, seed) in enumerate(itertools.product(prompts, seeds))
        for j, part in enumerate(parts)
    ]


def _measure(
    shared: Callable[[], Studio],
    find: Callable[[str], tuple[Setting, float | None, Any]],
    dense: Callable[[str, int], np.ndarray],
    prompt: str,
    seed: int,
    folder: str,
    title: str,
    todo: Collection[str],
    advance: Callable[[], None],
) -> Outcome:
    outcome, studio = Outcome(), shared()
    for part in todo:
        setting, asked, method = find(part)
        if isinstance(method, str):
            outcome.absent[part] = method
            continue
        reference = dense(prompt, seed)
        clip, handle = _video(studio, prompt, seed, partial(setting.enable, method=method, density=asked))
        advance()
        if not np.isfinite(clip).all():
            outcome.faults[part] = "the video has NaN or Inf"
            continue
        files = keep(studio, folder, title, clip, reference)
        outcome.rows[part] = {
            "setting": setting.describe(handle.method, handle.schedule),
            "asked": asked,
            "density": handle.density,
            "overall_density": handle.overall_density,
            **compare_clips(clip, reference),
            "accuracy": None if studio.judge is None else studio.judge(clip, prompt),
            "dense_accuracy": None if studio.judge is None else studio.judge(reference, prompt),
            **files,
        }
    return outcome


def _video(
    studio: Studio, prompt: str, seed: int, enable: Callable[[Any], SparseAttention]
) -> tuple[np.ndarray, SparseAttention]:
    handle = enable(studio.pipeline)
    try:
        return studio.make(prompt, seed), handle
    finally:
        disable_sparse_attention(studio.pipeline)


def keep(studio: Studio, name: str, title: str, clip: np.ndarray, dense: np.ndarray | None = None) -> Row:
    """Write a video, one with dense beside it, and a picture of both; return where they are.

    Each setting has a folder of its own, and files are named after prompt and seed, as tools such as VBench expect.

    Args:
        studio: Where to.
        name: Of the folder.
        title: Of the files, without what says their kind.
        clip: ``(F, H, W, 3)`` in [0, 1].
        dense: ``(F, H, W, 3)`` in [0, 1]; ``None`` if this is the dense one.
    """
    if studio.folder is None:
        return {}
    folder = studio.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    video = folder / f"{title}.mp4"
    studio.write(clip, video)
    if dense is None:
        return {"video": str(video)}
    import imageio.v3 as iio

    beside = studio.folder / BESIDE / name
    beside.mkdir(parents=True, exist_ok=True)
    pair, picture = beside / video.name, beside / f"{title}.jpg"
    studio.write(studio.pair(dense, clip), pair)
    with moved_when_complete(picture) as part:
        iio.imwrite(part, strip(dense, clip))
    return {"video": str(video), "side_by_side": str(pair), "strip": str(picture)}
