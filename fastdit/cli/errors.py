"""How a command ends when something is wrong: one line on stderr and an exit code."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


class InputError(Exception):
    """Say that the user asked for something that cannot be done; the text is all that is shown."""


def fail(message: str, code: int) -> int:
    """Write one line to stderr and return the exit code.

    Args:
        message: What was wrong; line breaks become spaces.
        code: The exit code.
    """
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(" ".join(message.split()), err=True)
    return code


@contextmanager
def as_input_error() -> Iterator[None]:
    """Turn the errors of the library's own argument checks into ``InputError``."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command end with one line instead of a traceback, unless it was given ``debug=True``.

    Args:
        command: The command; it has a keyword ``debug``.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.get("debug"))
        try:
            command(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            _end(error, "interrupted; no half-written file was left behind", INTERRUPTED, debug)
        except InputError as error:
            _end(error, str(error), BAD_INPUT, debug)
        except Exception as error:  # noqa: BLE001 - the last resort, whatever went wrong
            hint = "" if debug else " (--debug shows where)"
            _end(error, f"{type(error).__name__}: {error}{_advice(error)}{hint}", FAILED, debug)

    return run


def _end(error: BaseException, message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    raise typer.Exit(fail(message, code)) from None


def _advice(error: Exception) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "; try fewer --frames, a smaller --height and --width, --dtype bfloat16 or --offload"
    return ""
