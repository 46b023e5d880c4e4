"""Settings that are compared: methods with fields and schedules, and searched plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...api import SparseAttention, enable_sparse_attention
from ...attention import AttentionMethod, BlockMethod, get_method, list_methods, method_class
from ...defaults import choose
from ...plans.plan import Plan
from ...schedule import Schedule
from ...search.candidates import SPARSE_VDIT as MODES
from ...search.candidates import read_call
from .density_matching import CALIBRATED, SPARSE_VDIT, NotAdjustable, at_density
from .synthetic import Sample

PLAN = "plan"
DEFAULT = "default"
"""Named as a method here: what ``enable_sparse_attention`` gives the model at hand where no method is named."""

DEFAULT_METHODS = ("draft", "profiled")
"""The methods that ``default`` can be where fields are given, so that no plan is chosen."""

WARMUP = 0.3
EVERY_STEP = Schedule(warmup_steps=WARMUP)
# AdaSpa's first search is a dense step, so one warm-up step less gives the same number of dense steps
SEARCH = Schedule(warmup_steps=0.2, refresh_steps=(0.2, 0.6))

KNOBS = {"paro": "plan", "radial": "decay"}
"""The field that says how much is computed, where it is not ``density``."""


@dataclass(frozen=True)
class Setting:
    """A method with fields, or a plan; its density is set later, unless a field sets it.

    Args:
        name: As rows and tables say it.
        method: Name of the method, ``"sparse-vdit"``, ``"plan"`` for a searched plan, or ``"default"``.
        fields: Fields of the method; of a plan ``path``, its file; of the default those of its schedule too.
        schedule: Which steps stay dense, and when masks are rebuilt; ``None`` for a plan and the default, which bring
            their own.
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
        return self.method in CALIBRATED and (self.method == SPARSE_VDIT or not self.is_fixed)

    def at(
        self, density: float | None, samples: Callable[[bool], Sequence[Sample]]
    ) -> AttentionMethod | Plan | str | None:
        """Make the method so that it computes a fraction of the pairs of some calls, or say why there is none.

        Args:
            density: The fraction, in (0, 1]; ``None`` for a setting that is fixed.
            samples: Makes the calls to look at, of every layer or of one in the middle. What is calibrated learns from
                them too, so they are not those that are measured.

        Returns:
            The method or plan, a sentence that says why there is none, or ``None`` for the default, which the model at
            hand decides.
        """
        if self.method == DEFAULT:
            return None
        if self.method == PLAN:
            return Plan.load(self.fields["path"])
        given = dict(self.fields)
        if self.method == SPARSE_VDIT:  # not a registered method; calibrated even at a density of its own
            density = given.pop("density", density)
        if density is None:
            return get_method(self.method, **given)
        try:
            return at_density(self.method, given, density, samples(self.is_calibrated))
        except NotAdjustable as error:
            return str(error)

    def enable(self, target: Any, method: AttentionMethod | Plan | None, density: float | None) -> SparseAttention:
        """Make the attention of a pipeline sparse; the default is what its users get, at a density or without one.

        Args:
            target: The pipeline.
            method: What ``at`` returned, if that is no sentence.
            density: The fraction asked for, in (0, 1], or ``None``.
        """
        if method is not None:
            return enable_sparse_attention(target, method, schedule=self.schedule)
        of_schedule, given = _apart(self.fields)
        given |= {} if density is None else {"density": density}
        schedule = replace(choose(target, **given).schedule, **of_schedule)
        return enable_sparse_attention(target, schedule=schedule, **given)

    def of_model(self, target: Any) -> Setting:
        """Return the setting for single calls of a model, on which the default is a method and never a plan.

        Args:
            target: The pipeline, of which the configuration is enough.
        """
        if self.method != DEFAULT:
            return self
        of_schedule, given = _apart(self.fields)
        choice = choose(target, **{"density": 1.0, **given})  # with a field of its own no plan is chosen
        method = choice.methods["transformer"]
        found = {f.name: getattr(method, f.name) for f in fields(method) if f.name != "density" or f.name in given}
        return Setting(self.name, method.name, found, replace(choice.schedule, **of_schedule))

    def describe(self, method: AttentionMethod, schedule: Schedule | None) -> dict[str, Any]:
        """Return what rows say of it, as JSON values.

        Args:
            method: What it became.
            schedule: The one that it ran with; ``None`` on single calls of a plan.
        """
        about = {"plan": Path(self.fields["path"]).name} if self.method == PLAN else method.describe()
        name = method.name if self.method == DEFAULT else self.method
        how = None if schedule is None else asdict(schedule)
        return {"name": self.name, "method": name, "fields": about, "schedule": how}

    def changed(self, **given: Any) -> Setting:
        """Return it with other fields, of its method or its schedule, and a name that says so.

        Args:
            **given: The fields; a plan, which brings all of its own, stays as it is.

        Raises:
            TypeError: There is no such field.
            ValueError: A value is out of range.
        """
        if self.method == PLAN or not given:
            return self
        of_schedule, own = _apart(given)
        schedule = replace(self.schedule or Schedule(), **of_schedule)
        values = self.fields | own
        if self.method == DEFAULT:
            _check_default(_apart(values)[1])
            values, schedule = self.fields | given, None
        else:
            get_method(MODES[0] if self.method == SPARSE_VDIT else self.method, **values)
        name, _, before = self.name.removesuffix(")").partition("(")
        after = [f"{field}={value}" for field, value in given.items()]
        return Setting(f"{name}({', '.join([before, *after] if before else after)})", self.method, values, schedule)


