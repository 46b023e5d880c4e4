"""The plan: what a search found, in a file that people can read and that nobody has to trust."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from ..attention import AttentionMethod
from ..attention.kernels.dispatch import list_precisions
from ..attention.per_head.table import Table
from ..environment import installed_version
from ..files import moved_when_complete
from ..schedule import Schedule
from ..tokens import TokenSpec, VideoGrid
from ..validation import Fraction, Listed, NonEmpty, Number, Part, Positive, Size, Text, Whole, shown
from .schema import PlanError, check_plain, read_json, validated, write_json
from .stored_methods import StoredMethod, method_from_json, method_to_json

SCHEMA = 1
"""Version of the file; a change that older versions cannot read counts it up."""

_STORAGE = ("quantization_config", "dtype", "torch_dtype")
_CELLS = ("errors", "densities", "seconds", "error_means", "error_stds", "recalls")

_ClassName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,127}$")]
_Title = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class TransformerPlan(Part):
    """What a search found for one transformer, for each step bucket, layer and head.

    Args:
        model_class: Name of its class.
        config_hash: What ``config_hash`` returns for its configuration.
        head_dim: Channels of a head, at least 1.
        choices: ``(buckets, layers, heads)`` index of the candidate.
        errors: ``(buckets, layers, heads)`` error expected of it, at least 0, as the search measures it.
        densities: ``(buckets, layers, heads)`` fraction of pairs expected to be computed, in [0, 1].
        seconds: ``(buckets, layers, heads)`` time expected of one call's head, in seconds, at least 0.
        frame_mass: ``(layers, heads, frames)`` dense attention on the same frame, one frame apart, and so on, each in
            [0, 1]; empty where it was not measured.
        error_means: ``(buckets, layers, heads)`` mean over prompts, steps and guidance passes of the error, of which
            ``errors`` is an upper quantile, at least 0; empty if unknown, like the next two.
        error_stds: ``(buckets, layers, heads)`` standard deviation of it, likewise.
        recalls: ``(buckets, layers, heads)`` mean attention mass covered, in [0, 1]; ``None`` where it is unknown.
        layers: Self-attention layers, at least 1; default: those of ``choices``.
        heads: Heads of a layer, at least 1; default: those of ``choices``.

    Raises:
        ValueError: A value is none of these.
    """

    model_class: _ClassName
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
    head_dim: Size
    choices: NonEmpty[NonEmpty[NonEmpty[Whole]]]
    errors: Listed[Listed[Listed[Positive]]]
    densities: Listed[Listed[Listed[Fraction]]]
    seconds: Listed[Listed[Listed[Positive]]]
    frame_mass: Listed[Listed[Listed[Fraction]]] = ()
    error_means: Listed[Listed[Listed[Positive]]] = ()
    error_stds: Listed[Listed[Listed[Positive]]] = ()
    recalls: Listed[Listed[Listed[Fraction | None]]] = ()
    layers: Size = Field(default_factory=lambda known: len(known["choices"][0]))
    heads: Size = Field(default_factory=lambda known: len(known["choices"][0][0]))


class _Video(Part):
    grid: Annotated[tuple[Size, Size, Size], Strict(False)]
    text_tokens: Whole
    text_first: bool


class _Run(Part):
    steps: Size
    scheduler: _ClassName
    guidance: Number | None
    prompts: Listed[Text]
    precision: Text | None

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, value: str | None) -> str | None:
        if value not in (None, *list_precisions()):
            raise ValueError(f" must be null or one of {', '.join(list_precisions())}, got {shown(value)}")
        return value


class _Expected(Part):
    density: Fraction
    speedup: Positive
    error: Positive


def _make_schedule(values: Any) -> Any:
    try:
        return Schedule(**values) if isinstance(values, dict) else values
    except (ValueError, TypeError) as error:
        raise ValueError(f" makes no sense: {error}") from error


class _Contents(Part):
    """What a file has beside its version and the candidates."""

    buckets: NonEmpty[Fraction]
    transformers: Annotated[dict[_Title, TransformerPlan], Field(min_length=1)]
    video: _Video
    run: _Run
    schedule: Annotated[Schedule, BeforeValidator(_make_schedule)]
    expected: _Expected
    curve: Listed[Annotated[tuple[Positive, Positive], Strict(False)]]
    curve_unit: Literal["density", "seconds"]
    cost_model: dict[str, Any]
    fastdit: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+_-]{1,64}$")]

    @model_validator(mode="after")
    def _check_shapes(self) -> _Contents:
        check_plain(self.cost_model, ".cost_model", 8)
        if self.buckets[-1] != 1 or any(a >= b for a, b in itertools.pairwise((0, *self.buckets))):
            raise ValueError(f".buckets must be fractions of the run, ascending to 1, got {self.buckets}")
        for title, found in self.transformers.items():
            place, shape = f".transformers.{title}", (len(self.buckets), found.layers, found.heads)
            for name in ("choices", *_CELLS):
                if getattr(found, name) != TransformerPlan.model_fields[name].default:
                    _check_shape(getattr(found, name), shape, f"{place}.{name}")
            if found.frame_mass:
                _check_shape(found.frame_mass, (*shape[1:], self.video.grid[0]), f"{place}.frame_mass")
        return self

    def arguments(self) -> dict[str, Any]:
        """Return them as arguments of a plan."""
        values = dict(self)
        video, run, expected = (values.pop(name) for name in ("video", "run", "expected"))
        tokens = TokenSpec(VideoGrid(*video.grid), video.text_tokens, video.text_first)
        return {**values, **dict(run), **dict(expected), "tokens": tokens}


class _File(_Contents):
    fastdit_plan: int
    candidates: NonEmpty[StoredMethod]


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """Hold a searched plan: a method for every step bucket, layer and head, and what the search knew.

    Numbers are rounded to six digits, which is what the file keeps, so that a plan equals what is loaded again.

    Args:
        candidates: The methods that the choices name by index; the first is dense.
        buckets: Ends of the step buckets as fractions of the run, ascending, the last one 1.
        transformers: For each transformer, by its name in the pipeline, what was found.
        tokens: What the sequences of the search were made up of.
        steps: Denoising steps of the search, at least 1.
        scheduler: Class name of the scheduler.
        guidance: Guidance scale, or ``None`` if there was none.
        prompts: The prompts.
        schedule: Which steps and layers stay dense whatever the choices say.
        density: Fraction of pairs expected to be computed in sparse calls, in [0, 1].
        speedup: Time of dense attention over that of the plan, as expected, at least 0.
        error: Error expected, at least 0, as the search measures it.
        curve: Pairs of cost, relative to dense, and error that other budgets would have had, by ascending cost.
        curve_unit: What this cost is: ``"density"`` or ``"seconds"``.
        cost_model: How seconds were predicted, in numbers and texts.
        precision: ``"int8"`` or ``"int8_fp8"`` for products in low precision; ``None`` for that of the model.
        fastdit: Version that made the plan.

    Raises:
        PlanError: A value is none of these, or they do not fit each other; the error says where.
    """

    candidates: tuple[AttentionMethod, ...]
    buckets: tuple[float, ...]
    transformers: Mapping[str, TransformerPlan]
    tokens: TokenSpec
    steps: int
    scheduler: str
    guidance: float | None = None
    prompts: tuple[str, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)
    density: float
    speedup: float
    error: float
    curve: tuple[tuple[float, float], ...] = ()
    curve_unit: str = "density"
    cost_model: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    fastdit: str = field(default_factory=lambda: installed_version("fastdit") or "unknown")

    def __post_init__(self) -> None:
        candidates = tuple(self.candidates)
        for index, method in enumerate(candidates):
            if not isinstance(method, AttentionMethod):
                raise PlanError(f"candidates[{index}] must be a method, got {shown(method)}")
        if not candidates or candidates[0].name != "dense":
            raise PlanError(f"candidates[0] must be dense, got {candidates[0].name if candidates else 'none at all'}")
        object.__setattr__(self, "candidates", candidates)
        for name, value in self._contents().arguments().items():
            object.__setattr__(self, name, value)
        for title, found in self.transformers.items():
            for place, index in np.ndenumerate(found.choices):
                if index >= len(candidates):
                    place = f"transformers.{title}.choices{''.join(f'[{i}]' for i in place)}"
                    raise PlanError(
                        f"{place} must be less than {len(candidates)}, the number of candidates, got {index}"
                    )

    def method(self, title: str) -> Table:
        """Return the method that runs the plan on a transformer.

        Args:
            title: Its name in the pipeline, such as ``"transformer"``.

        Raises:
            PlanError: The plan has nothing for it.
        """
        if title not in self.transformers:
            raise PlanError(f"the plan has nothing for {shown(title)}; it has: {', '.join(sorted(self.transformers))}")
        return Table(edges=self.buckets, methods=self.candidates, choices=self.transformers[title].choices)

    def fits(self, title: str, *, model_class: str, config_hash: str, layers: int, heads: int) -> str | None:
        """Say why the plan does not fit a transformer, or return ``None`` if it does.

        A plan fits other grids and numbers of steps than those of the search: methods are applied to the
        video at hand, and buckets are fractions of the run. Only masks that were calibrated for one grid
        refuse another, when they are run.

        Args:
            title: Its name in the pipeline.
            model_class: Name of its class.
            config_hash: What ``config_hash`` returns for its configuration.
            layers: Its self-attention layers.
            heads: Heads of a layer.
        """
        known = self.transformers.get(title)
        if known is None:
            return f"it has nothing for the pipeline's {title}, only for {', '.join(sorted(self.transformers))}"
        if model_class != known.model_class:
            return f"it was searched for a {known.model_class}, and the {title} is a {model_class}"
        if (layers, heads) != (known.layers, known.heads):
            return (
                f"it was searched for {known.layers} layers of {known.heads} heads, and the {title} has "
                f"{layers} layers of {heads}"
            )
        if config_hash != known.config_hash:
            return (
                f"it was searched for a {model_class} of another configuration ({known.config_hash}, and the {title} "
                f"has {config_hash}); if that does not matter, enable plan.method({title!r}) instead of the plan"
            )
        return None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. It may come from anyone: nothing in it is executed, and no file but those beside it is opened.

        Args:
            path: The file; masks that belong to it lie beside it.

        Raises:
            PlanError: It cannot be read, is of another version, or a value in it is wrong; the error says where.
        """
        path = Path(path)
        values = read_json(path)
        try:
            found = values.get("fastdit_plan") if isinstance(values, dict) else None
            if found is None:
                raise PlanError("it is no plan: it does not say fastdit_plan")
            if type(found) is not int or found != SCHEMA:
                raise PlanError(
                    f"it is a plan of version {shown(found)}, and this fastdit reads {SCHEMA}; search again"
                )
            arguments = validated(_File, values).arguments()
            del arguments["fastdit_plan"]
            arguments["candidates"] = tuple(
                method_from_json(stored, f"candidates[{index}]", path.parent)
                for index, stored in enumerate(arguments["candidates"])
            )
            return cls(**arguments)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan, and masks that belong to it beside it. A file is only there when it is complete.

        Args:
            path: The file, ending in ``.json``; one that is there is replaced.

        Raises:
            PlanError: The path does not end in ``.json``, or a method has a value that no file can hold.
        """
        path = Path(path)
        if path.suffix.lower() != ".json":
            raise PlanError(f"a plan is saved to a file that ends in .json, got {shown(path.name)}")
        candidates = [
            method_to_json(method, f"candidates[{index}]", path) for index, method in enumerate(self.candidates)
        ]
        values = {"fastdit_plan": SCHEMA, "candidates": candidates, **self._contents().model_dump()}
        with moved_when_complete(path) as part:
            part.write_text(write_json(values), encoding="utf-8", newline="\n")

    def _contents(self) -> _Contents:
        values = {name: getattr(self, name, None) for name in _Contents.model_fields}
        values["video"] = {
            "grid": self.tokens.grid.shape,
            "text_tokens": self.tokens.text_tokens,
            "text_first": self.tokens.text_first,
        }
        values["run"] = {name: getattr(self, name) for name in _Run.model_fields}
        values["expected"] = {name: getattr(self, name) for name in _Expected.model_fields}
        return validated(_Contents, values)

    def __repr__(self) -> str:
        return (
            f"Plan(density {self.density:g}, speedup {self.speedup:g}, {len(self.buckets)} buckets, "
            f"{len(self.candidates)} candidates, {', '.join(sorted(self.transformers))})"
        )


def _check_shape(values: Any, shape: Sequence[int], place: str) -> None:
    if len(values) != shape[0]:
        raise ValueError(f"{place} must be a list of {shape[0]}, got a list of {len(values)}")
    if len(shape) > 1:
        for index, value in enumerate(values):
            _check_shape(value, shape[1:], f"{place}[{index}]")


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a hash of what shapes a model: its configuration without private entries and those that are off.

    New versions of diffusers add options, which are ``None`` or ``False`` unless they are used. How weights are stored
    does not shape a model: a quantised one has the hash of the one that it was made from.

    Args:
        config: The configuration, such as ``transformer.config``.
    """
    kept = {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in _STORAGE and value is not None and value is not False
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
