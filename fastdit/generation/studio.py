"""A studio: makes sparse videos, and dense ones to compare with, and measures both."""

from __future__ import annotations

import inspect
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import metrics
from .errors import InputError
from .jobs import Job
from .progress import Display
from .report import decibels
from .request import Settings
from .sizes import check_sizes
from .sources import ModelSource
from .timed_run import Clip, run_timed, warm_up
from .video import side_by_side, write_video

if TYPE_CHECKING:
    import numpy as np

    from ..api import SparseAttention

FPS = 16.0
BUSY = 0.75
"""Load above the number of cores from which times are unreliable."""
DENSE = Settings(method="dense")
ALL_SPARSE = {"warmup_steps": 0, "tail_steps": 0}


@dataclass(frozen=True)
class Studio:
    """Make videos with one pipeline.

    Args:
        pipeline: The pipeline, on its device.
        settings: What makes it sparse.
        arguments: Keywords of its call, the same for every prompt.
        seed: Seed of the noise, the same for every prompt.
        fps: Frames per second of the files.
        device: Where the pipeline runs.
        screen: Shows the progress.
    """

    pipeline: Any
    settings: Settings
    arguments: dict[str, Any]
    seed: int
    fps: float
    device: str
    screen: Display

    @classmethod
    def open(
        cls,
        pipeline: Any,
        source: ModelSource,
        given: dict[str, Any],
        *,
        settings: Settings,
        seed: int,
        fps: float | None,
        device: str,
        screen: Display,
    ) -> Studio:
        """Resolve the arguments of a pipeline and check its sizes before anything is computed.

        Args:
            pipeline: The pipeline, on its device.
            source: Where it came from.
            given: Keywords of its call; ``None`` where the user said nothing.
            settings: What makes it sparse.
            seed: Seed of the noise.
            fps: Frames per second of the files; ``None`` takes what the model was made for.
            device: Where the pipeline runs.
            screen: Shows the progress.

        Raises:
            InputError: The pipeline does not take one of the keywords or sizes.
        """
        arguments = call_arguments(pipeline, source, given)
        check_sizes(pipeline, arguments)
        rate = _frame_rate(pipeline, source, fps)
        return cls(pipeline, settings, arguments, seed, rate, device, screen)

    def make(self, job: Job, *, compare: bool) -> dict[str, Any]:
        """Make and write the video of a prompt, and return its numbers.

        Args:
            job: The prompt and the files.
            compare: Whether the dense video is made too, for its time and as the reference of PSNR and SSIM.

        Raises:
            InputError: The model is not supported, or what was asked does not suit it.
        """
        self.screen.clear()
        if compare:
            self._warm_up(job)
        handle = self.settings.enable(self.pipeline)
        sparse = self._run(job, "sparse" if compare else "")
        steps = _sparse_steps(handle, len(sparse.steps))
        found = {
            "prompt": job.prompt,
            "file": str(job.output),
            "method": handle.method.name,
            "method_fields": handle.method.describe(),
            "schedule": asdict(handle.schedule),
            "kernel": self.settings.computing.get("kernel"),
            "steps": len(sparse.steps),
            "sparse_steps": steps,
            "frames": len(sparse.frames),
            "height": sparse.frames.shape[1],
            "width": sparse.frames.shape[2],
            "fps": self.fps,
            "density": _density_of(steps, len(sparse.steps), handle.overall_density),
            "overall_density": handle.overall_density,
            "sparse_call_density": handle.density,
            **_times(sparse, steps),
            "attention_seconds": handle.attention_seconds,
            "psnr": None,
            "ssim": None,
            "dense_file": None,
            "compare_file": None,
            **{f"dense_{name}": None for name in (*_times(sparse, steps), "attention_seconds")},
            "attention": {name: value for name, value in handle.report().items() if name in ("totals", "layers")},
        }
        self._write("writing sparse" if compare else "writing", sparse.frames, job.output)
        if compare:
            handle = DENSE.enable(self.pipeline)
            dense = self._run(job, "dense")
            times = {**_times(dense, steps), "attention_seconds": handle.attention_seconds}
            found |= {f"dense_{name}": value for name, value in times.items()}
            found |= _distance(sparse.frames, dense.frames)
            self._write("writing dense", dense.frames, job.dense_output)
            self._write("writing both", side_by_side(dense.frames, sparse.frames), job.pair_output)
            found |= {"dense_file": str(job.dense_output), "compare_file": str(job.pair_output)}
            self._warn_if_busy(sparse, dense)
        return found

    def _warn_if_busy(self, *clips: Clip) -> None:
        cores = os.cpu_count() or 1
        load = max(clip.load or 0 for clip in clips)
        if self.device == "cpu" and load > cores + BUSY:
            self.screen.note(
                f"warning: other programs were running (load {load:.1f} on {cores} cores), so these times are "
                "unreliable; run again on a quiet machine"
            )

    def _run(self, job: Job, label: str) -> Clip:
        return run_timed(self.pipeline, self._call(job), screen=self.screen, device=self.device, label=label)

    def _call(self, job: Job) -> dict[str, Any]:
        noise = torch.Generator("cpu").manual_seed(self.seed)
        return {**self.arguments, "prompt": job.prompt, "generator": noise}

    def _warm_up(self, job: Job) -> None:
        bar = self.screen.start("warm-up", 2)
        for settings in (replace(self.settings, schedule=ALL_SPARSE), DENSE):
            settings.enable(self.pipeline)
            warm_up(self.pipeline, self._call(job))
            bar.advance()
        bar.finish()

    def _write(self, name: str, frames: np.ndarray, path: Path) -> None:
        bar = self.screen.start(name, len(frames))
        path.parent.mkdir(exist_ok=True)
        write_video(frames, path, fps=self.fps, advance=bar.advance)
        bar.finish()
        self.screen.note(f"wrote {path}")


