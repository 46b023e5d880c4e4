"""Options that several commands share, each described once."""

from __future__ import annotations

import contextlib
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..generation.errors import InputError, as_input_error
from ..generation.jobs import checked_text
from ..generation.processes import Team
from .console import Screen
from .settings import MOST, check_kernel, read_plan, read_schedule, read_value, split_assignment

if TYPE_CHECKING:
    import torch

    from ..generation.request import Settings
    from ..generation.sources import ModelSource

ATTENTION, VIDEO, MACHINE, OUTPUT = "Sparse attention", "Video", "Machine", "Output"

MOST_PIXELS = 65_536
"""Largest side in pixels that is not taken for a typing error."""


def option(text: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """Describe an option.

    Args:
        text: Its help.
        *names: What it is called; default: the name of the parameter.
        panel: The part of the help page that shows it.
        **more: Arguments of ``typer.Option``.
    """
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def within(low: float, high: float) -> Callable[[float | None], float | None]:
    """Make an option callback that rejects numbers outside a range, NaN included, and reports the number.

    Args:
        low: Smallest number.
        high: Largest number.
    """

    def check(value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"it must be in [{low}, {high}], got {value}")
        return value

    return check


def _readable(value: str | None) -> str | None:
    try:
        return None if value is None else checked_text("the text", value)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


COUNT, PIXELS = within(1, MOST), within(1, MOST_PIXELS)
SEED = within(-(2**63), 2**64 - 1)
"""What torch takes."""

Model = Annotated[str, option("demo, a folder, or a hub id.", "--model", "-m")]
Seed = Annotated[int, option("Random seed.", callback=SEED)]
Densities = Annotated[str, option("Fractions of the pairs to compute, as in 0.1,0.2.", panel=ATTENTION)]


@dataclass(frozen=True)
class OutputOptions:
    """What a command shows."""

    quiet: Annotated[bool, option("Show only errors.", "--quiet", "-q", panel=OUTPUT)] = False
    as_json: Annotated[bool, option("Write the results to stdout as JSON.", "--json", panel=OUTPUT)] = False
    debug: Annotated[bool, option("Show the traceback of an error.", "--debug", panel=OUTPUT)] = False

    def screen(self, *, shown: bool = True) -> Screen:
        """Open the screen.

        Args:
            shown: False in all processes but the first.
        """
        return Screen(quiet=self.quiet, as_json=self.as_json, shown=shown)

    def quiet_libraries(self) -> contextlib.AbstractContextManager[None]:
        """Silence diffusers and transformers, unless errors are being debugged."""
        from ..generation.loading import quiet_libraries

        return contextlib.nullcontext() if self.debug else quiet_libraries()


@dataclass(frozen=True)
class DeviceOptions:
    """Where tensors are, and their dtype."""

    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        option("Weight dtype; auto is bfloat16 on CUDA and float32 elsewhere.", panel=MACHINE),
    ] = "auto"
    asked: Annotated[str, option("auto, cpu, cuda or cuda:0.", "--device", panel=MACHINE)] = "auto"

    @cached_property
    def team(self) -> Team:
        """Return the processes that share the work."""
        return Team(self.asked)

    @cached_property
    def device(self) -> str:
        """Return the device of this process."""
        from ..generation.loading import choose_device

        return choose_device((self.team.device or self.asked) if self.asked in ("auto", "cuda") else self.asked)

    @cached_property
    def weights(self) -> torch.dtype:
        """Return the dtype of the weights."""
        from ..generation.loading import choose_dtype

        return choose_dtype(self.dtype, self.device)


@dataclass(frozen=True)
class MachineOptions(DeviceOptions):
    """Where a pipeline runs."""

    offload: Annotated[
        Literal["none", "model", "sequential", "group"],
        option("Keep weights on the CPU until they are needed.", panel=MACHINE),
    ] = "none"

    def check(self) -> None:
        """Check that the device exists and that the offload works on it."""
        from ..generation.loading import check_offload

        check_offload(self.offload, self.device)

    def load(self, source: ModelSource, *, compiled: bool = False) -> Any:
        """Load a pipeline.

        Args:
            source: Where the pipeline is.
            compiled: Whether its transformers are compiled.
        """
        from ..generation.loading import load_model

        return load_model(source, device=self.device, dtype=self.weights, offload=self.offload, compiled=compiled)

    def describe(self) -> dict[str, str]:
        """Return what reports say of it."""
        return {"dtype": str(self.weights).removeprefix("torch."), "offload": self.offload}


_STEPS: dict[str, Any] = {"metavar": "STEPS", "panel": ATTENTION}


