"""Options that several commands share, handed over as what is made of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def assembled(**makers: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of functions, and hand it what each of them returns.

    ``@assembled(size=read_size)`` puts the options of ``read_size`` where the command has its parameter ``size``. A
    default of one command alone is set by ``partial(read_size, height=64)``.

    Args:
        **makers: Functions, by the parameter of the command that they are for. They are called in this order.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        options = {name: inspect.signature(maker, eval_str=True).parameters for name, maker in makers.items()}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            for name, maker in makers.items():
                given[name] = maker(**{option: given.pop(option) for option in options[name]})
            command(**given)

        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, own in inspect.signature(command, eval_str=True).parameters.items()
            for parameter in (options[name].values() if name in options else [own])
        ]
        told: Any = run
        told.__signature__ = inspect.Signature(parameters)
        told.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return wrap