def call_arguments(pipeline: Any, source: ModelSource, given: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a pipeline's call, those that the model is made for included.

    Args:
        pipeline: The pipeline.
        source: Where it came from.
        given: Keywords of its call; ``None`` where the user said nothing.

    Raises:
        InputError: The pipeline does not take one of them.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    values = {name: value for name, value in given.items() if value is not None}
    for name in values:
        if name not in parameters:
            raise InputError(f"{type(pipeline).__name__} has no argument {name}; leave the option out")
    arguments = {**source.defaults, **values}
    arguments.setdefault("num_inference_steps", parameters["num_inference_steps"].default)
    return arguments


def _frame_rate(pipeline: Any, source: ModelSource, asked: float | None) -> float:
    own = inspect.signature(pipeline.__call__).parameters.get("frame_rate")
    return float(asked or source.fps or (own.default if own is not None else FPS))


def _times(clip: Clip, steps: list[int]) -> dict[str, float | None]:
    return {
        "seconds": clip.seconds,
        "text_encoding_seconds": clip.text_encoding,
        "denoising_seconds": clip.denoising,
        "decoding_seconds": clip.decoding,
        "load_average": clip.load,
        "sparse_steps_seconds": clip.seconds_of(steps),
    }


def _distance(video: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    a, b = torch.from_numpy(video), torch.from_numpy(reference)
    small = min(video.shape[1:3]) < metrics.SSIM_WINDOW
    return {
        "psnr": decibels(float(metrics.psnr(a, b))),
        "ssim": None if small else float(metrics.ssim(a, b)),
    }


def _density_of(steps: list[int], num_steps: int, overall: float | None) -> float | None:
    # every step makes the same calls, so what is left out overall is left out in these steps
    return None if overall is None or not steps else 1 - (1 - overall) * num_steps / len(steps)


def _sparse_steps(handle: SparseAttention, num_steps: int) -> list[int]:
    if handle.method.stock:
        return []
    # dense layers are dense at every step, and no reason to call a step dense
    schedule = replace(handle.schedule, dense_layers=())
    return [step for step in range(num_steps) if schedule.dense_reason(0, 1, step, num_steps) is None]