@dataclass(frozen=True)
class StepOptions:
    """Which steps are dense, and when masks are rebuilt."""

    warmup_steps: Annotated[
        str | None, option("Number of first steps kept dense, or a fraction as in 0.25.", **_STEPS)
    ] = None
    tail_steps: Annotated[str | None, option("Number of last steps kept dense, or a fraction.", **_STEPS)] = None
    refresh_steps: Annotated[str | None, option("Rebuild masks every N steps, or at the listed steps.", **_STEPS)] = (
        None
    )

    def read(self) -> dict[str, Any]:
        """Return the fields of ``Schedule`` that were given."""
        return read_schedule(vars(self))


@dataclass(frozen=True)
class ScheduleOptions(StepOptions):
    """Which steps and layers are dense, and when masks are rebuilt."""

    dense_layers: Annotated[
        str | None, option("Layers kept dense, as in 0,1,-1.", metavar="LAYERS", panel=ATTENTION)
    ] = None


@dataclass(frozen=True)
class KernelOptions:
    """How blocks are computed; every field is a keyword of ``enable_sparse_attention``."""

    kernel: Annotated[str | None, option("Kernel that computes the blocks; see fastdit info.", panel=ATTENTION)] = None
    precision: Annotated[
        Literal["int8", "int8_fp8"] | None, option("Low precision of the matrix products.", panel=ATTENTION)
    ] = None

    def read(self) -> dict[str, Any]:
        """Return the keywords, once the kernel is known to run here."""
        check_kernel(self.kernel)
        return vars(self)


@dataclass(frozen=True)
class MethodOptions:
    """A method or a plan, its schedule and its kernel.

    Args:
        schedule: Dense steps and layers, and when masks are rebuilt.
        kernel: How blocks are computed.
    """

    method: Annotated[
        str | None,
        option("Which blocks are computed; see fastdit info (default: the best known for the model).", panel=ATTENTION),
    ] = None
    density: Annotated[float | None, option("Fraction of blocks to compute, in (0, 1].", panel=ATTENTION)] = None
    assignments: Annotated[
        list[str] | None,
        option("Set a field of the method; repeatable.", "--set", metavar="NAME=VALUE", panel=ATTENTION),
    ] = None
    plan: Annotated[Path | None, option("Plan written by fastdit search, instead of a method.", panel=ATTENTION)] = None
    schedule: ScheduleOptions = ScheduleOptions()
    kernel: KernelOptions = KernelOptions()

    def read(self) -> Settings:
        """Check what was asked, without a model.

        Raises:
            InputError: Something is unknown, malformed or out of range.
        """
        from ..attention import get_method, method_class
        from ..attention.method import check_density
        from ..generation.request import Settings

        method, plan, values = self.method, self.plan, {}
        if plan is not None and (method is not None or self.density is not None or self.assignments):
            raise InputError("a plan sets what every head runs: leave out --method, --density and --set, or --plan")
        if method is not None and method.endswith(".json"):
            raise InputError(f"{method} is a file name; pass a plan with --plan")
        if self.density is not None:
            with as_input_error():
                check_density(self.density)
            values["density"] = self.density
        if self.assignments and method is None:
            raise InputError(f"--set {self.assignments[0]} needs a method; pass one with --method")
        if method is not None:
            with as_input_error():
                cls = method_class(method)
                kinds = typing.get_type_hints(cls)
                for assignment in self.assignments or []:
                    name, text = split_assignment(assignment)
                    known = {f.name for f in fields(cls)}
                    values[name] = read_value(name, text, kinds[name]) if name in known else text
                get_method(method, **values)
        computing = self.kernel.read()
        return Settings(method if plan is None else read_plan(plan), values, self.schedule.read(), computing)


@dataclass(frozen=True)
class SizeOptions:
    """Size and length of a video, and how it is denoised."""

    height: Annotated[int | None, option("Height in pixels.", callback=PIXELS, panel=VIDEO)] = None
    width: Annotated[int | None, option("Width in pixels.", callback=PIXELS, panel=VIDEO)] = None
    frames: Annotated[int | None, option("Number of frames.", callback=COUNT, panel=VIDEO)] = None
    steps: Annotated[int | None, option("Number of denoising steps.", callback=COUNT, panel=VIDEO)] = None
    guidance: Annotated[
        float | None, option("Guidance scale.", callback=within(0, sys.float_info.max), panel=VIDEO)
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Return the keywords of a pipeline's call; ``None`` where the model decides."""
        keywords = {"frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale"}
        return {keywords.get(name, name): value for name, value in vars(self).items()}


@dataclass(frozen=True)
class VideoOptions(SizeOptions):
    """What is passed to a pipeline in addition to the prompt."""

    negative_prompt: Annotated[
        str | None, option("What the video should not show.", callback=_readable, panel=VIDEO)
    ] = None
