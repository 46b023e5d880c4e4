"""The plan: what a search found, in a file that people can read and that nobody has to trust."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..attention import AttentionMethod
from ..attention.kernels.dispatch import list_precisions
from ..attention.per_head.table import Table
from ..environment import installed_version
from ..files import moved_when_complete
from ..schedule import Schedule, check_edges
from ..tokens import TokenSpec, VideoGrid
from .schema import MAX_NUMBER, Item, PlanError, read_json, shown, write_json
from .stored_methods import method_from_json, method_to_json

SCHEMA = 1
"""Version of the file; a change that older versions cannot read counts it up."""

_TITLE = r"[a-z][a-z0-9_]{0,63}"
_NAME = r"[A-Za-z_][A-Za-z0-9_.]{0,127}"
_CELLS = {"errors": (0.0, MAX_NUMBER), "densities": (0.0, 1.0), "seconds": (0.0, MAX_NUMBER)}
_SAMPLED = {"error_means": (0.0, MAX_NUMBER), "error_stds": (0.0, MAX_NUMBER), "recalls": (0.0, 1.0)}
_RUN = ("steps", "scheduler", "guidance", "prompts", "precision")
_STORAGE = ("quantization_config", "dtype", "torch_dtype")
_EXPECTED = ("density", "speedup", "error")
_ENTRIES = (
    "buckets",
    "transformers",
    "video",
    "run",
    "schedule",
    "expected",
    "curve",
    "curve_unit",
    "cost_model",
    "fastdit",
)


@dataclass(frozen=True, kw_only=True)
class TransformerPlan:
    """Hold what a search found for one transformer, for each step bucket, layer and head.

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
    """

    model_class: str
    config_hash: str
    head_dim: int
    choices: Sequence[Sequence[Sequence[int]]]
    errors: Sequence[Sequence[Sequence[float]]]
    densities: Sequence[Sequence[Sequence[float]]]
    seconds: Sequence[Sequence[Sequence[float]]]
    frame_mass: Sequence[Sequence[Sequence[float]]] = ()
    error_means: Sequence[Sequence[Sequence[float]]] = ()
    error_stds: Sequence[Sequence[Sequence[float]]] = ()
    recalls: Sequence[Sequence[Sequence[float | None]]] = ()

    def __post_init__(self) -> None:
        for name in ("choices", *_CELLS, *_SAMPLED, "frame_mass"):
            value = getattr(self, name)
            if hasattr(value, "tolist"):
                object.__setattr__(self, name, value.tolist())

    @property
    def layers(self) -> int:
        """Count the self-attention layers."""
        return len(self.choices[0]) if self.choices else 0

    @property
    def heads(self) -> int:
        """Count the heads of a layer."""
        return len(self.choices[0][0]) if self.layers else 0


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
        for name, value in _read(Item(self._values()), len(candidates)).items():
            object.__setattr__(self, name, value)

    def method(self, title: str) -> Table:
        """Return the method that runs the plan on a transformer.

        Args:
            title: Its name in the pipeline, such as ``"transformer"``.

        Raises:
            PlanError: The plan has nothing for it.
        """
        if title not in self.transformers:
            raise PlanError(f"the plan has nothing for {shown(title)}; it has: {', '.join(sorted(self.transformers))}")
        return Table(edges=self.buckets, methods=self.candidates, choices=_tuples(self.transformers[title].choices))

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
            values = {name: value for name, value in values.items() if name != "fastdit_plan"}
            listed = Item(values.pop("candidates", None), "candidates").items(least=1)
            candidates = tuple(method_from_json(item, path.parent) for item in listed)
            return cls(candidates=candidates, **_read(Item(values), len(candidates)))
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
        values = self._values()
        values["candidates"] = [
            method_to_json(method, f"candidates[{index}]", path) for index, method in enumerate(self.candidates)
        ]
        with moved_when_complete(path) as part:
            part.write_text(write_json({"fastdit_plan": SCHEMA, **values}), encoding="utf-8", newline="\n")

    def _values(self) -> dict[str, Any]:
        """Return everything but the candidates as the file has it."""
        transformers = {
            title: {**vars(found), "layers": found.layers, "heads": found.heads}
            for title, found in self.transformers.items()
        }
        return {
            "buckets": self.buckets,
            "transformers": transformers,
            "video": {
                "grid": self.tokens.grid.shape,
                "text_tokens": self.tokens.text_tokens,
                "text_first": self.tokens.text_first,
            },
            "run": {name: getattr(self, name) for name in _RUN},
            "schedule": dataclasses.asdict(self.schedule),
            "expected": {name: getattr(self, name) for name in _EXPECTED},
            "curve": self.curve,
            "curve_unit": self.curve_unit,
            "cost_model": self.cost_model,
            "fastdit": self.fastdit,
        }

    def __repr__(self) -> str:
        return (
            f"Plan(density {self.density:g}, speedup {self.speedup:g}, {len(self.buckets)} buckets, "
            f"{len(self.candidates)} candidates, {', '.join(sorted(self.transformers))})"
        )


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


def _read(plan: Item, candidates: int) -> dict[str, Any]:
    """Check everything but the candidates, and return it as arguments of a plan."""
    entries = plan.entries(_ENTRIES)
    buckets = tuple(item.number(0, 1) for item in entries["buckets"].items(least=1))
    try:
        check_edges(buckets)
    except ValueError:
        entries["buckets"].fail("fractions of the run, ascending to 1")
    tokens, transformers = _read_tokens(entries["video"]), {}
    for title, item in entries["transformers"].entries().items():
        Item(title, f"the name {shown(title)} in transformers").text(_TITLE, called="a name like transformer_2")
        transformers[title] = _read_transformer(item, len(buckets), candidates, tokens.grid.frames)
    if not transformers:
        entries["transformers"].fail("at least one transformer")
    run, expected = entries["run"].entries(_RUN), entries["expected"].entries(_EXPECTED)
    precision = run["precision"].value
    if precision is not None and precision not in list_precisions():
        run["precision"].fail(f"null or one of {', '.join(list_precisions())}")
    curve = [pair.items(2) for pair in entries["curve"].items()]
    return {
        "buckets": buckets,
        "transformers": transformers,
        "tokens": tokens,
        "steps": run["steps"].integer(1, 100_000),
        "scheduler": run["scheduler"].text(_NAME, called="the name of a class"),
        "guidance": None if run["guidance"].value is None else run["guidance"].number(),
        "prompts": tuple(item.text() for item in run["prompts"].items()),
        "schedule": _read_schedule(entries["schedule"]),
        "density": expected["density"].number(0, 1),
        "speedup": expected["speedup"].number(0),
        "error": expected["error"].number(0),
        "curve": tuple((cost.number(0), error.number(0)) for cost, error in curve),
        "curve_unit": entries["curve_unit"].text("density|seconds", called="density or seconds"),
        "cost_model": {name: item.plain() for name, item in entries["cost_model"].entries().items()},
        "precision": precision,
        "fastdit": entries["fastdit"].text(r"[A-Za-z0-9.+_-]{1,64}", called="a version"),
    }


def _read_transformer(item: Item, buckets: int, candidates: int, frames: int) -> TransformerPlan:
    entries = item.entries(
        ("model_class", "config_hash", "head_dim", "layers", "heads", "choices", *_CELLS, "frame_mass"), _SAMPLED
    )
    layers, heads = (entries[name].integer(1, 100_000) for name in ("layers", "heads"))

    def cells(name: str) -> list[list[list[Item]]]:
        return [[row.items(heads) for row in bucket.items(layers)] for bucket in entries[name].items(buckets)]

    numbers = {
        name: _tuples([[[x.number(*limits) for x in row] for row in bucket] for bucket in cells(name)])
        for name, limits in _CELLS.items()
    }
    for name, limits in _SAMPLED.items():
        if name in entries and entries[name].value:
            numbers[name] = _tuples(
                [[[_known(x, limits, name) for x in row] for row in bucket] for bucket in cells(name)]
            )
    choices = [[[x.integer(0, candidates - 1) for x in row] for row in bucket] for bucket in cells("choices")]
    return TransformerPlan(
        model_class=entries["model_class"].text(_NAME, called="the name of a class"),
        config_hash=entries["config_hash"].text(r"[0-9a-f]{8,64}", called="a hash in hexadecimal digits"),
        head_dim=entries["head_dim"].integer(1, 100_000),
        choices=_tuples(choices),
        **numbers,
        frame_mass=tuple(
            tuple(tuple(x.number(0, 1) for x in row.items(frames)) for row in layer.items(heads))
            for layer in entries["frame_mass"].items(layers if entries["frame_mass"].value else 0)
        ),
    )


def _known(item: Item, limits: tuple[float, float], name: str) -> float | None:
    return None if name == "recalls" and item.value is None else item.number(*limits)


def _read_tokens(item: Item) -> TokenSpec:
    entries = item.entries(("grid", "text_tokens", "text_first"))
    grid = VideoGrid(*(axis.integer(1, 1_000_000) for axis in entries["grid"].items(3)))
    return TokenSpec(grid, entries["text_tokens"].integer(0, 1_000_000), entries["text_first"].flag())


def _read_schedule(item: Item) -> Schedule:
    entries = item.entries([f.name for f in dataclasses.fields(Schedule)])
    try:
        return Schedule(**{name: entry.plain(2) for name, entry in entries.items()})
    except (ValueError, TypeError) as error:
        raise PlanError(f"{item.place} makes no sense: {error}") from error


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, (list, tuple)) else values
