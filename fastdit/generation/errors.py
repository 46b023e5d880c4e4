"""Errors that tell the user what was wrong with a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Say that the user asked for something that cannot be done; the text is all that is shown."""


@contextmanager
def as_input_error() -> Iterator[None]:
    """Turn the errors of the library's own argument checks into ``InputError``.

    Raises:
        InputError: A check failed.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error
