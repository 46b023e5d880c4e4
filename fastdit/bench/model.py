"""The pipeline that a benchmark uses: found, loaded, called, judged and timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..api import SparseAttention
from ..demo.captions import HELD_OUT_CAPTIONS, parse_caption
from ..demo.scorer import read_clip
from ..generation.errors import InputError
from ..generation.loading import load_model
from ..generation.progress import Silent
from ..generation.sizes import check_sizes
from ..generation.sources import DEMO, ModelSource, find_model
from ..generation.studio import FPS, call_arguments
from ..generation.timed_run import Clip, run_timed
from ..generation.video import side_by_side, write_video
from .conditions import Conditions
from .e2e import Subject, Timing
from .inputs.capture import capture
from .inputs.problems import PROBLEMS
from .inputs.synthetic import Sample
from .measuring.measure import throughput
from .quality import Studio

REST = 1.5
"""How many times as long as its attention a video takes, about."""


@dataclass(frozen=True)
class Model:
    """A pipeline that is not loaded yet, and how it is called.

    Args:
        source: Where it is.
        given: Keywords of its call; ``None`` where the model decides.
    """

    source: ModelSource
    given: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, name: str, given: dict[str, Any] | None = None) -> Model:
        """Look for a model.

        Args:
            name: ``"demo"``, a folder or a hub id.
            given: Keywords of its call.

        Raises:
            InputError: There is no such model.
        """
        return cls(find_model(name), given or {})

    @property
    def name(self) -> str:
        """Return the name used in rows, without folders of this machine."""
        return Path(self.source.name).name if self.source.local else self.source.name

    @property
    def label(self) -> str:
        """Return the name with the given keywords of the call, which distinguishes rows of one model."""
        return ", ".join([self.name, *(f"{_brief(n)}={value:g}" for n, value in self.about()["arguments"].items())])

    def load(self, session: Conditions) -> tuple[Any, dict[str, Any]]:
        """Load the pipeline; return it with the keywords of its call.

        Args:
            session: Conditions of the run.

        Raises:
            InputError: It cannot be loaded, or does not take what was given.
        """
        pipeline = load_model(self.source, device=session.device, dtype=session.dtype, offload="none", compiled=False)
        pipeline.set_progress_bar_config(disable=True)
        arguments = call_arguments(pipeline, self.source, self.given)
        check_sizes(pipeline, arguments)
        return pipeline, arguments

    def prompts(self, listed: Sequence[str] | None, option: str) -> list[str]:
        """Return the given prompts, or those of the demo.

        Args:
            listed: The given prompts, or ``None``.
            option: The option that takes prompts, for the error.

        Raises:
            InputError: The model has none and none are given.
        """
        if listed is None and self.source.place is not None:
            raise InputError(f"{self.source.name} has no prompts of its own; pass {option}")
        return list(HELD_OUT_CAPTIONS if listed is None else listed)

    def about(self) -> dict[str, Any]:
        """Return what rows say of how the pipeline is called."""
        return {"arguments": {name: value for name, value in self.given.items() if value is not None}}

    def seconds(self, session: Conditions) -> float | None:
        """Estimate the seconds of a dense video; ``None`` for models other than the demo.

        Args:
            session: Conditions of the run.
        """
        if self.source.name != DEMO or any(self.given.get(n) for n in ("height", "width", "num_frames")):
            return None
        steps = self.given.get("num_inference_steps") or PROBLEMS[DEMO].steps
        return REST * PROBLEMS[DEMO].video_flops * steps / PROBLEMS[DEMO].steps / throughput(session.device)


def _brief(argument: str) -> str:
    return argument.removeprefix("num_").removeprefix("inference_").removesuffix("_scale")


def open_studio(session: Conditions, model: Model, calibration: tuple[str, int], folder: Path | None) -> Studio:
    """Load a pipeline to make videos with.

    Args:
        session: Conditions of the run.
        model: The pipeline.
        calibration: A prompt and a seed that are not compared together.
        folder: Where videos go; ``None`` keeps none.
    """
    pipeline, arguments = model.load(session)

    def make(prompt: str, seed: int) -> np.ndarray:
        noise = torch.Generator("cpu").manual_seed(seed)
        return np.asarray(pipeline(**arguments, prompt=prompt, generator=noise, output_type="np").frames[0])

    rate = model.source.fps or FPS
    return Studio(
        pipeline,
        make,
        arguments["num_inference_steps"],
        calibration,
        folder,
        lambda frames, path: write_video(frames, path, fps=rate),
        side_by_side,
        judge_demo if model.source.place is None else None,
    )


def judge_demo(frames: np.ndarray, prompt: str) -> float:
    """Return which part of a prompt a clip of the demo shows, in [0, 1]: colour, motion, background.

    Args:
        frames: ``(F, H, W, 3)`` in [0, 1].
        prompt: The prompt.
    """
    right = read_clip(frames).score(parse_caption(prompt))
    return sum(right[part] for part in ("color", "motion", "background")) / 3


def open_subject(session: Conditions, model: Model, prompt: str) -> Subject:
    """Load a pipeline to be timed.

    Args:
        session: Conditions of the run.
        model: The pipeline.
        prompt: What it makes.
    """
    pipeline, arguments = model.load(session)
    silent = Silent()

    def make() -> Clip:
        noise = torch.Generator("cpu").manual_seed(session.seed)
        call = {**arguments, "prompt": prompt, "generator": noise}
        clip = run_timed(pipeline, call, screen=silent, device=session.device)
        silent.clear()
        return clip

    def run(handle: SparseAttention) -> Timing:
        clip = make()
        return Timing.of(handle, clip.seconds, clip.steps)

    def samples(every_layer: bool) -> list[Sample]:
        step = int(0.5 * arguments["num_inference_steps"])
        return capture(pipeline, make, (step,), every_layer)

    return Subject(pipeline, run, samples, session.device)
