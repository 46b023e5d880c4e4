"""What is compared: methods with their fields and schedules, and searched plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..attention import AttentionMethod, BlockMethod, get_method, list_methods, method_class
from ..pipelines.presets import PRESETS
from ..schedule import Schedule
from ..search.candidates import SPARSE_VDIT as MODES
from ..search.candidates import read_call
from ..search.plan import Plan
from .adjust import CALIBRATED, SPARSE_VDIT, NotAdjustable, at_density
from .synthetic import Sample

PLAN = "plan"

WARMUP = 0.3
EVERY_STEP = Schedule(warmup_steps=WARMUP)
# AdaSpa's first search is a dense step, so one warm-up step less is as many dense steps
SEARCH = Schedule(warmup_steps=0.2, refresh_steps=(0.2, 0.6))

KNOBS = {"paro": "plan", "radial": "decay"}
"""The field that says how much is computed, where it is not ``density``."""


@dataclass(frozen=True)
class Setting:
    """Name a method with fields, or a plan; its density comes later, unless a field says it.

    Args:
        name: As rows and tables say it.
        method: Name of the method, ``"sparse-vdit"``, or ``"plan"`` for a searched plan.
        fields: Fields of the method; of a plan ``path``, its file.
        schedule: Which steps stay dense, and when masks are rebuilt; ``None`` for a plan, which brings its own.
    """

    name: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = EVERY_STEP

    @property
    def is_fixed(self) -> bool:
        """Return whether it says itself how much it computes."""
        return self.method == PLAN or KNOBS.get(self.method, "density") in self.fields

    @property
    def is_calibrated(self) -> bool:
        """Return whether it learns from calls of every layer."""
        return self.method in CALIBRATED and not self.is_fixed

    def at(self, density: float | None, samples: Callable[[bool], Sequence[Sample]]) -> AttentionMethod | Plan | str:
        """Make the method so that it computes a fraction of the pairs of some calls, or say why there is none.

        Args:
            density: The fraction, in (0, 1]; ``None`` for a setting that is fixed.
            samples: Makes the calls to look at, of every layer or of one in the middle. What is calibrated learns from
                them too, so they are not those that are measured.
        """
        if self.method == PLAN:
            return Plan.load(self.fields["path"])
        if density is None:
            return get_method(self.method, **self.fields)
        try:
            return at_density(self.method, self.fields, density, samples(self.is_calibrated))
        except NotAdjustable as error:
            return str(error)

    def describe(self, method: AttentionMethod | Plan) -> dict[str, Any]:
        """Return what rows say of it, as JSON values.

        Args:
            method: What it became.
        """
        found = {"plan": Path(self.fields["path"]).name} if isinstance(method, Plan) else method.describe()
        schedule = None if self.schedule is None else asdict(self.schedule)
        return {"name": self.name, "method": self.method, "fields": found, "schedule": schedule}

    def changed(self, **given: Any) -> Setting:
        """Return it with other fields, of its method or its schedule, and a name that says so.

        Args:
            **given: The fields; a plan, which brings all of its own, stays as it is.

        Raises:
            TypeError: There is no such field.
            ValueError: A value is out of range.
        """
        if self.schedule is None or not given:
            return self
        of_schedule = {f.name for f in fields(Schedule)}
        schedule = replace(self.schedule, **{name: value for name, value in given.items() if name in of_schedule})
        values = self.fields | {name: value for name, value in given.items() if name not in of_schedule}
        get_method(MODES[0] if self.method == SPARSE_VDIT else self.method, **values)
        name, _, before = self.name.removesuffix(")").partition("(")
        after = [f"{field}={value}" for field, value in given.items()]
        return Setting(f"{name}({', '.join([before, *after] if before else after)})", self.method, values, schedule)


def settings_by_part(
    settings: Sequence[Setting], densities: Sequence[float]
) -> dict[str, tuple[Setting, float | None]]:
    """Return each setting at each density, those that are fixed once, by the name of the row.

    Args:
        settings: The settings.
        densities: Fractions of the pairs, each in (0, 1].
    """
    turned = {f"{s.name}@{d:g}": (s, d) for d in densities for s in settings if not s.is_fixed}
    return {**turned, **{setting.name: (setting, None) for setting in settings if setting.is_fixed}}


def default_settings() -> list[Setting]:
    """List what is compared unless something else is asked for.

    These are the methods that need no trained weights, as published and in the orders and tiles that we know better,
    and ``default``, which is what ``enable_sparse_attention`` takes for the demo.
    """
    cubes, tiles = {"tile": (4, 4, 4)}, {"order": "tile"}
    demo = next(preset for preset in PRESETS if preset.family == "wan" and not preset.width)
    more = [
        Setting("default", demo.method, {name: value for name, value in demo.fields.items() if name != "density"}),
        Setting("draft-4x4x4", "draft", dict(cubes)),
        Setting("adaspa-tile", "adaspa", dict(tiles), SEARCH),
        Setting("sla-tile", "sla", dict(tiles)),
        Setting("radial-tile", "radial", dict(tiles)),
        Setting(SPARSE_VDIT, SPARSE_VDIT),
    ]
    methods = [_plain(name) for name in list_methods() if name not in ("dense", "skip", *MODES)]
    return sorted([*methods, *more], key=lambda setting: setting.name)


def find_settings(texts: Iterable[str] | None, *, means: bool = False) -> list[Setting]:
    """Return settings from what a user says of them.

    Args:
        texts: Names, of ``default_settings`` or of methods; with fields of the method or of the schedule in brackets,
            such as ``"draft(tile=(1, 8, 8), refresh_steps=4)"``; or files of plans, ``.json``; default: all names.
        means: Whether each is listed a second time with blocks that stand in by their means.

    Raises:
        ValueError: There is no such setting or plan, a value is out of range, or the text makes no sense.
        TypeError: The method has no such field.
    """
    known = {setting.name: setting for setting in [*map(_plain, list_methods()), *default_settings()]}
    chosen = default_settings() if texts is None else [_find(text.strip(), known) for text in texts]
    return [each for setting in chosen for each in (setting, *(_with_means(setting) if means else ()))]


def _find(text: str, known: dict[str, Setting]) -> Setting:
    if text.endswith(".json"):
        Plan.load(text)
        return Setting(Path(text).stem, PLAN, {"path": text}, None)
    name, brackets, rest = text.partition("(")
    if name.strip() not in known:
        raise ValueError(f"unknown setting {name!r}; settings are: {', '.join(known)}, and files of plans")
    found = known[name.strip()]
    return found.changed(**read_call(f"{found.method.replace('-', '_')}({rest}")[1]) if brackets else found


def _plain(name: str) -> Setting:
    return Setting(name, name, schedule=SEARCH if name == "adaspa" else EVERY_STEP)


def _with_means(setting: Setting) -> list[Setting]:
    if setting.method in (PLAN, SPARSE_VDIT) or not issubclass(method_class(setting.method), BlockMethod):
        return []
    if setting.fields.get("compensate") == "mean":
        return []
    return [replace(setting, name=f"{setting.name}+mean", fields={**setting.fields, "compensate": "mean"})]
