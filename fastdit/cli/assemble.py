"""Commands that take groups of options."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from .console import guarded


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function, whose errors end it with one line.

    A parameter whose type is a dataclass becomes one option for each field, dataclasses within it included; its default
    is an instance that holds the defaults of the options.

    Args:
        function: What the command does; it has an option ``debug``.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    own = inspect.signature(function).parameters.values()
    groups = {name: kind for name, kind in hints.items() if _is_group(kind)}

    @functools.wraps(function)
    def run(**given: Any) -> None:
        made = {name: _build(kind, given) for name, kind in groups.items()}
        function(**given, **made)

    parameters = [option for each in own for option in _options(each.name, hints[each.name], each.default)]
    told: Any = run
    told.__signature__ = inspect.Signature(parameters)
    told.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return guarded(run)


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _options(name: str, kind: Any, default: Any) -> Iterator[inspect.Parameter]:
    if not _is_group(kind):
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        return
    hints = typing.get_type_hints(kind, include_extras=True)
    default = kind() if default is inspect.Parameter.empty else default
    for field in fields(kind):
        yield from _options(field.name, hints[field.name], getattr(default, field.name))


def _build(kind: Any, given: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            field.name: _build(hints[field.name], given) if _is_group(hints[field.name]) else given.pop(field.name)
            for field in fields(kind)
        }
    )
