"""What the user asks of sparse attention, read from text and checked."""

from __future__ import annotations

import contextlib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.errors import InputError, as_input_error

if TYPE_CHECKING:
    from ..plans.plan import Plan


MOST = 100_000
"""Largest count of frames, steps, prompts or tokens of a block that is not taken for a typing error."""


def check_kernel(kernel: str | None) -> None:
    """Check that a kernel can run here.

    Args:
        kernel: Name of the kernel; ``None`` chooses one.

    Raises:
        InputError: The kernel is unknown or cannot run.
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
        given: Names and texts; ``None`` for an option that was not given.

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
        name: Name of the value, for the error.
        text: The text; parts of a tuple are separated by commas.
        kind: The type: ``bool``, ``int``, ``float``, ``str``, a ``Literal``, a tuple of those, or a union.

    Raises:
        InputError: The text is not of that type.
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


def split(text: str) -> list[str]:
    """Split a list at its commas.

    Args:
        text: Such as ``"draft, sla"``.
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def read_densities(text: str) -> list[float]:
    """Read densities from text.

    Args:
        text: Such as ``"0.1, 0.2"``.

    Raises:
        InputError: One is not a number in (0, 1], or there are none.
    """
    from ..attention.method import check_density

    try:
        values = [float(part) for part in split(text)]
    except ValueError as error:
        raise InputError(f"densities are numbers separated by commas, as in 0.1,0.2; got {text!r}") from error
    with as_input_error():
        for value in values:
            check_density(value)
    if not values:
        raise InputError("--densities is empty; pass some, as in --densities 0.1,0.2")
    return values


def read_blocks(text: str) -> tuple[int, int]:
    """Read a block size from text.

    Args:
        text: Such as ``"128x64"``.

    Raises:
        InputError: The text has another form, or a number is out of range.
    """
    try:
        queries, keys = map(int, text.split("x"))
    except ValueError as error:
        raise InputError(f"blocks are QUERIESxKEYS, as in 128x64; got {text!r}") from error
    if not (1 <= queries <= MOST and 1 <= keys <= MOST):
        raise InputError(f"blocks hold at least one query and one key, and at most {MOST}, got {text!r}")
    return queries, keys


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Args:
        path: The file.
    """
    from ..plans.plan import Plan

    with as_input_error():
        return Plan.load(path)


def split_assignment(assignment: str) -> tuple[str, str]:
    """Split ``name=value``.

    Args:
        assignment: The text.

    Raises:
        InputError: There is no name or no ``=``.
    """
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
