"""Errors in a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """A request that cannot be carried out; users see the text and no traceback."""


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