def settings_by_part(
    settings: Sequence[Setting], densities: Sequence[float]
) -> dict[str, tuple[Setting, float | None]]:
    """Return each setting at each density, by the name of the row.

    Those that are fixed run once, and so does the default beside its densities: as it is without one.

    Args:
        settings: The settings.
        densities: Fractions of the pairs, each in (0, 1].
    """
    turned = {f"{s.name}@{d:g}": (s, d) for d in densities for s in settings if not s.is_fixed}
    return {**turned, **{s.name: (s, None) for s in settings if s.is_fixed or s.method == DEFAULT}}


def default_settings() -> list[Setting]:
    """List what is compared unless something else is asked for.

    These are the methods that need no trained weights, as published and in the orders and tiles that we know better,
    and ``default``, which is what ``enable_sparse_attention`` gives the model at hand.
    """
    cubes, tiles = {"tile": (4, 4, 4)}, {"order": "tile"}
    more = [
        Setting(DEFAULT, DEFAULT, schedule=None),
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
        means: Whether each is listed a second time with compensation by means.

    Raises:
        ValueError: There is no such setting or plan, a value is out of range, the text makes no sense, or two settings
            would have one name.
        TypeError: The method has no such field.
    """
    known = {setting.name: setting for setting in [*map(_plain, list_methods()), *default_settings()]}
    chosen = default_settings() if texts is None else [_find(text.strip(), known) for text in texts]
    settings = [each for setting in chosen for each in (setting, *(_with_means(setting) if means else ()))]
    names = [setting.name for setting in settings]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice; name each setting once, and rename one of two plans")
    return settings


def _find(text: str, known: dict[str, Setting]) -> Setting:
    if text.endswith(".json"):
        name = Path(text).stem
        if name.partition("@")[0].partition("(")[0] in known:
            raise ValueError(f"the plan {text} has the name of the setting {name!r}, and so would its rows; rename it")
        Plan.load(text)
        return Setting(name, PLAN, {"path": text}, None)
    name, brackets, rest = text.partition("(")
    if name.strip() not in known:
        raise ValueError(f"unknown setting {name!r}; settings are: {', '.join(known)}, and files of plans")
    setting = known[name.strip()]
    return setting.changed(**read_call(f"{setting.method.replace('-', '_')}({rest}")[1]) if brackets else setting


def _plain(name: str) -> Setting:
    return Setting(name, name, schedule=SEARCH if name == "adaspa" else EVERY_STEP)


def _apart(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part fields of the schedule from those of a method."""
    of_schedule = {f.name for f in fields(Schedule)}
    return (
        {name: value for name, value in given.items() if name in of_schedule},
        {name: value for name, value in given.items() if name not in of_schedule},
    )


def _check_default(given: dict[str, Any]) -> None:
    """Reject fields that no model's default method takes; the model at hand decides which method that is."""
    takes = [name for name in DEFAULT_METHODS if set(given) <= {f.name for f in fields(method_class(name))}]
    get_method((takes or DEFAULT_METHODS)[0], **given)


def _with_means(setting: Setting) -> list[Setting]:
    if setting.method in (PLAN, SPARSE_VDIT, DEFAULT) or not issubclass(method_class(setting.method), BlockMethod):
        return []
    if setting.fields.get("compensate") == "mean":
        return []
    return [replace(setting, name=f"{setting.name}+mean", fields={**setting.fields, "compensate": "mean"})]
