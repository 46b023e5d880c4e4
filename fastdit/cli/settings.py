"""What the user asked of sparse attention: method, its fields and the schedule, read from text and checked."""

from __future__ import annotations

import contextlib
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.errors import InputError, as_input_error
from ..generation.request import Settings

if TYPE_CHECKING:
    from ..plans.plan import Plan


def read_settings(
    *,
    method: str | None,
    density: float | None,
    assignments: list[str],
    plan: Path | None = None,
    schedule: dict[str, str | None],
    kernel: str | None,
    precision: str | None,
) -> Settings:
    """Check what was asked, without a model.

    Args:
        method: Name of a method.
        density: Fraction of blocks to keep, in (0, 1].
        assignments: ``name=value`` each, for fields of the method.
        plan: File of a plan that is run instead of a method.
        schedule: Fields of ``Schedule`` as text; ``None`` where nothing was said.
        kernel: Name of a kernel.
        precision: Low precision of products.

    Raises:
        InputError: Something is unknown, malformed or out of range.
    """
    from ..attention import get_method, method_class
    from ..attention.method import check_density

    values: dict[str, Any] = {}
    if plan is not None and (method is not None or density is not None or assignments):
        raise InputError("a plan says what every head runs: leave out --method, --density and --set, or --plan")
    if method is not None and method.endswith(".json"):
        raise InputError(f"{method} is the name of a file; a plan is given with --plan")
    if density is not None:
        with as_input_error():
            check_density(density)
        values["density"] = density
    if assignments and method is None:
        raise InputError(f"--set {assignments[0]} belongs to a method; say which one with --method")
    if method is not None:
        with as_input_error():
            cls = method_class(method)
            kinds = typing.get_type_hints(cls)
            for assignment in assignments:
                name, text = _split(assignment)
                known = {f.name for f in fields(cls)}
                values[name] = read_value(name, text, kinds[name]) if name in known else text
            get_method(method, **values)
    check_kernel(kernel)
    return Settings(method if plan is None else _read_plan(plan), values, read_schedule(schedule), kernel, precision)


def check_kernel(kernel: str | None) -> None:
    """Check that a kernel can run here.

    Args:
        kernel: Its name; ``None`` lets fastdit choose.

    Raises:
        InputError: It is unknown, or cannot.
    """
    from ..attention.kernels.dispatch import explain_kernels

    if kernel is None:
        return
    reasons = explain_kernels()
    if kernel not in reasons:
        raise InputError(f"unknown kernel {kernel!r}; kernels are: {', '.join(reasons)}")
    if reasons[kernel] is not None:
        raise InputError(f"the kernel {kernel!r} cannot run here: {reasons[kernel]}")


def read_schedule(given: dict[str, str | None]) -> dict[str, Any]:
    """Read fields of ``Schedule`` from text.

    Args:
        given: Names and texts; ``None`` where nothing was said.

    Raises:
        InputError: One is malformed or out of range.
    """
    from ..schedule import Schedule

    kinds = typing.get_type_hints(Schedule)
    values = {name: read_value(name, text, kinds[name]) for name, text in given.items() if text is not None}
    with as_input_error():
        Schedule(**values)
    return values


def read_value(name: str, text: str, kind: Any) -> Any:
    """Read a value of a given type from text.

    Args:
        name: What it is for, to be named in the error.
        text: The text; parts of a tuple are separated by commas.
        kind: The type: ``bool``, ``int``, ``float``, ``str``, a ``Literal``, a tuple of those, or a union.

    Raises:
        InputError: The text is none of that type.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for part in sorted(parts, key=lambda part: part is not type(None)):  # "none" is also text
            try:
                return read_value(name, text, part)
            except InputError:
                continue
    elif origin is tuple:
        items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        if len(parts) == 2 and parts[1] is Ellipsis:
            parts = (parts[0],) * len(items)
        if len(items) == len(parts):
            return tuple(read_value(name, item, part) for item, part in zip(items, parts, strict=True))
    elif origin is typing.Literal:
        for part in parts:
            if text == str(part):
                return part
    elif kind is type(None):
        if text.lower() == "none":
            return None
    elif kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif kind is str:
        return text
    elif kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise InputError(f"{name} must be {_spell(kind)}, got {text!r}")


def _read_plan(path: Path) -> Plan:
    from ..plans.plan import Plan

    with as_input_error():
        return Plan.load(path)


def _split(assignment: str) -> tuple[str, str]:
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
        raise InputError(f"--set takes name=value, got {assignment!r}; fastdit info lists the fields of each method")
    return name.strip().replace("-", "_"), text.strip()


def _spell(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(part) for part in parts)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"a list of {_spell(parts[0])}, as in 0,2,5"
        return f"{len(parts)} values ({', '.join(_spell(part) for part in parts)}) separated by commas"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(kind, str(kind))
