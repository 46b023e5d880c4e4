"""Field types of methods, and the check of values against them."""

from __future__ import annotations

import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal

_WORDS = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a text", type(None): "None"}


@dataclass(frozen=True)
class Allowed:
    """A restriction on the values of a field, as metadata of ``Annotated``.

    Args:
        text: What the field must be, in words.
        holds: Predicate that allowed values of the type satisfy.
        hint: Advice appended to the error, such as a usual value.
    """

    text: str
    holds: Callable[[Any], bool]
    hint: str = ""


Density = Annotated[float, Allowed("in (0, 1]", lambda value: 0 < value <= 1, "write 0.25 to keep 25 % of the blocks")]
BlockSize = Annotated[
    int,
    Allowed(
        "a power of two in [16, 256]", lambda value: value in (16, 32, 64, 128, 256), "128 and 64 are the fast ones"
    ),
]
Count = Annotated[int, Allowed("a whole number of at least 1", lambda value: value >= 1)]
Tile = Annotated[
    tuple[int, int, int], Allowed("(frames, height, width), each at least 1", lambda value: min(value) >= 1)
]


def check_fields(instance: Any) -> None:
    """Check the fields of a frozen dataclass by their annotations; lists become tuples, and paths texts.

    Args:
        instance: The dataclass.

    Raises:
        ValueError: A value is not of the type of its field, or not allowed.
    """
    for name, kind in _kinds(type(instance)).items():
        object.__setattr__(instance, name, check_value(name, getattr(instance, name), kind))


def check_value(name: str, value: Any, kind: Any) -> Any:
    """Return a value that is of a type and allowed; a list as a tuple, and a path as text, where those are wanted.

    Args:
        name: Its name, for the error.
        value: The value.
        kind: The type: a class, a ``Literal``, a tuple, a union, or ``Annotated`` with ``Allowed``. A ``bool`` is no
            number, and a ``float`` is finite.

    Raises:
        ValueError: It is something else.
    """
    for candidate in (value, _frozen(value)):
        if _fits(candidate, kind):
            return candidate
    hint = "".join(f"; {text}" for text in _hints(kind))
    raise ValueError(f"{name} must be {_spell(kind)}, got {reprlib.repr(value)}{hint}")


@cache
def _kinds(cls: type) -> dict[str, Any]:
    kinds = typing.get_type_hints(cls, include_extras=True)
    return {field.name: kinds[field.name] for field in fields(cls)}


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _fits(value, parts[0]) and all(rule.holds(value) for rule in _rules(kind))
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = (parts[0],) * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if kind is float:
        limit = sys.float_info.max
        return isinstance(value, (int, float)) and type(value) is not bool and -limit <= value <= limit
    if kind is int:
        return isinstance(value, int) and type(value) is not bool
    known = origin or kind
    return known is Any or not isinstance(known, type) or isinstance(value, known)


def _spell(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        rules = _rules(kind)
        return rules[-1].text if rules else _spell(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(part) for part in parts)
    if origin is Literal:
        return repr(parts[0]) if len(parts) == 1 else f"one of {', '.join(map(str, parts))}"
    if origin is tuple and parts[-1] is Ellipsis:
        return f"a tuple, of which each is {_spell(parts[0])}"
    if origin is tuple:
        return f"a tuple of {len(parts)}: {', '.join(_spell(part) for part in parts)}"
    return _WORDS.get(kind) or getattr(kind, "__name__", str(kind))


def _hints(kind: Any) -> list[str]:
    own = [rule.hint for rule in _rules(kind) if rule.hint]
    return own + [hint for part in typing.get_args(kind) for hint in _hints(part)]


def _rules(kind: Any) -> list[Allowed]:
    return [rule for rule in getattr(kind, "__metadata__", ()) if isinstance(rule, Allowed)]
